"""Up to 8 tokens times quantized weights.

What `triton_uniform.py` and `triton_mixed.py` compute, for so few tokens that waiting is all that
matters:

  - Every warp of a program takes blocks of inputs of its own, for the same 16 or 32 rows, and the
    sums of all warps are added once, at the end. No program waits for another.
  - Words and tokens go from memory to the very registers in which matrix units take them. A thread
    loads 16 bytes in a row: 8 inputs of a row, or of a token. Matrix units take two times 4 inputs
    from each thread, so inputs change places (`_in_order`), which costs nothing: weights and tokens
    change alike, and no register moves. Word and token of input i of 32 stand at

        16 (i // 2 % 2) + 4 (i // 8) + 2 (i // 4 % 2) + i % 2

  - Words and scales, which come from memory, are asked for a turn ahead (`triton_words.py`). From
    Hopper on those of the first turn are asked for before the launch before has ended; where that
    launch decides the width, those that every width reads. At the same time the L2 cache can be
    asked for those of later turns, and for those of the product after this one: memory then works
    while tokens are made ready, and while whatever lies between two products runs.

Tokens of one width are multiplied by whole codes, those that differ by what each width adds to the
one before, digits of 2 bits or of one: as many products as there are widths up to the largest, and
what a token does not take is multiplied by zero. Where only the device knows the widths it also
finds out whether tokens differ.

Words are loaded two in an int32 and become int16 when they are used: registers that hold 16 bits
are copied, and so waited for, wherever a loop ends.

Legend: N' N padded, B blocks of 256 inputs, T tokens, L linears of one input, W warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, ODD_BITS, Digits
from mbq.kernels.triton_prepare import Prepared, launching, position_of
from mbq.kernels.triton_tiles import (
    INTERPRETED,
    Tile,
    asked_by_now,
    digit,
    halves,
    next_linears,
    row_of,
    second_digits,
    write,
)
from mbq.kernels.triton_uniform import combined, defined, extracted, field_bits, field_one, unit
from mbq.kernels.triton_words import (
    load_first,
    load_rest,
    prefetch_first,
    prefetch_next,
    prefetch_rest,
)
from mbq.kernels.widths import SLICE_BITS

# Tokens of a program: as many as the narrowest matrix instruction takes.
TOKENS = 8
# High bits of the second slice, in two words.
_ODD = tl.constexpr(ODD_BITS << 16 | ODD_BITS & 0xFFFF)
_TOKENS = tl.constexpr(TOKENS)


@triton.jit
def _in_order(loaded, WARPS: tl.constexpr):
    """[M W 8, 32] as it is loaded to [M, W, 8, 2, 4, 2, 2]: groups, warps, rows, and 32 inputs."""
    made = tl.reshape(loaded, (loaded.shape[0] // WARPS // 8, WARPS, 8, 4, 2, 2, 2))
    return tl.permute(made, (0, 1, 2, 5, 3, 4, 6))


@triton.jit
def _weights_in_order(words, WARPS: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS / 8 W 8, 16] int32 to [W, ROWS, 32] int16."""
    pairs = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    made = _in_order(tl.reshape(pairs, (words.shape[0], 32)), WARPS)
    return tl.reshape(tl.permute(made, (1, 0, 2, 3, 4, 5, 6)), (WARPS, ROWS, 32))


@triton.jit
def _tokens_in_order(x, WARPS: tl.constexpr):
    """[W 8, 32] to [W, 32, 8]."""
    made = tl.permute(_in_order(x, WARPS), (0, 1, 3, 4, 5, 6, 2))
    return tl.reshape(made, (WARPS, 32, _TOKENS))


@triton.jit
def _turn(
    words, pairs, x_ptr, sum_ptr, bias_sum_ptr, block, there, padded_tokens, late,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Sums over a block for each warp: [W, ROWS, T]. `there` says which warps have one left."""
    t = tl.arange(0, _TOKENS)
    # Sums are restarted at every group, and where fields begin to lie elsewhere.
    PARTS: tl.constexpr = GROUPS if GROUPS > 1 else 2
    PART_CHUNKS: tl.constexpr = 8 // PARTS
    SLICES: tl.constexpr = (BITS + 1) // 2
    FIELD: tl.constexpr = field_bits(BITS)
    LARGEST: tl.constexpr = field_one(2, BITS)
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
    total = tl.zeros((WARPS, ROWS, _TOKENS), dtype=tl.float32)
    for h in tl.static_range(PARTS):
        group = block * GROUPS + h * GROUPS // PARTS
        s, z = halves(pairs[h * GROUPS // PARTS])
        s = tl.where(there[:, None], s, 0.0)
        one = field_one(position_of(h * PART_CHUNKS), BITS)
        acc = tl.zeros((WARPS, ROWS, _TOKENS), dtype=tl.float32)
        if h * GROUPS % PARTS == 0:
            sums_at = (group * padded_tokens)[:, None] + t[None, :]
            sums = tl.load(sum_ptr + sums_at)
            acc = (HALF * one - FINER * one * z)[:, :, None] * sums[:, None, :]
            if SLICES == 1:
                acc -= tl.load(bias_sum_ptr + sums_at)[:, None, :]
        for c in tl.static_range(PART_CHUNKS):
            x = _tokens_in_order(tl.load(x_ptr + (h * PART_CHUNKS + c) * 32), WARPS)
            if SLICES == 1:
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
    words, pairs, x_ptr, sum_ptr, bias_sum_ptr, block, there, padded_tokens, late, bits,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The same for tokens of widths of their own, int32 [T]; the largest is BITS, above 2."""
    t = tl.arange(0, _TOKENS)
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
    total = tl.zeros((WARPS, ROWS, _TOKENS), dtype=tl.float32)
    for h in tl.static_range(GROUPS):
        sums_at = ((block * GROUPS + h) * padded_tokens)[:, None] + t[None, :]
        s, z = halves(pairs[h])
        s = tl.where(there[:, None], s, 0.0)
        sums = tl.load(sum_ptr + sums_at)[:, None, :]
        none = tl.zeros((WARPS, ROWS, _TOKENS), dtype=tl.float32)
        none -= tl.load(bias_sum_ptr + sums_at)[:, None, :]
        two = none + (half_bin[None, None, :] - z[:, :, None]) * sums
        three, four, six, eight = none, none, none, none
        for c in tl.static_range(GROUP_CHUNKS):
            x = _tokens_in_order(tl.load(x_ptr + (h * GROUP_CHUNKS + c) * 32), WARPS)
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
    MIXED: tl.constexpr, WAITS: tl.constexpr, PREFETCHED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows. Tokens have BITS or, if they differ, `bits`, at most BITS.

    Pointers to what has rows point at the first; `first` and `pairs` are the first turn's
    (`load_first`). `WAITS` for the launch before, but for weights.
    """
    warp = tl.arange(0, WARPS)
    late = (tl.arange(0, 16) // 8)[None, :]
    n = tl.arange(0, ROWS)
    gain_row = (row_of(bits) * rows)[None, :] if MIXED else row_of(BITS) * rows
    gain_bias = tl.load(gain_bias_ptr + gain_row + n[:, None])
    words = load_rest(word_pairs_ptr, first, 0, rows, blocks, ROWS, WARPS, BITS)
    if PREFETCHED and BITS > 2:
        prefetch_rest(word_pairs_ptr, rows, blocks, ROWS, WARPS, BITS)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    of_token = tl.arange(0, WARPS * _TOKENS)
    # What is padded repeats the last token, and is thrown away.
    token = tl.minimum(of_token % _TOKENS, tokens - 1)
    x_at = x_ptr + (token * blocks * 256)[:, None] + tl.arange(0, 32)[None, :]
    total = tl.zeros((WARPS, ROWS, _TOKENS), dtype=tl.float32)
    for start in tl.range(0, blocks, WARPS, num_stages=1):
        used, used_pairs = words, pairs
        first, pairs = load_first(
            word_pairs_ptr, scale_zero_ptr, start + WARPS, rows, blocks, ROWS, WARPS, GROUPS
        )
        words = load_rest(word_pairs_ptr, first, start + WARPS, rows, blocks, ROWS, WARPS, BITS)
        # Of 32 rows the registers do not hold all that is asked for early.
        if ASM and ROWS == 16:
            asked_by_now()
        block = tl.minimum(start + warp, blocks - 1)
        x_block = tl.minimum(start + of_token // _TOKENS, blocks - 1)
        x_block_ptr = x_at + (x_block * 256)[:, None]
        # Nothing is taken of a block that is not this warp's.
        there = start + warp < blocks
        if MIXED:  # noqa: SIM102
            if differ:
                total += _mixed_turn(
                    used, used_pairs, x_block_ptr, sum_ptr, bias_sum_ptr, block, there,
                    padded_tokens, late, bits, ROWS, WARPS, GROUPS, BITS, ASM,
                )  # fmt: skip
        if not differ:
            total += _turn(
                used, used_pairs, x_block_ptr, sum_ptr, bias_sum_ptr, block, there, padded_tokens,
                late, ROWS, WARPS, GROUPS, BITS, ASM,
            )  # fmt: skip
    summed = tl.sum(total, axis=0)
    t = tl.arange(0, _TOKENS)
    write(summed, gain_bias, unscale_ptr, out_ptr, n, t, rows, tokens)


# Fewer variants to compile: these need no alignment.
@triton.jit(
    do_not_specialize=[
        "blocks",
        "padded_tokens",
        "tokens",
        "second",
        "third",
        "next_plane_bytes",
        "next_word_bytes",
        "next_scale_bytes",
    ]
)
def _narrow_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, out_ptr, next_digits_ptr, next_scale_zero_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    next_plane_bytes, next_word_bytes, next_scale_bytes,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    MIXED: tl.constexpr, MOST_SLICES: tl.constexpr, PREFETCHES: tl.constexpr,
    PROGRAMMATIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    start = tile * ROWS
    word_pairs_ptr = digits_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start * 8
    scale_zero_ptr += start
    gain_bias_ptr += start
    out_ptr += start
    bits_ptr += linear * padded_tokens
    t = tl.arange(0, _TOKENS)
    first, pairs = load_first(word_pairs_ptr, scale_zero_ptr, 0, rows, blocks, ROWS, WARPS, GROUPS)
    # What no older GPU can.
    PREFETCHED: tl.constexpr = PREFETCHES and PROGRAMMATIC
    if PREFETCHED:
        prefetch_first(word_pairs_ptr, scale_zero_ptr, rows, blocks, ROWS, WARPS, GROUPS)
    # Widths are what the launch before writes.
    KNOWN: tl.constexpr = BITS > 0 and not MIXED
    if PROGRAMMATIC and next_word_bytes > 0:
        PLANES: tl.constexpr = BITS if KNOWN else 2
        prefetch_next(next_digits_ptr, next_word_bytes, next_plane_bytes, PLANES, WARPS)
        prefetch_next(next_scale_zero_ptr, next_scale_bytes, 0, 1, WARPS)
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
                        tokens, token_bits, differ, ROWS, WARPS, GROUPS, width,
                        MIXED and width > 2, PROGRAMMATIC and KNOWN, PREFETCHED, ASM,
                    )  # fmt: skip


def multiply_narrow(
    prepared: Prepared,
    bits: int | None,
    weight: Digits,
    tile: Tile,
    dtype: torch.dtype,
    following: Digits | None = None,
    bytes_ahead: int = 0,
) -> Tensor:
    """Up to 8 tokens times every linear's weight, with gain and bias.

    Arguments and result as those of `triton_uniform.multiply_uniform`, but for tokens that may
    differ in width: `bits` is None then. `tile.split` is 1; `tile.stages` 2 if words and scales of
    later turns are brought to the L2 cache.

    Args:
        following: a weight that comes next, whose first blocks the L2 cache is asked for.
        bytes_ahead: how much of it at most, words and scales.

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    slices, _, blocks, rows, _ = weight.digits_SHBN16.shape
    out = prepared.x_TK.new_empty(prepared.tokens, rows, dtype=dtype)
    ahead = 0, 0, 0
    if following is not None and bytes_ahead > 0:
        # Where only the device knows the width, what every width reads.
        ahead = following.first_blocks(bits or SLICE_BITS, bytes_ahead)
    then = following or weight
    _narrow_kernel[(rows // tile.rows,)](
        prepared.x_TK, weight.digits_SHBN16, weight.scale_zero_GN,
        weight.gain_bias_WN, prepared.sum_GT, prepared.bias_sum_GT, prepared.unscale_T,
        prepared.bits_LT, out, then.digits_SHBN16, then.scale_zero_GN, rows, blocks,
        len(prepared.x_TK), prepared.tokens, *next_linears(weight, tile.rows), *ahead,
        ROWS=tile.rows, WARPS=tile.warps, GROUPS=BLOCK_INPUTS // weight.group_size,
        BITS=bits or 0, MIXED=prepared.mixed, MOST_SLICES=slices,
        PREFETCHES=tile.stages > 1, ASM=not INTERPRETED, num_warps=tile.warps,
        **launching(out.device),
    )  # fmt: skip
    return out
