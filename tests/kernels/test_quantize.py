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
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.reference import round_to_nearest, slice_recursively


def _grid(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return scale_and_zero(*group_bounds(weight, group_size))


def test_known_codes() -> None:
    # Range [-2, 2]: scale 1, zero 2. 0.3 lies at 2.3 bins = 147.2 / 64: code 147 = 0b10_01_00_11.
    weight = torch.tensor([[-2.0, 0.3, 0.0, 2.0]])
    scale, zero = _grid(weight, 4)
    assert (scale.item(), zero.item()) == (1.0, 2.0)
    code = quantize(weight, scale, zero)
    assert code.tolist() == [[0, 147, 128, 255]]
    assert dequantize(code, scale, zero, 1).tolist() == [[-1.5, 0.5, 0.5, 1.5]]
    assert dequantize(code, scale, zero, 2).tolist() == [[-1.875, 0.375, 0.125, 1.875]]
    assert dequantize(code, scale, zero, 4)[0, 1].item() == (147 + 0.5) / 64 - 2


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
            dequantize(code, scale, zero, k).double(), weights[k - 1], rtol=1e-5, atol=1e-6
        )
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
    for k in range(1, 5):
        error = (dequantize(code, scale, zero, k) - weight).abs()
        half_a_step = step * 4.0 ** (1 - k) / 2
        # Rounding scale and zero to float16 moves the ends of the range a little.
        assert (error <= half_a_step + step * 5e-3).all()


def test_lower_bits_do_not_matter_for_fewer_slices() -> None:
    weight = torch.randn(4, 64)
    scale, zero = _grid(weight, 32)
    code = quantize(weight, scale, zero)
    for k in range(1, 4):
        cut = code & ~((1 << (8 - 2 * k)) - 1) & 0xFF
        assert torch.equal(dequantize(cut, scale, zero, k), dequantize(code, scale, zero, k))


def test_group_of_zeros_stays_near_zero() -> None:
    weight = torch.zeros(2, 32)
    scale, zero = _grid(weight, 32)
    assert dequantize(quantize(weight, scale, zero), scale, zero, 4).abs().max() < 1e-6


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
