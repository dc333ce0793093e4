"""Calibration: that it helps where it should, harms nothing, and repeats exactly."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.artifacts.source import open_source
from mbq.artifacts.spec import Optimisation
from mbq.kernels.quantize import dequantize, quantize, unpack_pair
from mbq.kernels.widths import WIDTHS
from mbq.workers.calibrate import (
    Calibration,
    _factors,
    calibrate_block,
)
from mbq.workers.gptq import factor
from mbq.workers.model import BlockRunner, open_model
from mbq.workers.stages import stages_of
from mbq.workers.trainable import TrainableLinear

# Of a LLaMA's block: what reads the same.
_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def _calibrate(folder: Path, microbatch: int = 4, seed: int = 3, **options: Any) -> Calibration:
    model = open_model(open_source(str(folder), "main"), torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(16, 24, 64, generator=generator)
    fractions: list[float] = []
    result = calibrate_block(
        model.runner(0, microbatch),
        dict.fromkeys(WIDTHS, hidden),
        hidden,
        Optimisation(**({"passes": 6, "batch_size": 4} | options)),
        group_size=32,
        readers=_INPUTS,
        seed=seed,
        report=fractions.append,
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    return result


def _calibrate_on(
    hidden: Tensor, block: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]
) -> Calibration:
    return calibrate_block(
        BlockRunner(block, run, 4),
        dict.fromkeys(WIDTHS, hidden),
        hidden,
        Optimisation(passes=6, batch_size=4),
        group_size=32,
        readers=_INPUTS,
        seed=3,
        report=lambda fraction: None,
    )


def _equal(a: Calibration, b: Calibration) -> bool:
    return a.loss_after == b.loss_after and all(
        torch.equal(a.linears[name].code_NK, b.linears[name].code_NK)
        and torch.equal(a.linears[name].scale_zero_NG, b.linears[name].scale_zero_NG)
        and torch.equal(a.linears[name].gain_bias_WN, b.linears[name].gain_bias_WN)
        for name in a.linears
    )


@pytest.mark.parametrize(("method", "kept"), [("joint", 0.65), ("clip", 0.9)])
def test_reduces_the_error_at_two_bits_and_keeps_the_order_of_widths(
    method: str, kept: float
) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(128, 64))
    # Heavy tails, as trained weights have: a Gaussian has next to nothing to clip.
    weight = torch.distributions.StudentT(3.0).sample((64, 128))
    block[0].weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(32, 8, 128)
    result = calibrate_block(
        BlockRunner(block, lambda module, x: module(x), 4),
        dict.fromkeys(WIDTHS, x),
        x,
        Optimisation(method=method, passes=30, batch_size=4, clip_rate=0.05),
        group_size=128,
        readers=[["0"]],
        seed=3,
        report=lambda fraction: None,
    )
    assert result.loss_after[2] < kept * result.loss_before[2]
    errors = [result.loss_after[bits] for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)


def test_same_seed_same_bytes_other_seed_others(tiny_model: Path) -> None:
    first = _calibrate(tiny_model)
    assert _equal(first, _calibrate(tiny_model))
    assert not _equal(first, _calibrate(tiny_model, seed=4))


def test_clip_freezes_weights_and_has_no_gains(tiny_model: Path) -> None:
    result = _calibrate(tiny_model, method="clip")
    for linear in result.linears.values():
        gain, bias = unpack_pair(linear.gain_bias_WN)
        assert torch.equal(gain, torch.ones_like(gain))
        assert not bias.any()


@pytest.mark.parametrize("widths", [(2, 4, 8), (4, 3, 2), (3,)])
def test_joint_corrects_every_trained_width(tiny_model: Path, widths: tuple[int, ...]) -> None:
    result = _calibrate(tiny_model, widths=widths)
    for linear in result.linears.values():
        gain, _ = unpack_pair(linear.gain_bias_WN)
        corrected = {bits for bits, row in zip(WIDTHS, gain, strict=True) if (row != 1).any()}
        assert corrected == set(widths)


def test_low_digits_make_up_for_what_keeping_the_trained_ones_costs() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 32, bias=False))
    source_NK = block[0].weight.detach().clone()
    x = torch.randn(32, 8, 64) @ torch.randn(64, 64)
    result = calibrate_block(
        BlockRunner(block, lambda module, x: module(x), 4),
        dict.fromkeys(WIDTHS, x),
        x,
        Optimisation(passes=6, batch_size=4, weight_rate=0.05),
        group_size=32,
        readers=[["0"]],
        seed=3,
        report=lambda fraction: None,
    )
    linear = result.linears["0"]
    grid = unpack_pair(linear.scale_zero_NG)
    first = (linear.code_NK >> 4) << 4
    nearest_NK = quantize(source_NK, *grid).clamp(first, first + 15)
    assert (nearest_NK != quantize(source_NK, *grid)).any(), "no digit was trained away"
    for bits in (6, 8):
        off, nearest = (
            (x @ (source_NK - dequantize(code_NK, *grid, bits)).T).square().sum()
            for code_NK in (linear.code_NK, nearest_NK)
        )
        assert off < 0.8 * nearest


def test_few_tokens_of_massive_values_do_not_cost_the_others(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, torch.device("cpu"))
    hidden = torch.randn(16, 24, 64, generator=torch.Generator().manual_seed(5))

    def error_of_others(massive: float) -> float:
        """Of the block at 2 bits, trained with first tokens that it answers with such values."""
        block = model.block(0)

        def run(module: nn.Module, x: Tensor) -> Tensor:
            out = model.run(module, 0, x)
            return torch.cat((massive * out[:, :1], out[:, 1:]), 1)

        _calibrate_on(hidden, block, run)
        for module in block.modules():
            if isinstance(module, TrainableLinear):
                module.bits = 2
        with torch.no_grad():
            exact = model.run(model.block(0), 0, hidden)[:, 1:]
            return (model.run(block, 0, hidden)[:, 1:] - exact).square().mean().item()

    # 1.6 times where they count in full.
    assert error_of_others(1000.0) < 1.35 * error_of_others(1.0)


def test_microbatches_add_up_to_the_batch(tiny_model: Path) -> None:
    whole, parts = _calibrate(tiny_model, microbatch=4), _calibrate(tiny_model, microbatch=3)
    for bits in WIDTHS:
        assert parts.loss_after[bits] == pytest.approx(whole.loss_after[bits], rel=0.1)


def _calibrate_broken(output: float, loss: float) -> None:
    """Calibrate a block whose output is multiplied by a number at first, later by another one."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            untouched = isinstance(self.linear, nn.Linear)
            out: Tensor = self.linear(x) * (output if untouched else loss)
            return out

    hidden = torch.randn(2, 4, 32)
    calibrate_block(
        BlockRunner(Broken(), lambda block, x: block(x), 2),
        {2: hidden, 3: hidden, 4: hidden, 8: hidden},
        hidden,
        Optimisation(passes=2),
        32,
        [["linear"]],
        0,
        lambda fraction: None,
    )


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericError, match="lower the learning rates"):
        _calibrate_broken(output=1.0, loss=math.nan)


def test_an_output_that_is_not_finite_is_an_error_of_the_model() -> None:
    with pytest.raises(NumericError, match="what the block outputs is not finite; look at"):
        _calibrate_broken(output=math.inf, loss=1.0)


# With two degrees of freedom or fewer a weight has no variance: one may be all of the error.
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), tails=st.floats(3.0, 30.0), passes=st.integers(2, 12))
def test_training_is_never_worse_than_its_start(seed: int, tails: float, passes: int) -> None:
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 32))
    for linear in (block[0], block[2]):
        weight = torch.distributions.StudentT(tails).sample(linear.weight.shape) / 8
        linear.weight = nn.Parameter(weight, requires_grad=False)
    x = torch.randn(32, 8, 64)
    result = calibrate_block(
        BlockRunner(block, lambda module, x: module(x), 4),
        dict.fromkeys(WIDTHS, x),
        x,
        Optimisation(passes=passes, batch_size=4),
        group_size=32,
        readers=[["0"], ["2"]],
        seed=seed,
        report=lambda fraction: None,
    )
    for bits in Optimisation().widths:
        assert result.loss_after[bits] <= result.loss_before[bits]


def test_columns_of_other_sizes_change_no_code() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8, 64)
    weight_NK = torch.randn(32, 64) / 8
    factor_K = torch.ones(64)
    factor_K[[3, 17, 40]] = torch.tensor([2.0**-6, 2.0**5, 2.0**-2])

    def calibrated(factor_K: Tensor) -> Calibration:
        linear = nn.Linear(64, 32, bias=False)
        linear.weight = nn.Parameter(weight_NK * factor_K, requires_grad=False)
        hidden = x / factor_K
        return calibrate_block(
            BlockRunner(nn.Sequential(linear), lambda module, x: module(x), 4),
            dict.fromkeys(WIDTHS, hidden),
            hidden,
            Optimisation(passes=2, batch_size=4),
            group_size=32,
            readers=[["0"]],
            seed=3,
            report=lambda fraction: None,
        )

    even, uneven = calibrated(torch.ones(64)), calibrated(factor_K)
    assert not even.linears["0"].exponent_K.any()
    assert torch.equal(2.0 ** uneven.linears["0"].exponent_K, factor_K)
    assert torch.equal(uneven.linears["0"].code_NK, even.linears["0"].code_NK)
    assert uneven.loss_after == pytest.approx(even.loss_after, rel=1e-5)


def test_the_mean_input_is_multiplied_exactly_once_corrected() -> None:
    torch.manual_seed(0)
    source = nn.Linear(96, 16)
    mean_K = 3 * torch.randn(96)
    exponent_K = torch.randint(-3, 4, (96,), dtype=torch.int8)
    linear = TrainableLinear(source, 32, output_rms=0.7, exponent_K=exponent_K)
    for gain in linear.gain:
        nn.init.uniform_(gain, 0.9, 1.1)
    linear.correct(mean_K, (2, 6))
    with torch.no_grad():
        for bits in WIDTHS:
            linear.bits = bits
            close = torch.allclose(linear(mean_K[None]), source(mean_K[None]), rtol=1e-3, atol=1e-3)
            assert close == (bits in (2, 6))


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4), (3,)])
def test_a_constant_part_of_the_inputs_costs_no_width(widths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(128, 64)).requires_grad_(False)
    x = torch.randn(32, 8, 128)

    def losses(hidden: Tensor) -> dict[int, float]:
        return calibrate_block(
            BlockRunner(copy.deepcopy(block), lambda module, x: module(x), 4),
            dict.fromkeys(WIDTHS, hidden),
            hidden,
            Optimisation(passes=2, batch_size=4, widths=widths),
            group_size=32,
            readers=[["0"]],
            seed=3,
            report=lambda fraction: None,
        ).loss_after

    centred, shifted = losses(x), losses(x + 5 * torch.randn(128))
    assert all(shifted[bits] < 2.5 * centred[bits] for bits in WIDTHS)


def test_every_width_learns_from_its_own_inputs_what_full_precision_outputs() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight.requires_grad_(False)
    weight_NK = linear.weight.clone()
    x = torch.randn(32, 4, 64)
    # As if the blocks before had left each width with hidden states of another size.
    inputs = {2: 0.5 * x, 3: 2.0 * x, 4: 0.25 * x}
    result = calibrate_block(
        BlockRunner(nn.Sequential(linear), lambda module, x: module(x), 4),
        inputs,
        x,
        Optimisation(passes=60, batch_size=4, gain_rate=0.05),
        group_size=64,
        readers=[["0"]],
        seed=3,
        report=lambda fraction: None,
    )
    found = result.linears["0"]
    gain_WN, bias_WN = unpack_pair(found.gain_bias_WN)
    for bits, own in inputs.items():
        row = WIDTHS.index(bits)
        made_NK = dequantize(found.code_NK, *unpack_pair(found.scale_zero_NG), bits)
        out = own @ (gain_WN[row][:, None] * made_NK).T + bias_WN[row]
        target = x @ weight_NK.T
        assert (out - target).norm() / target.norm() < {2: 0.45, 3: 0.35, 4: 0.3}[bits]


def test_bits_are_chosen_by_the_inputs_of_their_width() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 16, bias=False))
    full, two, four = (torch.randn(8, 4, 32) * torch.rand(32) for _ in range(3))
    stages = stages_of(Optimisation(widths=(2, 4)))
    inputs = {2: two, 4: four}
    runner = BlockRunner(block, lambda module, x: module(x), 4)
    exponent_K = torch.randint(-2, 3, (32,), dtype=torch.int8)
    factors = _factors(runner, inputs, full, stages, {"0": exponent_K})
    for bits, own in {2: two, 4: four, 8: full}.items():
        x_TK = own.flatten(0, 1) * 2.0**exponent_K
        expected_KK = factor(x_TK.T @ x_TK, torch.ones(32), len(x_TK))
        assert torch.allclose(factors[bits]["0"], expected_KK, rtol=1e-4, atol=1e-5)


def test_refining_changes_no_bit_that_is_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, list[Tensor]] = {}
    real = TrainableLinear.compensate

    def note(linear: TrainableLinear, kept_bits: int, factors: Any) -> None:
        codes = quantize(linear.value * linear._unit_NK(), *linear.grid())
        kept.setdefault(kept_bits, []).append(codes >> (8 - kept_bits))
        real(linear, kept_bits, factors)

    monkeypatch.setattr(TrainableLinear, "compensate", note)
    # Rates at which weights would leave their bins.
    result = _calibrate(tiny_model, weight_rate=0.3)
    for bits in (2, 3, 4):
        for first_NK, linear in zip(kept[bits], result.linears.values(), strict=True):
            assert torch.equal(linear.code_NK >> (8 - bits), first_NK)


@pytest.mark.parametrize("scale", [2.0**-8, 2.0**4])
def test_a_model_of_another_scale_is_calibrated_as_well(tiny_model: Path, scale: float) -> None:
    """What a block adds to its input may be small or large, as it is from model to model."""
    _assert_alike(_scaled(tiny_model, 1.0), _scaled(tiny_model, scale))


def _assert_alike(one: Calibration, other: Calibration) -> None:
    for bits in WIDTHS:
        gains = [c.loss_after[bits] / c.loss_before[bits] for c in (one, other)]
        assert gains[1] == pytest.approx(gains[0], rel=0.1)


def _scaled(folder: Path, scale: float) -> Calibration:
    """Calibrate the same block with hidden states, and all that it adds to them, times a scale."""
    model = open_model(open_source(str(folder), "main"), torch.float32, torch.device("cpu"))
    block: Any = model.block(0)
    for norm in (block.input_layernorm, block.post_attention_layernorm):
        norm.variance_epsilon *= scale**2
    for linear in (block.self_attn.o_proj, block.mlp.down_proj):
        linear.weight.mul_(scale)
    hidden = scale * torch.randn(16, 24, 64, generator=torch.Generator().manual_seed(5))
    return _calibrate_on(hidden, block, lambda block, x: model.run(block, 0, x))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kept=st.sampled_from(WIDTHS[:-1]), moved=st.floats(0.0, 10.0))
def test_weights_within_their_limits_keep_their_first_bits(
    seed: int, kept: int, moved: float
) -> None:
    torch.manual_seed(seed)
    exponent_K = torch.randint(-3, 4, (64,), dtype=torch.int8)
    linear = TrainableLinear(nn.Linear(64, 16), 32, output_rms=1.0, exponent_K=exponent_K)
    unit_NK = linear.unit_NG.repeat_interleave(32, dim=1)
    before_NK = quantize(linear.value * unit_NK, *linear.grid())
    low_NK, high_NK = linear.limits(kept)
    value_NK = linear.value + moved * torch.randn_like(linear.value)
    after_NK = quantize(value_NK.maximum(low_NK).minimum(high_NK) * unit_NK, *linear.grid())
    assert torch.equal(after_NK >> (8 - kept), before_NK >> (8 - kept))


@pytest.mark.parametrize("kept", [0, 2])
def test_a_weight_stays_near_its_source_unless_its_kept_bin_is_elsewhere(kept: int) -> None:
    torch.manual_seed(0)
    source = nn.Linear(64, 16)
    linear = TrainableLinear(source, 32, 1.0, torch.zeros(64, dtype=torch.int8))
    step_NK = linear.unit_NG.repeat_interleave(32, dim=1)
    # As compensation may leave it: in the next bin of 2 bits.
    linear.value.data[3, 5] += 1.0
    low_NK, high_NK = (limit * step_NK for limit in linear.limits(kept))
    away_NK = torch.maximum(source.weight - low_NK, high_NK - source.weight) / step_NK
    near_NK = away_NK < 0.2001
    assert (low_NK <= high_NK).all()
    assert near_NK.all() if not kept else near_NK.sum() == near_NK.numel() - 1
    assert near_NK[3, 5] == (kept == 0)


def test_rates_that_are_too_high_leave_high_widths_near_the_model(tiny_model: Path) -> None:
    result = _calibrate(tiny_model, weight_rate=0.3)
    # Weights that go where they are driven lose three times as much.
    assert result.loss_after[8] < 0.5 * result.loss_before[4]
