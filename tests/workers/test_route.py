"""Routers on inputs whose true benefits are known."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mbq.artifacts.spec import Routing
from mbq.kernels.router import features
from mbq.kernels.widths import WIDTHS
from mbq.workers.model import BlockRunner
from mbq.workers.route import (
    FittedInput,
    fit_input,
    fit_knots,
    fit_routers,
    isotonic,
    norm_head,
    rank_knots,
)
from mbq.workers.trainable import CalibratedLinear

K, LINEARS, EXTRA = 32, 2, 4


def _tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of very different norms, whose benefit also depends on one direction per linear."""
    generator = torch.Generator().manual_seed(seed)
    x_TK = torch.randn(count, K, generator=generator)
    x_TK = x_TK * torch.randn(count, 1, generator=generator).exp()
    direction_LK = torch.nn.functional.one_hot(torch.tensor([3, 20]), K).float()
    along_LT = (x_TK @ direction_LK.T).square().T + 0.02 * x_TK.square().mean(1)
    scale_E = torch.tensor([1.0, 1 / 4, 1 / 16, 1 / 256])
    return x_TK, scale_E[:, None, None] * along_LT


def _retained(score_T: Tensor, benefit_T: Tensor, share: float = 0.2) -> float:
    """Share of all benefit that the highest scored tokens have."""
    best = score_T.topk(int(share * len(score_T))).indices
    return float(benefit_T[best].sum() / benefit_T.sum())


def _scores(fitted: FittedInput, x_TK: Tensor) -> Tensor:
    trunk = fitted.learned
    feature_TF = features(x_TK, trunk.trunk_HK, trunk.offset_H)
    return torch.einsum("elf,tf->elt", trunk.head_ELF, feature_TF)


# How far from the norm towards the best possible choice; gates learn more slowly.
@pytest.mark.parametrize(("method", "steps", "way"), [("token", 400, 0.3), ("gates", 800, 0.3)])
def test_a_learned_router_finds_what_the_norm_cannot_see(
    method: str, steps: int, way: float
) -> None:
    x_TK, benefit_ELT = _tokens(3000)
    settings = Routing.model_validate({"method": method, "steps": steps})
    fitted = fit_input(x_TK, benefit_ELT, settings, torch.Generator().manual_seed(0))
    fresh_TK, fresh_ELT = _tokens(2000, seed=1)
    score_ELT = _scores(fitted, fresh_TK)
    norm_T = fresh_TK.norm(dim=1)
    for extra, linear in itertools.product(range(EXTRA), range(LINEARS)):
        benefit_T = fresh_ELT[extra, linear]
        learned = _retained(score_ELT[extra, linear], benefit_T)
        possible = _retained(benefit_T, benefit_T)
        norm = _retained(norm_T, benefit_T)
        assert learned > norm + way * (possible - norm)


def test_the_target_method_brings_every_linear_to_the_asked_width() -> None:
    x_TK, benefit_ELT = _tokens(2000)
    settings = Routing(method="target", target_bits=3.0, steps=1000)
    fitted = fit_input(x_TK, benefit_ELT, settings, torch.Generator().manual_seed(0))
    gates_ELT = (_scores(fitted, x_TK) > 0).float().cumprod(0)
    bits_L = 2 + torch.tensor([1.0, 1.0, 2.0, 2.0]) @ gates_ELT.mean(2)
    assert bits_L.tolist() == pytest.approx([3.0, 3.0], abs=0.4)
    # One value for both linears means one width for both.
    knots = fitted.knots["target"]
    torch.testing.assert_close(knots[:, 0, 1], knots[:, 1, 1])
    assert knots[:, :, 1, 0].flatten().tolist() == [-1.0] * 8


def test_the_same_seed_fits_the_same_router() -> None:
    x_TK, benefit_ELT = _tokens(300)
    fits = [
        fit_input(x_TK, benefit_ELT, Routing(steps=5), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(fits[0].learned.trunk_HK, fits[1].learned.trunk_HK)
    assert torch.equal(fits[0].knots["token"], fits[1].knots["token"])
    assert not torch.equal(fits[0].learned.trunk_HK, fits[2].learned.trunk_HK)


def test_a_trunk_is_fitted_as_it_will_be_stored() -> None:
    x_TK, benefit_ELT = _tokens(300)
    fitted = fit_input(x_TK, benefit_ELT, Routing(steps=5), torch.Generator().manual_seed(0))
    assert torch.equal(fitted.learned.trunk_HK, fitted.learned.trunk_HK.half().float())


def test_knots_are_bin_means_that_never_fall() -> None:
    score = torch.tensor([[[3.0, 1.0, 2.0, 4.0]]])
    benefit = torch.tensor([[[8.0, 1.0, 3.0, 2.0]]])
    # In order of the score the benefits are 1, 3 | 8, 2.
    assert fit_knots(score, benefit, 2).exp()[0, 0, 1].tolist() == pytest.approx([2, 5], rel=0.05)
    assert fit_knots(score, benefit, 2)[0, 0, 0].tolist() == [1.5, 3.5]
    # One by one, 8 and 2 are pooled.
    single = fit_knots(score, benefit, 4)[0, 0, 1].exp().tolist()
    assert single == pytest.approx([1, 3, 5, 5], rel=0.05)
    assert single[3] > single[2]
    # More knots than tokens: the last one is repeated.
    padded = fit_knots(score, benefit, 6)[0, 0]
    assert padded.shape == (2, 6)
    assert torch.equal(padded[:, 3:], padded[:, 3:4].expand(2, 3))


def test_knots_exist_where_steps_hurt() -> None:
    score = torch.arange(8.0).expand(1, 1, 8)
    for benefit in (torch.zeros(1, 1, 8), -torch.ones(1, 1, 8)):
        assert torch.isfinite(fit_knots(score, benefit, 4)).all()


def test_ranks_are_minus_the_share_that_takes_a_step() -> None:
    score = torch.stack((torch.arange(100.0), torch.arange(100.0) ** 2)).expand(3, 2, 100)
    knots = rank_knots(score, 3)
    assert knots.shape == (3, 2, 2, 3)
    # Whatever the scores are: all tokens at the lowest, half at the median, one at the highest.
    assert knots[:, :, 1].flatten(0, 1).tolist() == [pytest.approx([-1.0, -0.5, -0.01])] * 6
    assert knots[0, 0, 0].tolist() == [0.0, 49.5, 99.0]
    # One of two tokens scores high for the second step only.
    score = torch.tensor([[[5.0, 5.0]], [[5.0, 1.0]]])
    assert rank_knots(score, 3)[:, 0, 1].tolist() == [[-1.0, -1.0, -1.0], [-1.0, -0.5, -0.5]]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30))
def test_isotonic_rises_and_keeps_the_mean(values: list[float]) -> None:
    found = isotonic(values)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values), abs=1e-6)
    assert isotonic(sorted(values)) == pytest.approx(sorted(values))


def test_isotonic_of_known_values() -> None:
    assert isotonic([3.0, 1.0, 2.0, 6.0, 4.0, 7.0]) == pytest.approx([2, 2, 2, 5, 5, 7])


class _Block(nn.Module):
    """Two linears that read the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(K, 5, bias=False), nn.Linear(K, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.one(x), self.two(x)), -1)


def test_benefits_are_what_each_step_removes_of_the_error_per_bit() -> None:
    from mbq.kernels.quantize import (
        dequantize,
        group_bounds,
        pack_pair,
        quantize,
        scale_and_zero,
    )

    block = _Block().requires_grad_(False)
    calibrated = {}
    for name, linear in (("one", block.one), ("two", block.two)):
        scale, zero = scale_and_zero(*group_bounds(linear.weight, 32))
        code = quantize(linear.weight, scale, zero)
        unscaled_K = torch.zeros(linear.in_features, dtype=torch.int8)
        ones = torch.ones(len(WIDTHS), linear.out_features)
        gain_bias = pack_pair(ones, 0 * ones)
        calibrated[name] = CalibratedLinear(code, unscaled_K, pack_pair(scale, zero), gain_bias)
    hidden = torch.randn(4, 6, K)
    importance = {"one": 0.1 + torch.rand(5), "two": 0.1 + torch.rand(7)}
    found = fit_routers(
        BlockRunner(block, lambda module, x: module(x), 3),
        {"both_router": ("one", "two")},
        calibrated,
        importance,
        hidden,
        Routing(steps=1, tokens=64),
        max_bits=6,
        seed=0,
    )
    # Without scores, the map holds the mean benefit per bit of the tokens that were held out: a
    # quarter.
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:6]
    x = hidden.view(24, K)[order]
    log_means = found["both_router"].knots["linear"][:, :, 1, 0]
    for number, linear in enumerate((block.one, block.two)):
        name = ("one", "two")[number]
        scale, zero = scale_and_zero(*group_bounds(linear.weight, 32))
        weights = [dequantize(calibrated[name].code_NK, scale, zero, b) for b in (2, 3, 4, 6)]
        offs = [((w - linear.weight) @ x.T).square() for w in weights]
        errors = [(importance[name] @ off).mean() for off in offs]
        expected = [errors[0] - errors[1], errors[1] - errors[2], (errors[2] - errors[3]) / 2]
        assert log_means[:, number].exp().tolist() == pytest.approx(
            [value.item() for value in expected], rel=1e-3
        )


def test_the_norm_head_is_the_log_mean_square() -> None:
    x_TK = torch.randn(5, K)
    feature_TF = features(x_TK, torch.zeros(0, K), torch.zeros(0))
    score_ELT = torch.einsum("elf,tf->elt", norm_head(2, 3), feature_TF)
    torch.testing.assert_close(score_ELT[1, 2], x_TK.square().mean(1).log())
