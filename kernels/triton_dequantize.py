"""A weight in 16 bits from the run-time layout, for products with many tokens.

One program makes the weights of a few rows and 256 inputs: it reads a word per row, slice and 32
inputs, puts digits together to the first bits of each code, and writes

    gain * s * (((code >> (8 - bits)) + 1/2) * 2^(2 - bits) - z) * power

as `ElasticLinear.weight` does, in float32. What it writes is used at once and thrown away: memory
is for codes.

Legend: N out_features, N' N padded, K in_features, B blocks of 256 inputs, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, Digits, chunk_at
from mbq.kernels.triton_tiles import INTERPRETED, halves, high_bits_of, second_digits
from mbq.kernels.widths import WIDTHS, slices_of

_ROWS = 32
_WARPS = 4

_chunk_at = triton.constexpr_function(chunk_at)


@triton.jit
def _digit_words(
    block_ptr, n, plane_words, late, BITS: tl.constexpr, SLICES: tl.constexpr, ASM: tl.constexpr
):
    """Words of digits of rows n in a block of inputs, a slice each; those not needed repeat."""
    j = tl.arange(0, 32)
    # In the two planes of a slice, and in one where each word serves two inputs.
    narrow = n[:, None] * 16 + (j % 16)[None, :]
    wide = narrow + (j // 16 * plane_words)[None, :]
    slice_words = 2 * plane_words.to(tl.int64)
    first = tl.load(block_ptr + wide)
    second = first
    if SLICES > 1:
        high = tl.load(block_ptr + slice_words + narrow)
        low = tl.full(high.shape, 0, tl.int16)
        if BITS > 3:
            low = tl.load(block_ptr + slice_words + plane_words + narrow)
        second = second_digits(high, low, late, high_bits_of(high), ASM)
    third = tl.load(block_ptr + 2 * slice_words + wide) if SLICES > 2 else first
    fourth = tl.load(block_ptr + 3 * slice_words + wide) if SLICES > 3 else first
    return first, second, third, fourth


@triton.jit
def _dequantize_kernel(
    digits_ptr, power_ptr, scale_zero_ptr, gain_bias_ptr, out_ptr,
    out_features, in_features, plane_stride, block_stride, group_stride, gain_stride,
    BITS: tl.constexpr, SLICES: tl.constexpr, GAIN_ROW: tl.constexpr, BLOCK_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, 32)
    block_ptr = digits_ptr + block.to(tl.int64) * block_stride
    late = (j // 16).to(tl.int16)[None, :]
    # Loaded before anything is stored: the compiler cannot know that the two do not overlap.
    first, second, third, fourth = _digit_words(block_ptr, n, plane_stride, late, BITS, SLICES, ASM)
    gain, _ = halves(tl.load(gain_bias_ptr + GAIN_ROW * gain_stride + n))
    for p in tl.static_range(8):
        at = 2 * p
        code = (first >> at) & 3
        if SLICES > 1:
            code = (code << 2) | ((second >> at) & 3)
        if SLICES > 2:
            code = (code << 2) | ((third >> at) & 3)
        if SLICES > 3:
            code = (code << 2) | ((fourth >> at) & 3)
        code = code >> (2 * SLICES - BITS)
        group = block * BLOCK_GROUPS + _chunk_at(p) * BLOCK_GROUPS // 8
        s, z = halves(tl.load(scale_zero_ptr + group * group_stride + n))
        # A multiplication, an addition and another multiplication for each weight.
        unit = s * gain * (4.0 / (1 << BITS))
        start = s * gain * (2.0 / (1 << BITS) - z)
        k = block * 256 + _chunk_at(p) * 32 + j
        power = tl.load(power_ptr + k)
        weight = (code.to(tl.float32) * unit[:, None] + start[:, None]) * power[None, :]
        tl.store(
            out_ptr + n[:, None].to(tl.int64) * in_features + k[None, :],
            weight.to(out_ptr.dtype.element_ty),
            mask=(n[:, None] < out_features) & (k[None, :] < in_features),
        )


def dequantize_digits(weight: Digits, bits: int, dtype: torch.dtype) -> Tensor:
    """One linear's weight [N, K] at a width, gain and powers of two included.

    Of `dtype`, 16 or 32 bits wide.

    The linear may be a part of those joined.
    """
    *_, blocks, rows, _ = weight.digits_SHBN16.shape
    out_features = weight.out_features[0]
    out = weight.digits_SHBN16.new_empty(out_features, weight.in_features, dtype=dtype)
    _dequantize_kernel[(blocks, rows // _ROWS)](
        weight.digits_SHBN16, weight.power_K, weight.scale_zero_GN, weight.gain_bias_WN, out,
        out_features, weight.in_features, *weight.digits_SHBN16.stride()[1:3],
        weight.scale_zero_GN.stride(0), weight.gain_bias_WN.stride(0),
        BITS=bits, SLICES=slices_of(bits), GAIN_ROW=WIDTHS.index(bits),
        BLOCK_GROUPS=BLOCK_INPUTS // weight.group_size, ROWS=_ROWS, ASM=not INTERPRETED,
        num_warps=_WARPS,
    )  # fmt: skip
    return out
