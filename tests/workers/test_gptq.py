"""Error compensation: it follows its definition, keeps what it must, and pays at every width."""

import pytest
import torch
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.kernels.quantize import dequantize, group_bounds, quantize, scale_and_zero
from mbq.kernels.widths import WIDTHS
from mbq.workers.gptq import factor, gram_matrices, round_compensated

GROUP = 16


def _case(rows: int = 5, inputs: int = 48) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, scales, zeros and tokens whose inputs are correlated."""
    generator = torch.Generator().manual_seed(7)
    weight_NK = torch.randn(rows, inputs, generator=generator)
    mixing_KK = torch.eye(inputs) + 0.5 * torch.randn(inputs, inputs, generator=generator)
    x_TK = torch.randn(400, inputs, generator=generator) @ mixing_KK
    scale_NG, zero_NG = scale_and_zero(*group_bounds(weight_NK, GROUP))
    return weight_NK, scale_NG, zero_NG, x_TK


def _by_definition(
    weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, factors: dict[int, Tensor]
) -> Tensor:
    """Codes of 4 bits, one weight at a time, all later inputs updated at once."""
    codes_NK = torch.zeros(weight_NK.shape, dtype=torch.int64)
    for row, weight_K in enumerate(weight_NK):
        targets = {bits: weight_K.clone() for bits in factors}
        for j in range(len(weight_K)):
            scale, zero = scale_NG[row, j // GROUP], zero_NG[row, j // GROUP]
            levels = {
                bits: scale * (((torch.arange(16) >> (4 - bits)) + 0.5) * 2.0 ** (2 - bits) - zero)
                for bits in factors
            }
            cost = sum(
                2.0 ** (bits - 2) * ((targets[bits][j] - levels[bits]) / scale) ** 2
                for bits in factors
            )
            # The source weight lies within an eighth of a bin of its own code's middle.
            away = (weight_K[j] - levels[4]).abs() / scale - 1 / 8
            cost = cost + 4.0 * away.clamp(min=0.0) ** 2
            code = int(torch.as_tensor(cost).argmin())
            codes_NK[row, j] = code
            for bits, factor_KK in factors.items():
                error = (targets[bits][j] - levels[bits][code]) / factor_KK[j, j]
                targets[bits][j + 1 :] -= error * factor_KK[j, j + 1 :]
    return codes_NK


def _errors(x_TK: Tensor, weight_NK: Tensor, code_NK: Tensor, *grid: Tensor) -> dict[int, float]:
    """Squared output error by width."""
    return {
        bits: (x_TK @ (weight_NK - dequantize(code_NK, *grid, bits)).T).square().sum().item()
        for bits in WIDTHS
    }


def _factor(x_TK: Tensor) -> Tensor:
    return factor(x_TK.T @ x_TK, torch.ones(x_TK.shape[1]), len(x_TK))


@pytest.mark.parametrize("widths", [(2, 4), (2, 3, 4)])
def test_follows_its_definition(widths: tuple[int, ...]) -> None:
    weight_NK, scale_NG, zero_NG, x_TK = _case()
    # Every width has inputs of its own: those of fewer tokens the lower it is.
    factors = {bits: _factor(x_TK[: 100 * bits]) for bits in widths}
    rounded_NK = round_compensated(weight_NK, scale_NG, zero_NG, factors)
    codes_NK = quantize(rounded_NK, scale_NG, zero_NG) >> 4
    assert torch.equal(codes_NK.long(), _by_definition(weight_NK, scale_NG, zero_NG, factors))


def test_what_is_uncorrelated_is_rounded_to_the_nearest() -> None:
    weight_NK, scale_NG, zero_NG, _ = _case()
    identity = factor(torch.eye(48), torch.ones(48), 400)
    for bits in (2, 3, 4, 8):
        rounded_NK = round_compensated(weight_NK, scale_NG, zero_NG, {bits: identity})
        dropped = 8 - bits
        expected_NK = quantize(weight_NK, scale_NG, zero_NG) >> dropped
        assert torch.equal(quantize(rounded_NK, scale_NG, zero_NG) >> dropped, expected_NK)


@pytest.mark.parametrize(("widths", "left"), [((2, 4), 0.8), ((2, 3, 4), 0.85)])
def test_pays_at_every_width_it_is_for(widths: tuple[int, ...], left: float) -> None:
    weight_NK, scale_NG, zero_NG, x_TK = _case(rows=64)
    grid = scale_NG, zero_NG
    shared = _factor(x_TK)
    plain = _errors(x_TK, weight_NK, quantize(weight_NK, *grid), *grid)
    first_NK = quantize(round_compensated(weight_NK, *grid, dict.fromkeys(widths, shared)), *grid)
    rounded_NK = round_compensated(weight_NK, *grid, {6: shared, 8: shared}, first_NK, 4)
    code_NK = quantize(rounded_NK, *grid)
    assert torch.equal(code_NK >> 4, first_NK >> 4)
    found = _errors(x_TK, weight_NK, code_NK, *grid)
    assert found[2] < 0.8 * plain[2]
    assert all(found[bits] < plain[bits] for bits in widths)
    # Digits below those that were kept make up for what keeping them cost.
    nearest_NK = quantize(weight_NK, *grid).clamp((first_NK >> 4) << 4, ((first_NK >> 4) << 4) + 15)
    nearest = _errors(x_TK, weight_NK, nearest_NK, *grid)
    assert found[6] < left * nearest[6]
    assert found[8] < left * nearest[8]


@pytest.mark.parametrize("kept", [2, 3])
def test_odd_numbers_of_bits_are_kept_too(kept: int) -> None:
    weight_NK, scale_NG, zero_NG, x_TK = _case()
    grid = scale_NG, zero_NG
    shared = _factor(x_TK)
    first_NK = quantize(round_compensated(weight_NK, *grid, {kept: shared}), *grid)
    more_NK = quantize(
        round_compensated(weight_NK, *grid, {kept + 1: shared}, first_NK, kept), *grid
    )
    assert torch.equal(more_NK >> (8 - kept), first_NK >> (8 - kept))
    assert (more_NK >> (7 - kept) != first_NK >> (7 - kept)).any()


@pytest.mark.parametrize("dead", ["one input", "all inputs"])
def test_inputs_that_are_always_zero_do_no_harm(dead: str) -> None:
    weight_NK, scale_NG, zero_NG, x_TK = _case()
    x_TK[:, slice(3, 4) if dead == "one input" else slice(None)] = 0.0
    rounded_NK = round_compensated(weight_NK, scale_NG, zero_NG, {2: _factor(x_TK)})
    assert rounded_NK.isfinite().all()
    same = (
        quantize(rounded_NK, scale_NG, zero_NG) >> 6 == quantize(weight_NK, scale_NG, zero_NG) >> 6
    )
    assert same.all() if dead == "all inputs" else same[:, 3].float().mean() > 0.5


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "look at the model's weights"), (torch.bfloat16, "use dtype float32")],
)
def test_inputs_that_are_not_finite_are_an_error(dtype: torch.dtype, remedy: str) -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    nn.init.constant_(block[0].weight, 1e30)
    with pytest.raises(NumericError, match=f"what enters 1 is not finite; {remedy}"):
        gram_matrices(block, lambda: block(torch.ones(1, 3, 2, dtype=dtype)))


def test_gram_matrices_are_of_what_enters_each_linear() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x_BTK = torch.randn(2, 5, 6)
    grams = gram_matrices(block, lambda: [block(part) for part in x_BTK.split(1)])
    inner = block[:2](x_BTK).flatten(0, 1)
    assert grams.keys() == {"0", "2"}
    torch.testing.assert_close(grams["0"], x_BTK.flatten(0, 1).T @ x_BTK.flatten(0, 1))
    torch.testing.assert_close(grams["2"], inner.T @ inner)
    assert not block[0]._forward_pre_hooks


def test_linears_of_one_input_share_its_gram_matrix() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.down(self.gate(x) * self.up(x))
            return out

    torch.manual_seed(0)
    block, x_BTK = Two(), torch.randn(4, 3, 6)
    grams = gram_matrices(block, lambda: [block(part) for part in x_BTK.split(1)])
    assert grams["gate"] is grams["up"]
    flat = x_BTK.flatten(0, 1)
    assert torch.allclose(grams["up"], flat.T @ flat, atol=1e-5)
    inner = (block.gate(flat) * block.up(flat)).detach()
    assert torch.allclose(grams["down"], inner.T @ inner, atol=1e-5)
