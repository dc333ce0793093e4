"""Up to 8 tokens times quantized weights.

What `triton_uniform.py` and `triton_mixed.py` compute, for so few tokens that waiting is all that
matters:

  - Every warp of a program takes blocks of inputs of its own, for the same 16 or 32 rows, and the
    sums of all warps are added once, at the end. No program waits for another.
  - Words and tokens go from memory to the very registers in which matrix units take them. A thread
    loads 16 bytes in a row: 8 inputs of a row, or of a token. Matrix units take two times 4 inputs
    from each thread, so inputs change places (`triton_columns.py`), which costs nothing: weights
    and tokens change alike, and no register moves. Word and token of input i of 32 stand at

        16 (i // 2 % 2) + 4 (i // 8) + 2 (i // 4 % 2) + i % 2

  - All that a turn reads, words and scales, tokens and their sums, is asked for a turn ahead, and
    nothing within a turn: a thread waits for one of six sets of loads, and the compiler puts what
    it likes in one set. Whoever asked for a token now would wait for the words of the next turn.
    Only where tokens may differ do registers not hold them twice.
  - From Hopper on words and scales of the first turn are asked for before the launch before has
    ended; where that launch decides the width, those that every width reads.

Tokens of one width are multiplied by whole codes, those that differ by what each width adds to the
one before, digits of 2 bits or of one: as many products as there are widths up to the largest, and
what a token does not take is multiplied by zero. Where only the device knows the widths it also
finds out whether tokens differ.

Whatever a loop carries is kept in an int32, two words or two inputs in one, and taken apart when it
is used: registers that hold 16 bits are copied, and so waited for, wherever a loop ends.

Legend: N' N padded, B blocks of 256 inputs, T tokens of a program, L linears of one input, W warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, ODD_BITS, Digits
from mbq.kernels.triton_columns import (
    COLUMNS,
    chunk,
    in_order,
    load_tokens,
    of_tokens,
    plain_digit,
    token_places,
)
from mbq.kernels.triton_prepare import Prepared, launching, position_of
from mbq.kernels.triton_tiles import (
    INTERPRETED,
    Tile,
    digit,
    halves,
    next_linears,
    row_of,
    second_digits,
    write,
)
from mbq.kernels.triton_uniform import combined, defined, extracted, field_bits, field_one, unit
from mbq.kernels.triton_words import load_first, load_rest

# High bits of the second slice, in two words.
_ODD = tl.constexpr(ODD_BITS << 16 | ODD_BITS & 0xFFFF)
_COLUMNS = tl.constexpr(COLUMNS)


@triton.jit
def _weights_in_order(words, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS / 8 W 8, 16] int32 to [W, ROWS, 32] int16."""
    made = tl.permute(in_order(words, WARPS), (1, 0, 2, 3, 4, 5, 6))
    return tl.reshape(made, (WARPS, ROWS, 32))


@triton.constexpr_function
def _unit_of(p: int, bits: int, plain: bool) -> float:
    """What a code of 1 at position p becomes."""
    return 2.0**-24 if plain else field_one(p, bits)


@triton.jit
def _turn(
    words, pairs, xs, all_sums, there, late,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over a block for each warp: [W, ROWS, 8]. `there` says which warps have one left."""
    # Sums are restarted at every group, and where fields begin to lie elsewhere.
    PARTS: tl.constexpr = GROUPS if GROUPS > 1 else 2
    PART_CHUNKS: tl.constexpr = 8 // PARTS
    SLICES: tl.constexpr = (BITS + 1) // 2
    FIELD: tl.constexpr = field_bits(BITS)
    LARGEST: tl.constexpr = field_one(2, BITS)
    PLAIN: tl.constexpr = SLICES == 1 and T < _COLUMNS
    # Bins of a field in one of 2 bits, and half a bin of this width.
    FINER: tl.constexpr = (1 << FIELD) // 4
    HALF: tl.constexpr = (1 << (FIELD - BITS)) / 2
    first, high, low, third, fourth = words
    if SLICES > 1:
        if BITS == 3:
            low = tl.zeros_like(high)
        second = second_digits(high, low, late, tl.full(high.shape, _ODD, tl.int32), ASM)
        if ASM:
            first, second, third, fourth = combined(first, second, third, fourth, BITS, SLICES)
        second = _weights_in_order(second, WARPS, ROWS)
        third = _weights_in_order(third, WARPS, ROWS)
        fourth = _weights_in_order(fourth, WARPS, ROWS)
    first = _weights_in_order(first, WARPS, ROWS)
    total = tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.float32)
    for h in tl.static_range(PARTS):
        s, z = halves(pairs[h * GROUPS // PARTS])
        s = tl.where(there[:, None], s, 0.0)
        one = _unit_of(position_of(h * PART_CHUNKS), BITS, PLAIN)
        acc = tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.float32)
        if h * GROUPS % PARTS == 0:
            sums, bias_sums = all_sums[h * GROUPS // PARTS]
            acc = (HALF * one - FINER * one * z)[:, :, None] * sums[:, None, :]
            if SLICES == 1 and not PLAIN:
                acc -= bias_sums[:, None, :]
        for c in tl.static_range(PART_CHUNKS):
            x = chunk(xs, h * PART_CHUNKS + c, WARPS, T, PLAIN, ASM)
            if PLAIN:
                codes = plain_digit(first, position_of(h * PART_CHUNKS + c), ASM)
            elif SLICES == 1:
                codes = digit(first, position_of(h * PART_CHUNKS + c), 3, ASM)
            elif ASM:
                codes = extracted(
                    first, second, third, fourth, position_of(h * PART_CHUNKS + c), BITS
                )
            else:
                codes = defined(
                    first, second, third, fourth, position_of(h * PART_CHUNKS + c), BITS, SLICES
                )
            acc = tl.dot(codes, x, acc)
        total += (s * (unit(BITS) * LARGEST / one))[:, :, None] * acc
    return total


@triton.jit
def _mixed_turn(
    words, pairs, xs, all_sums, there, late, bits,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The same for tokens of widths of their own, int32 [8]; the largest is BITS, above 2."""
    GROUP_CHUNKS: tl.constexpr = 8 // GROUPS
    half_bin = 0.5 * tl.exp2((2 - bits).to(tl.float32))
    # Of each width in WIDTHS, what it adds to the one before.
    takes = row_of(bits)
    takes_3, takes_4 = tl.where(takes >= 1, 1 / 4, 0.0), tl.where(takes >= 2, 1 / 4, 0.0)
    takes_6, takes_8 = tl.where(takes >= 3, 1 / 16, 0.0), tl.where(takes >= 4, 1 / 64, 0.0)
    first, high, low, third, fourth = words
    if BITS == 3:
        low = tl.zeros_like(high)
    second = second_digits(high, low, late, tl.full(high.shape, _ODD, tl.int32), ASM)
    first = _weights_in_order(first, WARPS, ROWS)
    second = _weights_in_order(second, WARPS, ROWS)
    third = _weights_in_order(third, WARPS, ROWS)
    fourth = _weights_in_order(fourth, WARPS, ROWS)
    total = tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.float32)
    for h in tl.static_range(GROUPS):
        s, z = halves(pairs[h])
        s = tl.where(there[:, None], s, 0.0)
        sums, bias_sums = all_sums[h]
        none = tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.float32)
        none -= bias_sums[:, None, :]
        two = none + (half_bin[None, None, :] - z[:, :, None]) * sums[:, None, :]
        three, four, six, eight = none, none, none, none
        for c in tl.static_range(GROUP_CHUNKS):
            x = chunk(xs, h * GROUP_CHUNKS + c, WARPS, _COLUMNS, False, ASM)
            two = tl.dot(digit(first, position_of(h * GROUP_CHUNKS + c), 3, ASM), x, two)
            three = tl.dot(digit(second, position_of(h * GROUP_CHUNKS + c), 2, ASM), x, three)
            if BITS > 3:
                codes = digit(second, position_of(h * GROUP_CHUNKS + c), 1, ASM)
                four = tl.dot(codes, x, four)
            if BITS > 4:
                codes = digit(third, position_of(h * GROUP_CHUNKS + c), 3, ASM)
                six = tl.dot(codes, x, six)
            if BITS > 6:
                codes = digit(fourth, position_of(h * GROUP_CHUNKS + c), 3, ASM)
                eight = tl.dot(codes, x, eight)
        two += takes_3[None, None, :] * three
        if BITS > 3:
            two += takes_4[None, None, :] * four
        if BITS > 4:
            two += takes_6[None, None, :] * six
        if BITS > 6:
            two += takes_8[None, None, :] * eight
        total += s[:, :, None] * two
    return total


@triton.jit
def _multiplied(
    first, pairs, x_ptr, word_pairs_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr,
    unscale_ptr, out_ptr, rows, blocks, padded_tokens, tokens, bits, differ,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, MIXED: tl.constexpr, WAITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows. Tokens have BITS or, if they differ, `bits`, at most BITS.

    Pointers to what has rows point at the first; `first` and `pairs` are the first turn's
    (`load_first`). `WAITS` for the launch before, but for weights.
    """
    late = (tl.arange(0, 16) // 8)[None, :]
    n, t = tl.arange(0, ROWS), tl.arange(0, T)
    gain_row = (row_of(bits) * rows)[None, :] if MIXED else row_of(BITS) * rows
    words = load_rest(word_pairs_ptr, first, 0, rows, blocks, ROWS, WARPS, BITS)
    gain_bias = tl.load(gain_bias_ptr + gain_row + n[:, None])
    if WAITS:
        tl.extra.cuda.gdc_wait()
    unscale = tl.load(unscale_ptr + t)
    BIASED: tl.constexpr = MIXED or (BITS == 2 and T == _COLUMNS)
    x_at = token_places(x_ptr, tokens, blocks, WARPS, T)
    if not MIXED:
        xs, sums = load_tokens(
            x_at, sum_ptr, bias_sum_ptr, 0, blocks, padded_tokens, WARPS, GROUPS, T, BIASED
        )  # fmt: skip
    total = tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.float32)
    for start in tl.range(0, blocks, WARPS, num_stages=1):
        used, used_pairs = words, pairs
        first, pairs = load_first(
            word_pairs_ptr, scale_zero_ptr, start + WARPS, rows, blocks, ROWS, WARPS, GROUPS
        )
        words = load_rest(word_pairs_ptr, first, start + WARPS, rows, blocks, ROWS, WARPS, BITS)
        if MIXED:
            used_xs, used_sums = load_tokens(
                x_at, sum_ptr, bias_sum_ptr, start, blocks, padded_tokens, WARPS, GROUPS, T, BIASED
            )  # fmt: skip
        else:
            used_xs, used_sums = xs, sums
            xs, sums = load_tokens(
                x_at, sum_ptr, bias_sum_ptr, start + WARPS, blocks, padded_tokens, WARPS, GROUPS, T,
                BIASED,
            )  # fmt: skip
        # Nothing is taken of a block that is not this warp's.
        there = start + tl.arange(0, WARPS) < blocks
        # Always so, which the compiler does not know: it would move loads from before a product to
        # behind it, where fewer registers are taken, but not across a branch.
        if start + tokens > 0:
            if MIXED:  # noqa: SIM102
                if differ:
                    total += _mixed_turn(
                        used, used_pairs, used_xs, used_sums, there, late, bits, ROWS, WARPS,
                        GROUPS, BITS, ASM,
                    )  # fmt: skip
            if not differ:
                total += _turn(
                    used, used_pairs, used_xs, used_sums, there, late, ROWS, WARPS, GROUPS, BITS, T,
                    ASM,
                )  # fmt: skip
    summed = tl.sum(of_tokens(total, T), axis=0)
    write(summed, gain_bias, unscale, out_ptr, n, t, rows, tokens)


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _narrow_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, out_ptr, rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, MIXED: tl.constexpr, MOST_SLICES: tl.constexpr,
    PROGRAMMATIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    start = tile * ROWS
    word_pairs_ptr = digits_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start * 8
    scale_zero_ptr += start
    gain_bias_ptr += start
    out_ptr += start
    bits_ptr += linear * padded_tokens
    t = tl.arange(0, _COLUMNS)
    first, pairs = load_first(word_pairs_ptr, scale_zero_ptr, 0, rows, blocks, ROWS, WARPS, GROUPS)
    # Widths are what the launch before writes.
    KNOWN: tl.constexpr = BITS > 0 and not MIXED
    if PROGRAMMATIC and not KNOWN:
        tl.extra.cuda.gdc_wait()
    token_bits = tl.load(bits_ptr + t) if MIXED else t
    largest = tl.max(token_bits, axis=0) if MIXED else tl.load(bits_ptr)
    bits = BITS if BITS > 0 else largest
    # Tokens that agree are multiplied by whole codes, whatever the host expected of them.
    differ = False
    if MIXED:
        differ = tl.min(tl.where(t < tokens, token_bits, largest), axis=0) < largest
    for width in tl.static_range(2, 2 * MOST_SLICES + 1):
        # In steps: only the last one is left to the device.
        if (width <= 4) or (width % 2 == 0):  # noqa: SIM102
            if (BITS == 0) or (width == BITS):  # noqa: SIM102
                if bits == width:
                    _multiplied(
                        first, pairs, x_ptr, word_pairs_ptr, scale_zero_ptr, gain_bias_ptr,
                        sum_ptr, bias_sum_ptr, unscale_ptr, out_ptr, rows, blocks, padded_tokens,
                        tokens, token_bits, differ, ROWS, WARPS, GROUPS, width, T,
                        MIXED and width > 2, PROGRAMMATIC and KNOWN, ASM,
                    )  # fmt: skip


def multiply_narrow(
    prepared: Prepared, bits: int | None, weight: Digits, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """Up to 8 tokens times every linear's weight, with gain and bias.

    Arguments and result as those of `triton_uniform.multiply_uniform`, but for tokens that may
    differ in width: `bits` is None then.

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    slices, _, blocks, rows, _ = weight.digits_SHBN16.shape
    out = prepared.x_TK.new_empty(prepared.tokens, rows, dtype=dtype)
    _narrow_kernel[(rows // tile.rows,)](
        prepared.x_TK, weight.digits_SHBN16, weight.scale_zero_GN,
        weight.gain_bias_WN, prepared.sum_GT, prepared.bias_sum_GT, prepared.unscale_T,
        prepared.bits_LT, out, rows, blocks, len(prepared.x_TK), prepared.tokens,
        *next_linears(weight, tile.rows),
        ROWS=tile.rows, WARPS=tile.warps, GROUPS=BLOCK_INPUTS // weight.group_size,
        BITS=bits or 0, T=program_tokens(prepared.tokens, prepared.mixed), MIXED=prepared.mixed,
        MOST_SLICES=slices, ASM=not INTERPRETED, num_warps=tile.warps,
        maxnreg=most_registers(prepared.tokens, tile, weight.group_size), **launching(out.device),
    )  # fmt: skip
    return out


def program_tokens(tokens: int, mixed: bool) -> int:
    """T for so many tokens, 8 at most: a power of two, or 8 where they may differ."""
    return COLUMNS if mixed else 1 << (tokens - 1).bit_length()


def most_registers(tokens: int, tile: Tile, group_size: int) -> int | None:
    """Of a thread; None for as many as it wants.

    So few that two programs of 8 warps share a multiprocessor. Where only the device knows the
    width some are spilled, and it is faster all the same; with small groups too many would be.
    """
    shared = tokens == 1 and tile.rows == 16 and tile.warps >= 8 and group_size >= 128
    return 128 if shared else None
