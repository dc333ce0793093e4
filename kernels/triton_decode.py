"""Few tokens times quantized weights, at widths that only the device knows.

One launch prepares the tokens for all linears that share them (`triton_prepare.py`), the next
multiplies by all of these. The weight of b bits is s * (sum_e q_e 4^-e + 2^(2-b) / 2 - z), e from
0. A digit becomes a float16 without any arithmetic: two bits in the mantissa of a power of two,

    ((word << or >> shift) & (3 << b)) | magic   =   2^(10 - b) + q

one instruction for two weights. Tensor cores sum digits and their biases; the biases are taken off
per group by sums of the tokens that are weighted with them. Slices are the inner loop and their
number is read from memory, so one kernel, captured once in a graph, serves whatever widths the
tokens turn out to have. What a token does not take of a slice that another needs is multiplied by
zero: what is read follows the hungriest token.

Where a token stops at 3 bits, the second slice takes two steps: its high bits, under the mask 2 in
place of 3, then its low bits, under the mask 1. A mask that changes from step to step lies in
registers. Only launches that may need this pay for it: those with widths unknown to the host, and
all tokens at 3 bits.

Blocks of inputs are split over programs. The last program of a tile to finish adds up all parts in
the order of their numbers, so results are the same from run to run.

Everything is judged by `reference.routed_linear`. Under Triton's interpreter the digits are made
without inline assembly.

Legend: N out_features, N' N padded, K in_features, B blocks of 256 inputs, G groups, T tokens,
L linears of one input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, MOST_LINEARS, Digits
from mbq.kernels.triton_prepare import Prepared, token_tile
from mbq.kernels.triton_tiles import INTERPRETED, Tile, finish, halves, outputs, scratch

# Bit at which each of a word's 8 digits lies after its shift; the bias of digit i is 2^(10 - bit).
DIGIT_BITS = (4, 6, 4, 6, 8, 4, 6, 8)


@triton.jit
def _row(bits):
    """Where a width stands in WIDTHS."""
    return tl.where(bits <= 4, bits - 2, bits // 2)


_KEEP = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xEA;")
_LEFT = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, $2, $3, 0xEA; }")
_RIGHT = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 6; lop3.b32 $0, t, $2, $3, 0xEA; }")


def assembly(i: int) -> str:
    """PTX that makes digit i of two words ($1) with mask $2 and magic $3."""
    body: str = (_LEFT if i < 2 else _KEEP if i < 5 else _RIGHT).value
    return body


@triton.jit
def _digit(word, i: tl.constexpr, selector, ASM: tl.constexpr):
    """Digit i of int16 words under a mask of 3, 2 or 1, as float16: its value plus 2^(10 - bit)."""
    bit: tl.constexpr = (
        4 if (i == 0 or i == 2 or i == 5) else (6 if (i == 1 or i == 3 or i == 6) else 8)
    )
    magic: tl.constexpr = (25 - bit) << 10
    # A choice of constants: a mask that is computed, and `elif` too, would keep the compiler from
    # bringing words, rather than digits, to the threads that need them.
    mask = tl.full(word.shape, 3 << bit, tl.int16)
    if selector == 2:
        mask = tl.full(word.shape, 2 << bit, tl.int16)
    if selector == 1:
        mask = tl.full(word.shape, 1 << bit, tl.int16)
    if ASM:
        body: tl.constexpr = _LEFT if i < 2 else (_KEEP if i < 5 else _RIGHT)
        g = tl.full(word.shape, magic, tl.int16)
        made = tl.inline_asm_elementwise(
            body, "=r,r,r,r", [word, mask, g], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        shifted = (word << 4) if i < 2 else (word if i < 5 else (word >> 6))
        made = ((shifted & mask) | magic).to(tl.int16).to(tl.float16, bitcast=True)
    return made


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _decode_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, steps_ptr, part_ptr, arrived_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, MIXED: tl.constexpr, HALVABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    steps_ptr += 2 * linear
    part = tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, 32)
    steps = tl.load(steps_ptr)
    if HALVABLE:
        halved = tl.load(steps_ptr + 1)
    bits = tl.load(bits_ptr + linear * padded_tokens + t)
    half_bin = 0.5 * tl.exp2((2 - bits).to(tl.float32))
    GROUP_CHUNKS: tl.constexpr = 8 // BLOCK_GROUPS
    inputs = blocks * 256
    slice_words = blocks.to(tl.int64) * rows * 32
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    turns = ((blocks - part + SPLIT - 1) // SPLIT) * steps
    for turn in tl.range(0, turns, num_stages=STAGES):
        step = turn % steps
        block = part + SPLIT * (turn // steps)
        if HALVABLE:
            # The step completes width w (where it stands in WIDTHS): 1 and 2 share a slice.
            w = step + tl.minimum(step, 1 - halved)
            e = tl.where(w < 2, w, w - 1)
            selector = tl.where((halved == 1) & (e == 1), 3 - w, 3)
        else:
            w = step
            e = step
            selector = 3
        word_at = e * slice_words + (block.to(tl.int64) * rows + n[:, None]) * 32 + j[None, :]
        word = tl.load(digits_ptr + word_at)
        weight_of_slice = tl.exp2((-2 * e).to(tl.float32))
        first = tl.where(e == 0, 1.0, 0.0)
        x_at = x_ptr + t[None, :] * inputs + block * 256 + j[:, None]
        for h in tl.static_range(BLOCK_GROUPS):
            group = block * BLOCK_GROUPS + h
            s, z = halves(tl.load(scale_zero_ptr + group * rows + n))
            sums = tl.load(sum_ptr + group * padded_tokens + t) * first
            biases = tl.load(bias_sum_ptr + group * padded_tokens + t)
            acc = (half_bin[None, :] - z[:, None]) * sums[None, :] - biases[None, :]
            for c in tl.static_range(GROUP_CHUNKS):
                x = tl.load(x_at + (h * GROUP_CHUNKS + c) * 32)
                acc = tl.dot(_digit(word, h * GROUP_CHUNKS + c, selector, ASM), x, acc)
            if MIXED:
                acc *= tl.where(_row(bits) >= w, 1.0, 0.0)[None, :]
            total += (s * weight_of_slice)[:, None] * acc

    gain_row = gain_bias_ptr + _row(bits)[None, :] * rows
    finish(
        total, gain_row, unscale_ptr, part_ptr, arrived_ptr, out_ptr,
        rows, padded_tokens, tokens, ROWS, TOKENS, SPLIT,
    )  # fmt: skip


def multiply(
    prepared: Prepared, weight: Digits, tile: Tile, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Each token times every linear's weight of its own width, with gain and bias.

    Returns [T, N] for each linear, side by side in one tensor.

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    _, blocks, rows, _ = weight.digits_SBN32.shape
    if any(start % tile.rows for start in weight.starts):
        raise ValueError(f"tiles of {tile.rows} rows do not divide linears of {weight.starts} rows")
    padded_tokens = prepared.x_TK.shape[0]
    width = token_tile(prepared.tokens)
    out = weight.digits_SBN32.new_empty(prepared.tokens, rows, dtype=dtype)
    grid = (rows // tile.rows, tile.split, padded_tokens // width)
    inner = [start // tile.rows for start in weight.starts[1:]] + [grid[0]] * MOST_LINEARS
    _decode_kernel[grid](
        prepared.x_TK, weight.digits_SBN32, weight.scale_zero_GN, weight.gain_bias_WN,
        prepared.sum_GT, prepared.bias_sum_GT, prepared.unscale_T, prepared.bits_LT,
        prepared.steps_L2, *scratch(grid, padded_tokens, out), out,
        rows, blocks, padded_tokens, prepared.tokens, inner[0], inner[1],
        ROWS=tile.rows, TOKENS=width, SPLIT=tile.split, STAGES=tile.stages,
        BLOCK_GROUPS=BLOCK_INPUTS // weight.group_size, MIXED=prepared.mixed,
        HALVABLE=prepared.halvable, ASM=not INTERPRETED, num_warps=tile.warps,
    )  # fmt: skip
    return outputs(out, weight)
