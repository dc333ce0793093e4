"""The slice ladder against values worked out by hand and against its recursive definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    powers_of_two,
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.reference import round_to_nearest, slice_recursively
from mbq.kernels.widths import WIDTHS, around, slices_of, steps_up_to, widths_up_to


def _grid(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return scale_and_zero(*group_bounds(weight, group_size))


def test_known_codes() -> None:
    # Range [-2, 2]: scale 1, zero 2. 0.3 lies at 2.3 bins = 147.2 / 64: code 147 = 0b10_01_00_11.
    weight = torch.tensor([[-2.0, 0.3, 0.0, 2.0]])
    scale, zero = _grid(weight, 4)
    assert (scale.item(), zero.item()) == (1.0, 2.0)
    code = quantize(weight, scale, zero)
    assert code.tolist() == [[0, 147, 128, 255]]
    assert dequantize(code, scale, zero, 2).tolist() == [[-1.5, 0.5, 0.5, 1.5]]
    assert dequantize(code, scale, zero, 3).tolist() == [[-1.75, 0.25, 0.25, 1.75]]
    assert dequantize(code, scale, zero, 4).tolist() == [[-1.875, 0.375, 0.125, 1.875]]
    assert dequantize(code, scale, zero, 8)[0, 1].item() == (147 + 0.5) / 64 - 2


def test_known_values_at_three_bits() -> None:
    # Range [-1, 3]: scale 1, zero 1. Bins of half a scale, from -1 on; shown are their middles.
    weight = torch.tensor([[-1.0, -0.51, -0.5, 0.0, 0.49, 0.74, 1.3, 2.0, 2.6, 3.0]])
    scale, zero = _grid(weight, 10)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    shown = dequantize(quantize(weight, scale, zero), scale, zero, 3)
    assert shown.tolist() == [[-0.75, -0.75, -0.25, 0.25, 0.25, 0.75, 1.25, 2.25, 2.75, 2.75]]


def test_known_widths() -> None:
    assert widths_up_to(8) == (2, 3, 4, 6, 8)
    assert widths_up_to(4) == (2, 3, 4)
    assert widths_up_to(2) == (2,)
    assert [slices_of(bits) for bits in WIDTHS] == [1, 2, 2, 3, 4]
    assert steps_up_to(8) == (1, 1, 2, 2)
    assert steps_up_to(6) == (1, 1, 2)
    assert steps_up_to(2) == ()
    assert [around(bits) for bits in (2, 2.01, 3, 5.9)] == [(2, 2), (2, 3), (3, 3), (4, 6)]


@pytest.mark.parametrize("shape", [(1, 32, 32), (7, 96, 32), (5, 384, 128), (3, 640, 64)])
@pytest.mark.parametrize("clip", [1.0, 0.7])
def test_equals_the_recursive_definition_code_for_code(
    shape: tuple[int, int, int], clip: float
) -> None:
    rows, columns, group_size = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    low, high = group_bounds(weight, group_size)
    scale, zero = scale_and_zero(clip * low, clip * high)
    # float64, so that both sides compute the same position of a weight in its group's range.
    code = quantize_in_double(weight, scale, zero)
    digits, weights = slice_recursively(weight, scale, zero)
    for k in range(1, 5):
        digit = (code >> (8 - 2 * k)) & 3
        assert torch.equal(digit, digits[k - 1])
        torch.testing.assert_close(
            dequantize(code, scale, zero, 2 * k).double(), weights[k - 1], rtol=1e-5, atol=1e-6
        )
    # Half of the second slice: the upper of its two bits.
    assert torch.equal(code >> 5, 2 * digits[0] + (digits[1] >> 1))
    # float32 may put a weight that lies on the edge of a bin into its neighbour, never further.
    difference = (quantize(weight, scale, zero).int() - code.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


def quantize_in_double(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> torch.Tensor:
    group_size = weight.shape[1] // scale.shape[1]
    scale = scale.double().repeat_interleave(group_size, 1)
    zero = zero.double().repeat_interleave(group_size, 1)
    return ((weight.double() / scale + zero) * 64).floor().clamp(0, 255).to(torch.uint8)


@given(
    npst.arrays("float32", (3, 64), elements=st.floats(-8, 8, width=32, allow_subnormal=False)),
)
def test_error_is_at_most_half_a_step_of_every_width(array: object) -> None:
    weight = torch.tensor(array)
    scale, zero = _grid(weight, 32)
    code = quantize(weight, scale, zero)
    step = scale.repeat_interleave(32, 1)
    for bits in WIDTHS:
        error = (dequantize(code, scale, zero, bits) - weight).abs()
        half_a_step = step * 2.0 ** (2 - bits) / 2
        # Rounding scale and zero to float16 moves the ends of the range a little.
        assert (error <= half_a_step + step * 5e-3).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("group_size", [32, 96])
def test_every_width_is_nearer_than_the_one_below(seed: int, group_size: int) -> None:
    weight = torch.randn(3, 480, generator=torch.Generator().manual_seed(seed))
    scale, zero = _grid(weight, group_size)
    code = quantize(weight, scale, zero)
    shown = [dequantize(code, scale, zero, bits) for bits in WIDTHS]
    errors = [((w - weight).square().mean()).item() for w in shown]
    assert errors == sorted(errors, reverse=True)
    # From 2 to 3 bits and from there to 4 the error halves, so its square is a quarter.
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_lower_bits_do_not_matter_for_fewer_bits(bits: int) -> None:
    weight = torch.randn(4, 64)
    scale, zero = _grid(weight, 32)
    code = quantize(weight, scale, zero)
    cut = code & ~((1 << (8 - bits)) - 1) & 0xFF
    assert torch.equal(dequantize(cut, scale, zero, bits), dequantize(code, scale, zero, bits))


def test_group_of_zeros_stays_near_zero() -> None:
    weight = torch.zeros(2, 32)
    scale, zero = _grid(weight, 32)
    assert dequantize(quantize(weight, scale, zero), scale, zero, 8).abs().max() < 1e-6


def test_pairs_keep_float16_values_exactly() -> None:
    first = torch.tensor([[1.0, -65504.0, 6.1e-5]]).half().float()
    second = torch.tensor([[0.5, 3.999, -0.0]]).half().float()
    pair = pack_pair(first, second)
    assert pair.dtype == torch.int32
    assert pair.shape == (1, 3)
    assert pair[0, 0].item() == 0x3800_3C00  # 0.5 in the high half, 1.0 in the low half
    back = unpack_pair(pair)
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)


def test_round_to_nearest_known_values() -> None:
    # Range [-1, 2] at 2 bits: step 1, zero 1.
    weight = torch.tensor([[-1.0, -0.4, 0.6, 2.0]])
    assert round_to_nearest(weight, 2, 4).tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    torch.testing.assert_close(round_to_nearest(weight, 8, 4), weight, atol=3 / 255 / 2, rtol=0)


def test_powers_of_two_are_exact() -> None:
    exponent_K = torch.tensor([-126, -3, 0, 1, 127], dtype=torch.int8)
    assert powers_of_two(exponent_K).tolist() == [2.0**-126, 0.125, 1.0, 2.0, 2.0**127]
