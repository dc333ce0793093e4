"""Few tokens times quantized weights, each token at a width of its own that only the device knows.

The weight of b bits is s * (sum_e q_e 4^-e + 2^(2-b) / 2 - z), e from 0. Tensor cores sum digits
and their biases (`triton_tiles.digit`), slice by slice; the biases are taken off per group by sums
of the tokens that are weighted with them. Slices are the inner loop and their number is read from
memory, so one kernel, captured once in a graph, serves whatever widths the tokens turn out to have.
What a token does not take of a slice that another needs is multiplied by zero: what is read follows
the hungriest token.

Where a token stops at 3 bits, the second slice takes two steps, one for each of its planes: its
high bits, under the mask 2 in place of 3, then its low bits, under the mask 1. Masks that change
from step to step lie in registers.

Legend: N out_features, N' N padded, K in_features, B blocks of 256 inputs, G groups, T tokens,
L linears of one input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import Digits
from mbq.kernels.triton_operands import (
    chunks_at_once,
    digit_places,
    late_words,
    load_scales,
    moved,
    rows_of_tile,
    side_by_side,
    words_apart,
)
from mbq.kernels.triton_prepare import PreparedHalves, position_of
from mbq.kernels.triton_tiles import (
    Tile,
    digit,
    finish,
    halves,
    high_bits_of,
    launch,
    row_of,
    second_digits,
)

# Tokens of a program: 32 fill the registers.
MOST_TILE_TOKENS = 32


@triton.jit
def _step(turn, steps, halved):
    """Of a turn: how many blocks on it is, the width that it completes and the slice that it reads.

    The width as its place in WIDTHS, of which the first two share a slice that may take two steps.
    """
    step = turn % steps
    width = step + tl.minimum(step, 1 - halved)
    return turn // steps, width, tl.where(width < 2, width, width - 1)


@triton.jit
def _load_step(at, width, e, halved, rows, blocks):
    """Words that a step reads of a slice: two of [ROWS, 16] or [ROWS, 32], as pointers are.

    Of the second slice high bits and low bits, as far as the step reads them, else all and zero.
    """
    wide_at, narrow_at = at
    plane_words = (blocks * rows).to(tl.int64) * (wide_at.shape[1] // 2)
    words_at = tl.where(e == 1, narrow_at, wide_at + 2 * e * plane_words)
    words = tl.load(words_at, mask=(width != 2) | (halved == 0), other=0)
    return words, tl.load(narrow_at + plane_words, mask=width == 2, other=0)


@triton.jit
def _digits(
    words, selector, chunk: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Digits of some chunks, from one on, in their places: float16 [ROWS, 32 CHUNKS]."""
    apart = words_apart(words, WARPS)
    made = ()
    for c in tl.static_range(chunk, chunk + CHUNKS):
        made += (digit(apart, position_of(c), selector, ASM),)  # type: ignore[assignment]
    return side_by_side(made, WARPS)


@triton.jit
def _turn(
    total, words, low, pairs, width, e, halved, bits, x_at, block, sum_ptr, bias_sum_ptr,
    padded_tokens, late, BLOCK_GROUPS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS], float32, with what a step adds in a block to those that take it."""
    CHUNKS: tl.constexpr = 8 // BLOCK_GROUPS
    AT_ONCE: tl.constexpr = chunks_at_once(CHUNKS, AHEAD)
    shift, high_bits = tl.zeros_like(late), tl.full(words.shape, -1, words.dtype)
    if e == 1:
        shift, high_bits = late, high_bits_of(words)
    words = second_digits(words, low, shift, high_bits, ASM)
    selector = tl.where((halved == 1) & (e == 1), 3 - width, 3)
    weight_of_slice = tl.exp2((-2 * e).to(tl.float32))
    # Zeros and half bins are taken once.
    once = tl.where(e == 0, 1.0, 0.0)
    half_bin = 0.5 * tl.exp2((2 - bits).to(tl.float32))
    place = tl.arange(0, 32 * AT_ONCE)
    for group in tl.static_range(BLOCK_GROUPS):
        s, z = halves(pairs[group])
        sums_at = (block * BLOCK_GROUPS + group) * padded_tokens
        sums, biases = tl.load(sum_ptr + sums_at) * once, tl.load(bias_sum_ptr + sums_at)
        acc = (half_bin[None, :] - z[:, None]) * sums[None, :] - biases[None, :]
        for chunk in tl.static_range(group * CHUNKS, group * CHUNKS + CHUNKS, AT_ONCE):
            x = tl.load(x_at + (block * 256 + chunk * 32 + place)[:, None])
            acc = tl.dot(_digits(words, selector, chunk, AT_ONCE, WARPS, ASM), x, acc)
        acc *= tl.where(row_of(bits) >= width, 1.0, 0.0)[None, :]
        total += (s * weight_of_slice)[:, None] * acc
    return total


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _mixed_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, steps_ptr, part_ptr, arrived_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, AHEAD: tl.constexpr, PROGRAMMATIC: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    tile, first = tl.program_id(0), tl.program_id(1)
    n = tile * ROWS + rows_of_tile(ROWS, WARPS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    scale_zero_ptr += tile * ROWS
    at = digit_places(digits_ptr, tile * ROWS, first, rows, blocks, ROWS, WARPS, AHEAD)
    late = late_words(at)
    # The first step is all tokens' first slice.
    words, low = _load_step(at, 0, 0, 0, rows, blocks)
    pairs = load_scales(scale_zero_ptr, first, rows, ROWS, WARPS, BLOCK_GROUPS)
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
    steps, halved = tl.load(steps_ptr + 2 * linear), tl.load(steps_ptr + 2 * linear + 1)
    bits = tl.load(bits_ptr + linear * padded_tokens + t)
    # What is padded repeats the last token, and is thrown away.
    x_at = x_ptr + (tl.minimum(t, tokens - 1) * (blocks * 256))[None, :]
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    turns = ((blocks - first + SPLIT - 1) // SPLIT) * steps
    for turn in tl.range(0, turns):
        number, width, e = _step(turn, steps, halved)
        block = first + SPLIT * number
        if AHEAD:
            used, used_low, used_pairs = words, low, pairs
            number, next_width, next_e = _step(tl.minimum(turn + 1, turns - 1), steps, halved)
            words, low = _load_step(
                moved(at, SPLIT * number, rows), next_width, next_e, halved, rows, blocks
            )
            pairs = load_scales(
                scale_zero_ptr, first + SPLIT * number, rows, ROWS, WARPS, BLOCK_GROUPS
            )
        else:
            used, used_low = _load_step(
                moved(at, SPLIT * number, rows), width, e, halved, rows, blocks
            )
            used_pairs = load_scales(scale_zero_ptr, block, rows, ROWS, WARPS, BLOCK_GROUPS)
        total = _turn(
            total, used, used_low, used_pairs, width, e, halved, bits, x_at, block,
            sum_ptr + t, bias_sum_ptr + t, padded_tokens, late, BLOCK_GROUPS, WARPS, AHEAD, ASM,
        )  # fmt: skip
    gain_row = gain_bias_ptr + row_of(bits)[None, :] * rows
    finish(
        total, gain_row, unscale_ptr, part_ptr, arrived_ptr, out_ptr, n, t,
        rows, padded_tokens, tokens, ROWS, TOKENS, SPLIT,
    )  # fmt: skip


def multiply_mixed(
    prepared: PreparedHalves, weight: Digits, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """Each token times every linear's weight of its own width, with gain and bias.

    Returns [T, N'], linears side by side (`Digits.sides`).

    Raises:
        ValueError: a tile would reach from one linear into the next, or has no inputs.
    """
    assert prepared.steps_L2 is not None
    pointers = prepared.bits_LT, prepared.steps_L2
    width = min(len(prepared.x_TK), MOST_TILE_TOKENS)
    return launch(_mixed_kernel, prepared, pointers, weight, tile, width, dtype)
