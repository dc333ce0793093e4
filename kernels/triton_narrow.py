"""Up to 8 tokens times quantized weights.

What `triton_uniform.py` and `triton_mixed.py` compute, for so few tokens that waiting is all that
matters:

  - Every warp of a program takes blocks of inputs of its own, for the same 16 or 32 rows, and the
    sums of all warps are added once, at the end. No program waits for another.
  - Codes and tokens are bytes (`triton_bytes.py`), and go from memory to the very registers in
    which matrix units take them.
  - All that a turn reads, words and scales, tokens and their sums, is asked for a turn ahead, and
    nothing within a turn (`triton_words.py`): a thread waits for one of six sets of loads, and the
    compiler puts what it likes in one set. Whoever asked for a token now would wait for the words
    of the next turn. Only tokens that may differ, or are four and more in groups smaller than 128,
    are loaded when they are needed: registers do not hold them twice.
  - From Hopper on words and scales of the first turn are asked for before the launch before has
    ended; where that launch decides the width, those that every width reads.

Tokens of one width are multiplied by whole codes (`triton_fields.py`), a byte with 128 less than a
code of 8 bits, as bytes have signs. Those that differ are multiplied by what each width adds to the
one before, digits of 2 bits or of one: as many products as there are widths up to the largest, and
what a token does not take is multiplied by zero. Where only the device knows the widths it also
finds out whether tokens differ.

Whatever a loop carries is kept in an int32, and taken apart when it is used: registers that hold
less are copied, and so waited for, wherever a loop ends.

Legend: N' N padded, B blocks of 256 inputs, T tokens of a program, L linears of one input, W warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, Digits
from mbq.kernels.triton_bytes import (
    columns,
    halves_of,
    multiplied,
    parts_of,
    program_tokens,
    sets_of,
    unit_product,
)
from mbq.kernels.triton_fields import field_bits, fields_of
from mbq.kernels.triton_prepare import PreparedBytes, launching
from mbq.kernels.triton_tiles import (
    INTERPRETED,
    Tile,
    halves,
    high_bits_of,
    next_linears,
    row_of,
    second_digits,
    write,
)
from mbq.kernels.triton_words import (
    column_tokens,
    load_first,
    load_next,
    load_rest,
    load_tokens,
    places,
)


@triton.constexpr_function
def _group_of(part: int, position: int, half: int, tokens: int, groups: int) -> int:
    """The group of a half of 64 bytes at a position of a part, counted in both."""
    chunk = 8 // parts_of(tokens, groups) * part + 2 * position + half
    return chunk * groups // 8


@triton.jit
def _scale_zero(
    pairs, part: tl.constexpr, half: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr
):
    """Scales and zeros of a part, for each row, and column where those are of several groups."""
    pair = pairs[_group_of(part, 0, half, T, GROUPS)][:, :, None]
    if T < 4:
        position = tl.arange(0, 4) // T
        for i in tl.static_range(1, 4 // parts_of(T, GROUPS)):
            if _group_of(part, i - 1, half, T, GROUPS) < _group_of(part, i, half, T, GROUPS):
                later = pairs[_group_of(part, i, half, T, GROUPS)][:, :, None]
                pair = tl.where((position >= i)[None, None, :], later, pair)
    return halves(pair)


@triton.constexpr_function
def _unit(bits: int, tokens: int) -> float:
    """What the sums of `_turn` are multiplied by."""
    return 4.0 / (1 << field_bits(bits)) / unit_product(field_bits(bits), tokens)


@triton.jit
def _half_bin(bits, BITS: tl.constexpr, T: tl.constexpr):
    """Half a bin of a width in the products of `_turn`, whose bytes of 8 bits lack 128."""
    FIELD: tl.constexpr = field_bits(BITS)
    half = tl.exp2((FIELD - 1 - bits).to(tl.float32))
    return unit_product(FIELD, T) * (half + (128.0 if FIELD == 8 else 0.0))


@triton.jit
def _scaled(
    totals, pair, half_bins, finer: tl.constexpr, products, scale_sums, number: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Sums of every set of columns with those of a part, whose scales and sums have a number."""
    s, z = pair
    made = ()
    for i in tl.static_range(sets_of(T)):
        scale, summed = tl.split(scale_sums[number * sets_of(T) + i])
        offset = (half_bins[i] - finer * z) * summed[:, None, :]
        total = totals[i] + s * (products[i] * scale[:, None, :] + offset)
        made += (total,)  # type: ignore[assignment]
    return made


@triton.jit
def _where_there(start, blocks, totals, before, WARPS: tl.constexpr, T: tl.constexpr):
    """Sums as they were before where a warp has no block left."""
    there = (start + tl.arange(0, WARPS) < blocks)[:, None, None]
    made = ()
    for i in tl.static_range(sets_of(T)):
        made += (tl.where(there, totals[i], before[i]),)  # type: ignore[assignment]
    return made


@triton.jit
def _turn(
    totals, start, blocks, words, pairs, tokens, scale_sums, late, half_bin,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums with those of a block for each warp that has one: float32 [W, ROWS, 4] for each set."""
    FIELD: tl.constexpr = field_bits(BITS)
    ONE: tl.constexpr = unit_product(FIELD, T)
    # Bins of a field in one of 2 bits.
    FINER: tl.constexpr = (1 << FIELD) // 4
    fields = fields_of(words, late, BITS, True, ASM)
    half_bins = (half_bin, half_bin)
    made = totals
    for part in tl.static_range(parts_of(T, GROUPS)):
        for half in tl.static_range(halves_of(GROUPS)):
            xs = columns(tokens, half, WARPS, GROUPS, T)
            products = multiplied(fields, xs, part, ROWS, WARPS, GROUPS, T, FIELD, 3, ASM)
            pair = _scale_zero(pairs, part, half, GROUPS, T)
            made = _scaled(
                made, pair, half_bins, FINER * ONE, products, scale_sums,
                part * halves_of(GROUPS) + half, T,
            )  # fmt: skip
    return _where_there(start, blocks, made, totals, WARPS, T)


@triton.jit
def _and_more(products, more, bits, width: tl.constexpr, finer: tl.constexpr, T: tl.constexpr):
    """Products with what a width adds to those of the one before, for tokens that take it."""
    made = ()
    for i in tl.static_range(sets_of(T)):
        takes = tl.where(bits[i] >= width, 1.0 / finer, 0.0)[None, None, :]
        made += (products[i] + takes * more[i],)  # type: ignore[assignment]
    return made


@triton.jit
def _mixed_turn(
    totals, start, blocks, words, pairs, tokens, scale_sums, late, bits,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same for tokens of widths of their own, int32 [4] each set; the largest is BITS."""
    ONE: tl.constexpr = unit_product(2, T)
    first, high, low, third, fourth = words
    second = second_digits(high, low, late, high_bits_of(high), ASM)
    half_bins = ()
    for i in tl.static_range(sets_of(T)):
        half_bin = ONE * 0.5 * tl.exp2((2 - bits[i]).to(tl.float32))
        half_bins += (half_bin[None, None, :],)  # type: ignore[assignment]
    made = totals
    for part in tl.static_range(parts_of(T, GROUPS)):
        for half in tl.static_range(halves_of(GROUPS)):
            xs = columns(tokens, half, WARPS, GROUPS, T)
            products = multiplied((first,), xs, part, ROWS, WARPS, GROUPS, T, 2, 3, ASM)
            more = multiplied((second,), xs, part, ROWS, WARPS, GROUPS, T, 2, 2, ASM)
            products = _and_more(products, more, bits, 3, 4, T)
            if BITS > 3:
                more = multiplied((second,), xs, part, ROWS, WARPS, GROUPS, T, 2, 1, ASM)
                products = _and_more(products, more, bits, 4, 4, T)
            if BITS > 4:
                more = multiplied((third,), xs, part, ROWS, WARPS, GROUPS, T, 2, 3, ASM)
                products = _and_more(products, more, bits, 6, 16, T)
            if BITS > 6:
                more = multiplied((fourth,), xs, part, ROWS, WARPS, GROUPS, T, 2, 3, ASM)
                products = _and_more(products, more, bits, 8, 64, T)
            pair = _scale_zero(pairs, part, half, GROUPS, T)
            made = _scaled(
                made, pair, half_bins, ONE, products, scale_sums, part * halves_of(GROUPS) + half, T
            )
    return _where_there(start, blocks, made, totals, WARPS, T)


@triton.jit
def _of_tokens(totals, WARPS: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr):
    """Sums of sets of columns [W, ROWS, 4] to those of tokens, of all warps: [ROWS, T]."""
    if sets_of(T) == 2:
        both = tl.permute(tl.join(totals[0], totals[1]), (0, 1, 3, 2))
        total = tl.reshape(both, (WARPS, ROWS, T))
    elif T < 4:
        total = tl.sum(tl.reshape(totals[0], (WARPS, ROWS, 4 // T, T)), axis=2)
    else:
        total = totals[0]
    return tl.sum(total, axis=0)


@triton.constexpr_function
def turns(tokens: int, groups: int, mixed: bool) -> int:
    """Turns in the body of a loop: two, where registers hold all that both read."""
    return 1 if mixed or (tokens >= 4 and groups > 2) else 2


@triton.jit
def _sums(
    totals, at, words, pairs, bits, rows, blocks, late,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Sums over all blocks, of tokens at one width.

    Two turns in the loop's body, each with registers of its own: none is copied.
    """
    half_bin = _half_bin(bits, BITS, T)
    xs, scale_sums = load_tokens(at, GROUPS, T)
    next_words, next_pairs, next_xs, next_sums = words, pairs, xs, scale_sums
    for start in tl.range(0, blocks, 2 * WARPS, num_stages=1):
        more = start + WARPS < blocks
        # The compiler moves no load across a branch, to where it would be waited for.
        if more:
            at, next_words, next_pairs = load_next(
                at, start + WARPS, bits, rows, blocks, ROWS, WARPS, GROUPS, BITS, T
            )
            next_xs, next_sums = load_tokens(at, GROUPS, T)
        totals = _turn(
            totals, start, blocks, words, pairs, xs, scale_sums, late,
            half_bin, ROWS, WARPS, GROUPS, BITS, T, ASM,
        )  # fmt: skip
        if more:
            if start + 2 * WARPS < blocks:
                at, words, pairs = load_next(
                    at, start + 2 * WARPS, bits, rows, blocks, ROWS, WARPS, GROUPS, BITS, T
                )
                xs, scale_sums = load_tokens(at, GROUPS, T)
            totals = _turn(
                totals, start + WARPS, blocks, next_words, next_pairs, next_xs, next_sums, late,
                half_bin, ROWS, WARPS, GROUPS, BITS, T, ASM,
            )  # fmt: skip
    return totals


@triton.jit
def _crowded_sums(
    totals, at, words, pairs, bits, rows, blocks, tokens, late, column_bits, differ,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, MIXED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same where registers do not hold the tokens of two turns, or tokens may differ."""
    half_bin = _half_bin(bits, BITS, T)
    for start in tl.range(0, blocks, WARPS, num_stages=1):
        used, used_pairs = words, pairs
        xs, scale_sums = load_tokens(at, GROUPS, T)
        at, words, pairs = load_next(
            at, start + WARPS, bits, rows, blocks, ROWS, WARPS, GROUPS, BITS, T
        )
        # Always so, which the compiler does not know.
        if start + tokens > 0:
            if MIXED:  # noqa: SIM102
                if differ:
                    totals = _mixed_turn(
                        totals, start, blocks, used, used_pairs, xs, scale_sums, late, column_bits,
                        ROWS, WARPS, GROUPS, BITS, T, ASM,
                    )  # fmt: skip
            if not differ:
                totals = _turn(
                    totals, start, blocks, used, used_pairs, xs, scale_sums, late, half_bin,
                    ROWS, WARPS, GROUPS, BITS, T, ASM,
                )  # fmt: skip
    return totals


@triton.jit
def _multiplied(
    at, first, pairs, gain_bias_ptr, bits_ptr, out_ptr, rows, blocks, tokens, bits, token_bits,
    differ,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, MIXED: tl.constexpr, WAITS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Products of a tile of rows; the largest width is `bits`, in fields as wide as those of BITS.

    Pointers to what has rows point at the first; `first` and `pairs` are the first turn's
    (`load_first`). `WAITS` for the launch before, but for weights.
    """
    late = (tl.arange(0, 16) // 8)[None, :]
    n, t = tl.arange(0, ROWS), tl.arange(0, T)
    gain_row = (row_of(token_bits) * rows)[None, :] if MIXED else row_of(bits) * rows
    words = load_rest(at, first, bits, rows, blocks, ROWS, BITS)
    gain_bias = tl.load(gain_bias_ptr + gain_row + n[:, None])
    if WAITS:
        tl.extra.cuda.gdc_wait()
    column_bits = ()
    totals = ()
    for column_set in tl.static_range(sets_of(T)):
        token = tl.arange(0, 4) % column_tokens(T) + 4 * column_set
        of_columns = tl.load(bits_ptr + token, mask=token < tokens, other=2) if MIXED else token
        column_bits += (of_columns,)  # type: ignore[assignment]
        totals += (tl.zeros((WARPS, ROWS, 4), dtype=tl.float32),)  # type: ignore[assignment]
    if turns(T, GROUPS, MIXED) == 2:
        totals = _sums(
            totals, at, words, pairs, bits, rows, blocks, late, ROWS, WARPS, GROUPS, BITS, T, ASM
        )
    else:
        totals = _crowded_sums(
            totals, at, words, pairs, bits, rows, blocks, tokens, late, column_bits, differ,
            ROWS, WARPS, GROUPS, BITS, T, MIXED, ASM,
        )  # fmt: skip
    unit = tl.where(differ, 1.0 / unit_product(2, T), _unit(BITS, T))
    write(_of_tokens(totals, WARPS, ROWS, T) * unit, gain_bias, out_ptr, n, t, rows, tokens)


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "second", "third"])
def _narrow_kernel(
    x_ptr, scale_sum_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, bits_ptr, out_ptr,
    rows, blocks, padded_tokens, tokens, second, third,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
    T: tl.constexpr, MIXED: tl.constexpr, MOST_SLICES: tl.constexpr,
    PROGRAMMATIC: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    linear = (tile >= second).to(tl.int32) + (tile >= third).to(tl.int32)
    start = tile * ROWS
    gain_bias_ptr += start
    out_ptr += start
    bits_ptr += linear * padded_tokens
    t = tl.arange(0, T)
    at = places(
        digits_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start * 8, scale_zero_ptr + start,
        x_ptr, scale_sum_ptr, rows, blocks, WARPS, GROUPS, T,
    )  # fmt: skip
    first, pairs = load_first(at, rows, ROWS, WARPS, GROUPS)
    # Widths are what the launch before writes.
    KNOWN: tl.constexpr = BITS > 0 and not MIXED
    if PROGRAMMATIC and not KNOWN:
        tl.extra.cuda.gdc_wait()
    token_bits = tl.load(bits_ptr + t, mask=t < tokens, other=2) if MIXED else t
    largest = tl.max(token_bits, axis=0) if MIXED else tl.load(bits_ptr)
    bits = BITS if BITS > 0 else largest
    # Tokens that agree are multiplied by whole codes, whatever the host expected of them.
    differ = False
    if MIXED:
        differ = tl.min(tl.where(t < tokens, token_bits, largest), axis=0) < largest
    # A loop for each width of fields, unless the host knows which it is.
    for power in tl.static_range(1, 4):
        if (1 << power) // 2 < 2 * MOST_SLICES:  # noqa: SIM102
            if (BITS == 0) or (field_bits(BITS) == 1 << power):  # noqa: SIM102
                if (bits > (1 << power) // 2) & (bits <= 1 << power):
                    _multiplied(
                        at, first, pairs, gain_bias_ptr, bits_ptr, out_ptr, rows, blocks, tokens,
                        bits, token_bits, differ, ROWS, WARPS, GROUPS,
                        BITS if BITS > 0 else min(1 << power, 2 * MOST_SLICES), T,
                        MIXED and power > 1, PROGRAMMATIC and KNOWN, ASM,
                    )  # fmt: skip


def multiply_narrow(
    prepared: PreparedBytes, bits: int | None, weight: Digits, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """Up to 8 tokens times every linear's weight, with gain and bias.

    Arguments and result as those of `triton_uniform.multiply_uniform`, but for tokens that may
    differ in width: `bits` is None then.

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    slices, _, blocks, rows, _ = weight.digits_SHBN16.shape
    out = prepared.x_BT864.new_empty(prepared.tokens, rows, dtype=dtype)
    _narrow_kernel[(rows // tile.rows,)](
        prepared.x_BT864, prepared.scale_sum_B8T2, weight.digits_SHBN16, weight.scale_zero_GN,
        weight.gain_bias_WN, prepared.bits_LT, out, rows, blocks, prepared.bits_LT.shape[1],
        prepared.tokens, *next_linears(weight, tile.rows),
        ROWS=tile.rows, WARPS=tile.warps, GROUPS=BLOCK_INPUTS // weight.group_size,
        BITS=bits or 0, T=program_tokens(prepared.tokens), MIXED=prepared.mixed,
        MOST_SLICES=slices, ASM=not INTERPRETED, num_warps=tile.warps,
        maxnreg=most_registers(prepared.tokens, tile, weight.group_size), **launching(out.device),
    )  # fmt: skip
    return out


def most_registers(tokens: int, tile: Tile, group_size: int) -> int | None:
    """Of a thread; None for as many as it wants.

    One token waits more than it computes: so few that 12 warps share a multiprocessor, or 16 where
    a program has 8 of them. Small groups would spill, and so would 32 rows.
    """
    if tokens > 1 or group_size < 128 or tile.rows > 16:
        return None
    return 128 if tile.warps >= 8 else 168
