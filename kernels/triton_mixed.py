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
from mbq.kernels.triton_prepare import PreparedHalves, position_of
from mbq.kernels.triton_tiles import (
    ODD,
    Tile,
    digit,
    finish,
    halves,
    launch,
    row_of,
    second_digits,
    word_offsets,
)

# Tokens of a program: 32 fill the registers.
MOST_TILE_TOKENS = 32


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _mixed_kernel(
    x_ptr, late_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, steps_ptr, part_ptr, arrived_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, PROGRAMMATIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    steps_ptr += 2 * linear
    part = tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, 32)
    steps, halved = tl.load(steps_ptr), tl.load(steps_ptr + 1)
    bits = tl.load(bits_ptr + linear * padded_tokens + t)
    half_bin = 0.5 * tl.exp2((2 - bits).to(tl.float32))
    GROUP_CHUNKS: tl.constexpr = 8 // BLOCK_GROUPS
    inputs = blocks * 256
    plane_words = blocks * rows * 16
    wide, narrow = word_offsets(n, plane_words)
    late = tl.load(late_ptr + j[None, :])
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    turns = ((blocks - part + SPLIT - 1) // SPLIT) * steps
    for turn in tl.range(0, turns, num_stages=STAGES):
        step = turn % steps
        block = part + SPLIT * (turn // steps)
        # The step completes width w (where it stands in WIDTHS): 1 and 2 share a slice.
        w = step + tl.minimum(step, 1 - halved)
        e = tl.where(w < 2, w, w - 1)
        selector = tl.where((halved == 1) & (e == 1), 3 - w, 3)
        plane_ptr = digits_ptr + block.to(tl.int64) * rows * 16
        plane_ptr += 2 * e * plane_words.to(tl.int64)
        split = e == 1
        # High bits, or all of a slice that has not split them; low bits.
        offsets = tl.where(split, narrow, wide)
        word = tl.load(plane_ptr + offsets, mask=(w != 2) | (halved == 0), other=0)
        low = tl.load(plane_ptr + plane_words + narrow, mask=w == 2, other=0)
        moved, high_bits = tl.full(late.shape, 0, tl.int16), tl.full(word.shape, -1, tl.int16)
        if split:
            moved, high_bits = late, tl.full(word.shape, ODD, tl.int16)
        word = second_digits(word, low, moved, high_bits, ASM)
        weight_of_slice = tl.exp2((-2 * e).to(tl.float32))
        first = tl.where(e == 0, 1.0, 0.0)
        # What is padded repeats the last token, and is thrown away.
        x_at = x_ptr + tl.minimum(t, tokens - 1)[None, :] * inputs + block * 256 + j[:, None]
        for h in tl.static_range(BLOCK_GROUPS):
            group = block * BLOCK_GROUPS + h
            s, z = halves(tl.load(scale_zero_ptr + group * rows + n))
            sums = tl.load(sum_ptr + group * padded_tokens + t) * first
            biases = tl.load(bias_sum_ptr + group * padded_tokens + t)
            acc = (half_bin[None, :] - z[:, None]) * sums[None, :] - biases[None, :]
            for c in tl.static_range(GROUP_CHUNKS):
                x = tl.load(x_at + (h * GROUP_CHUNKS + c) * 32)
                digits = digit(word, position_of(h * GROUP_CHUNKS + c), selector, ASM)
                acc = tl.dot(digits, x, acc)
            acc *= tl.where(row_of(bits) >= w, 1.0, 0.0)[None, :]
            total += (s * weight_of_slice)[:, None] * acc

    gain_row = gain_bias_ptr + row_of(bits)[None, :] * rows
    finish(
        total, gain_row, unscale_ptr, part_ptr, arrived_ptr, out_ptr,
        rows, padded_tokens, tokens, ROWS, TOKENS, SPLIT,
    )  # fmt: skip


def multiply_mixed(
    prepared: PreparedHalves, weight: Digits, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """Each token times every linear's weight of its own width, with gain and bias.

    Returns [T, N'], linears side by side (`Digits.sides`).

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    assert prepared.steps_L2 is not None
    pointers = prepared.bits_LT, prepared.steps_L2
    width = min(len(prepared.x_TK), MOST_TILE_TOKENS)
    return launch(_mixed_kernel, prepared, pointers, weight, tile, width, dtype)
