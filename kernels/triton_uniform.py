"""Few tokens times quantized weights, all tokens of a linear at one width.

The host knows the width, or only the device does: then it is read, and one of several loops taken.
The slices of a weight are put together first (`triton_fields.py`): one product for a weight,
whatever its width, where `triton_mixed.py` has one for each slice. What does not depend on the code
is multiplied by sums of the tokens, per group.

Legend: N' N padded, B blocks of 256 inputs, G groups, T tokens, L linears of one input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import Digits
from mbq.kernels.triton_fields import extracted, field_bits, field_one, fields_of, unit
from mbq.kernels.triton_operands import (
    chunks_at_once,
    digit_places,
    late_words,
    load_digits,
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
    launch,
    row_of,
)
from mbq.kernels.triton_words import ALL_ROWS, load_rest


@triton.jit
def _codes(
    fields, chunk: tl.constexpr, CHUNKS: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes of some chunks, from one on, in their places: float16 [ROWS, 32 CHUNKS]."""
    made = ()
    for c in tl.static_range(chunk, chunk + CHUNKS):
        words = words_apart(fields[position_of(c) % 4], WARPS)
        if BITS == 2:
            codes = digit(words, position_of(c), 3, ASM)
        else:
            codes = extracted(words, position_of(c), BITS, ASM)
        made += (codes,)  # type: ignore[assignment]
    return side_by_side(made, WARPS)


@triton.jit
def _turn(
    total, fields, pairs, x_at, block, sum_ptr, bias_sum_ptr, half_bin, padded_tokens,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, TOKENS], float32, with those of a block."""
    # Sums are restarted at every group, and where fields begin to lie elsewhere.
    PARTS: tl.constexpr = BLOCK_GROUPS if BLOCK_GROUPS > 1 else 2
    CHUNKS: tl.constexpr = 8 // PARTS
    AT_ONCE: tl.constexpr = chunks_at_once(CHUNKS, AHEAD)
    LARGEST: tl.constexpr = field_one(2, BITS)
    # Bins of a field in one of 2 bits.
    FINER: tl.constexpr = (1 << field_bits(BITS)) // 4
    place = tl.arange(0, 32 * AT_ONCE)
    for part in tl.static_range(PARTS):
        one = field_one(position_of(part * CHUNKS), BITS)
        group = block * BLOCK_GROUPS + part * BLOCK_GROUPS // PARTS
        s, z = halves(pairs[part * BLOCK_GROUPS // PARTS])
        acc = tl.zeros(total.shape, dtype=tl.float32)
        if part * BLOCK_GROUPS % PARTS == 0:
            sums = tl.load(sum_ptr + group * padded_tokens)
            acc = (one * (half_bin - FINER * z))[:, None] * sums[None, :]
            if BITS == 2:
                acc -= tl.load(bias_sum_ptr + group * padded_tokens)[None, :]
        for chunk in tl.static_range(part * CHUNKS, part * CHUNKS + CHUNKS, AT_ONCE):
            x = tl.load(x_at + (block * 256 + chunk * 32 + place)[:, None])
            acc = tl.dot(_codes(fields, chunk, AT_ONCE, BITS, WARPS, ASM), x, acc)
        total += (s * (LARGEST / one))[:, None] * acc
    return total


@triton.jit
def _summed(
    x_at, at, words, pairs, scale_zero_ptr, sum_ptr, bias_sum_ptr, bits, rows, blocks,
    padded_tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr, AHEAD: tl.constexpr, WAITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """A part of a tile of sums, at one width, in fields as wide as those of BITS.

    Pointers to what has tokens point at those of the tile, that to scales at its first row; `words`
    of the first slice and `pairs` are the first turn's, where they are asked for ahead. `WAITS` for
    the launch before, but for weights.
    """
    first = tl.program_id(1)
    late = late_words(at)
    FIELD: tl.constexpr = field_bits(BITS)
    half_bin = tl.exp2((FIELD - 1 - bits).to(tl.float32))
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    words = load_rest(at, words, bits, rows, blocks, ALL_ROWS, BITS)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    for block in tl.range(first, blocks, SPLIT):
        if AHEAD:
            fields, used = fields_of(words, late, BITS, False, ASM), pairs
            following = tl.minimum(block + SPLIT, blocks - 1)
            words = load_digits(moved(at, following - first, rows), bits, rows, blocks, BITS)
            pairs = load_scales(scale_zero_ptr, following, rows, ROWS, WARPS, BLOCK_GROUPS)
        else:
            now = load_digits(moved(at, block - first, rows), bits, rows, blocks, BITS)
            fields = fields_of(now, late, BITS, False, ASM)
            used = load_scales(scale_zero_ptr, block, rows, ROWS, WARPS, BLOCK_GROUPS)
        total = _turn(
            total, fields, used, x_at, block, sum_ptr, bias_sum_ptr, half_bin, padded_tokens,
            BLOCK_GROUPS, BITS, WARPS, AHEAD, ASM,
        )  # fmt: skip
    return total * unit(BITS)


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _uniform_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, part_ptr, arrived_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, BITS: tl.constexpr, MOST_SLICES: tl.constexpr,
    AHEAD: tl.constexpr, PROGRAMMATIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile, first = tl.program_id(0), tl.program_id(1)
    n = tile * ROWS + rows_of_tile(ROWS, WARPS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    scale_zero_ptr += tile * ROWS
    at = digit_places(digits_ptr, tile * ROWS, first, rows, blocks, ROWS, WARPS, AHEAD)
    words = tl.load(at[0])
    pairs = load_scales(scale_zero_ptr, first, rows, ROWS, WARPS, BLOCK_GROUPS)
    # Widths are what the launch before writes.
    KNOWN: tl.constexpr = BITS > 0
    if PROGRAMMATIC and not KNOWN:
        tl.extra.cuda.gdc_wait()
    bits = BITS if KNOWN else tl.load(bits_ptr + linear * padded_tokens)
    # What is padded repeats the last token, and is thrown away.
    x_at = x_ptr + (tl.minimum(t, tokens - 1) * (blocks * 256))[None, :]
    # A loop for each width of fields, unless the host knows which it is.
    for power in tl.static_range(1, 4):
        if (1 << power) // 2 < 2 * MOST_SLICES:  # noqa: SIM102
            if (BITS == 0) or (field_bits(BITS) == 1 << power):  # noqa: SIM102
                if (bits > (1 << power) // 2) & (bits <= 1 << power):
                    total = _summed(
                        x_at, at, words, pairs, scale_zero_ptr, sum_ptr + t, bias_sum_ptr + t,
                        bits, rows, blocks, padded_tokens,
                        ROWS, TOKENS, SPLIT, WARPS, BLOCK_GROUPS,
                        BITS if BITS > 0 else min(1 << power, 2 * MOST_SLICES), AHEAD,
                        PROGRAMMATIC and KNOWN, ASM,
                    )  # fmt: skip
                    finish(
                        total, gain_bias_ptr + row_of(bits) * rows, unscale_ptr, part_ptr,
                        arrived_ptr, out_ptr, n, t, rows, padded_tokens, tokens,
                        ROWS, TOKENS, SPLIT,
                    )  # fmt: skip


def multiply_uniform(
    prepared: PreparedHalves, bits: int | None, weight: Digits, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """Each token times every linear's weight, with gain and bias.

    Args:
        bits: the width, or None if only the device knows that of each linear.

    Returns [T, N'], linears side by side (`Digits.sides`).

    Raises:
        ValueError: a tile would reach from one linear into the next, or has no inputs.
    """
    return launch(
        _uniform_kernel,
        prepared,
        (prepared.bits_LT,),
        weight,
        tile,
        # All tokens in one program, as codes are put together anew for each.
        len(prepared.x_TK),
        dtype,
        BITS=bits or 0,
        MOST_SLICES=len(weight.digits_SHBN16),
    )
