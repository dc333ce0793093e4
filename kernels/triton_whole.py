"""Dozens of tokens times quantized weights of one width that the host knows.

`triton_decode.py` multiplies by each slice in turn; from a dozen tokens on, these products cost
more than the bits that they save. Here the slices of a weight are put together first,

    (sum_e ((word_e << or >> shift_e) & mask_e)) | magic   =   2^b + q

with q the first b bits of the code, at the top of the mantissa: one product for a weight, whatever
its width. The weight is s 2^(2-b) (q + 1/2 - 2^(b-2) z); what is added to q is taken off by sums of
the tokens, per group.

Legend: N' N padded, B blocks of 256 inputs, G groups, T tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, Digits
from mbq.kernels.triton_prepare import Prepared
from mbq.kernels.triton_tiles import INTERPRETED, Tile, finish, halves, outputs, scratch
from mbq.kernels.widths import WIDTHS, slices_of

# Triton runs these at compile time; it reads them, too, hence their plainness.


@triton.constexpr_function
def magic(bits: int) -> int:
    """float16's bits of 2^bits: its exponent is biased by 15 and lies above 10 bits."""
    return (15 + bits) << 10


@triton.constexpr_function
def left(i: int, e: int) -> int:
    """How far the word of slice e is moved to bring position i to where slice e is in a code."""
    return 8 - 2 * e - 2 * i


@triton.constexpr_function
def mask(e: int, bits: int) -> int:
    """The bits of slice e in a code; half of the second slice, at 3 bits, has its high one only."""
    return (3 if bits >= 2 * e + 2 else 2) << (8 - 2 * e)


@triton.constexpr_function
def assembly(i: int, bits: int) -> str:
    """PTX that makes position i of two words of each slice ($1, $2 ...) whole codes."""
    body = "{ .reg .b32 t, s; mov.b32 t, " + hex(magic(bits) * 0x10001) + "; "
    for e in range((bits + 1) // 2):
        by = left(i, e)
        move = "shl.b32" if by >= 0 else "shr.u32"
        body += move + " s, $" + str(e + 1) + ", " + str(abs(by)) + "; "
        body += "lop3.b32 t, s, " + hex(mask(e, bits) * 0x10001) + ", t, 0xEA; "
    return body + "mov.b32 $0, t; }"


@triton.constexpr_function
def constraints(bits: int) -> str:
    """One register out, one in for each slice."""
    return "=r" + ",r" * ((bits + 1) // 2)


@triton.jit
def _put(code, word, i: tl.constexpr, e: tl.constexpr, BITS: tl.constexpr):
    """A code with the bits of slice e, for the interpreter."""
    by: tl.constexpr = left(i, e)
    wide = word.to(tl.int32) & 0xFFFF
    return code | (((wide << by) if by >= 0 else (wide >> -by)) & mask(e, BITS))


@triton.jit
def _codes(
    first, second, third, fourth, i: tl.constexpr,
    BITS: tl.constexpr, SLICES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes at position i of int16 words, as float16: their value plus 2^BITS."""
    if ASM:
        body: tl.constexpr = assembly(i, BITS)
        if SLICES == 1:
            words = [first]
        elif SLICES == 2:
            words = [first, second]
        elif SLICES == 3:
            words = [first, second, third]
        else:
            words = [first, second, third, fourth]
        made = tl.inline_asm_elementwise(
            body, constraints(BITS), words, dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        code = tl.full(first.shape, magic(BITS), tl.int32)
        code = _put(code, first, i, 0, BITS)
        if SLICES > 1:
            code = _put(code, second, i, 1, BITS)
        if SLICES > 2:
            code = _put(code, third, i, 2, BITS)
        if SLICES > 3:
            code = _put(code, fourth, i, 3, BITS)
        made = code.to(tl.int16).to(tl.float16, bitcast=True)
    return made


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens"])
def _whole_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, unscale_ptr,
    part_ptr, arrived_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr, SLICES: tl.constexpr, GAIN_ROW: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, 32)
    GROUP_CHUNKS: tl.constexpr = 8 // BLOCK_GROUPS
    # Bins of this width in one of 2 bits.
    FINER: tl.constexpr = (1 << BITS) // 4
    inputs = blocks * 256
    slice_words = blocks.to(tl.int64) * rows * 32
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    turns = (blocks - part + SPLIT - 1) // SPLIT
    for turn in tl.range(0, turns, num_stages=STAGES):
        block = part + SPLIT * turn
        word_ptr = digits_ptr + (block.to(tl.int64) * rows + n[:, None]) * 32 + j[None, :]
        first = tl.load(word_ptr)
        second = tl.load(word_ptr + slice_words) if SLICES > 1 else first
        third = tl.load(word_ptr + 2 * slice_words) if SLICES > 2 else first
        fourth = tl.load(word_ptr + 3 * slice_words) if SLICES > 3 else first
        x_at = x_ptr + t[None, :] * inputs + block * 256 + j[:, None]
        for h in tl.static_range(BLOCK_GROUPS):
            group = block * BLOCK_GROUPS + h
            s, z = halves(tl.load(scale_zero_ptr + group * rows + n))
            sums = tl.load(sum_ptr + group * padded_tokens + t)
            acc = (0.5 - (1 << BITS) - FINER * z)[:, None] * sums[None, :]
            for c in tl.static_range(GROUP_CHUNKS):
                x = tl.load(x_at + (h * GROUP_CHUNKS + c) * 32)
                codes = _codes(
                    first, second, third, fourth, h * GROUP_CHUNKS + c, BITS, SLICES, ASM
                )
                acc = tl.dot(codes, x, acc)
            total += (s * (1.0 / FINER))[:, None] * acc
    finish(
        total, gain_bias_ptr + GAIN_ROW * rows, unscale_ptr, part_ptr, arrived_ptr, out_ptr,
        rows, padded_tokens, tokens, ROWS, TOKENS, SPLIT,
    )  # fmt: skip


def multiply_whole(
    prepared: Prepared, bits: int, weight: Digits, tile: Tile, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Each token times every linear's weight of `bits` bits, with gain and bias.

    Returns [T, N] for each linear, side by side in one tensor.
    """
    _, blocks, rows, _ = weight.digits_SBN32.shape
    padded_tokens = len(prepared.x_TK)
    width = whole_token_tile(prepared.tokens)
    out = weight.digits_SBN32.new_empty(prepared.tokens, rows, dtype=dtype)
    grid = (rows // tile.rows, tile.split, padded_tokens // width)
    _whole_kernel[grid](
        prepared.x_TK, weight.digits_SBN32, weight.scale_zero_GN, weight.gain_bias_WN,
        prepared.sum_GT, prepared.unscale_T, *scratch(grid, padded_tokens, out), out,
        rows, blocks, padded_tokens, prepared.tokens,
        ROWS=tile.rows, TOKENS=width, SPLIT=tile.split, STAGES=tile.stages,
        BLOCK_GROUPS=BLOCK_INPUTS // weight.group_size, BITS=bits, SLICES=slices_of(bits),
        GAIN_ROW=WIDTHS.index(bits), ASM=not INTERPRETED, num_warps=tile.warps,
    )  # fmt: skip
    return outputs(out, weight)


def whole_token_tile(tokens: int) -> int:
    """Tokens of a program: all of them, as codes are made anew for each program."""
    return max(1 << (tokens - 1).bit_length(), 8)
