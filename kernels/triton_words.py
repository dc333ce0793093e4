"""Words, scales and tokens for products of few tokens: where they lie, and when they are asked for.

Warps take blocks of inputs in turn, all of the same rows (`triton_narrow.py`); the blocks that they
take at a time are a turn. Of a block, a tile of rows reads one piece of each plane, 32 bytes a row,
and one piece for each group, 4 bytes of scale and zero a row; of tokens, 512 bytes each, and 8
scales and sums (`triton_bytes.py`). Where each warp's lie is computed once, and moves by as much
every turn; a warp that has no block left stays at its last one.

What every width reads, words of the first slice and scales, is loaded apart from what only some do:
it can be asked for before the width is known. `word_places` and `load_rest` serve more tokens, too
(`triton_operands.py`).

Legend: W warps, T tokens of a program.
"""

from typing import Any

import triton
import triton.language as tl

from mbq.kernels.triton_bytes import halves_of, parts_of, sets_of

# Rows of `load_words` where all of them are pointed at.
ALL_ROWS = tl.constexpr(8)


@triton.constexpr_function
def _row_words(pointer: Any) -> int:
    """Of a row of a plane's block: 16 of int16, or 8 pairs of them in int32."""
    return 256 // pointer.dtype.element_ty.primitive_bitwidth


@triton.jit
def word_places(row_at, rows, blocks):
    """Pointers to words [n, 16 or 32], given those to rows [n, 1] in a block of the first plane.

    In the two planes of the first slice, and in the first plane of the second, where each serves
    twice. Words are int16, or pairs of them in int32, as the pointers are.
    """
    WORDS: tl.constexpr = _row_words(row_at)
    word = tl.arange(0, 2 * WORDS)
    plane_words = (blocks * rows).to(tl.int64) * WORDS
    wide_at = row_at + (word // WORDS * plane_words + word % WORDS)[None, :]
    return wide_at, row_at + (2 * plane_words + word % WORDS)[None, :]


@triton.jit
def places(
    word_pairs_ptr, scale_zero_ptr, x_ptr, scale_sum_ptr, rows, blocks,
    WARPS: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Where each warp's first block begins, as pointers.

    To pairs of words, of the 8 rows that a matrix instruction takes at once, [W 8, 16]
    (`word_places`). To scales and zeros of 16 rows, [W, 16]. To tokens in their columns,
    [W 8, 16], and to their scales and sums, [W].
    """
    row, word, warp = tl.arange(0, WARPS * 8), tl.arange(0, 16), tl.arange(0, WARPS)
    block, of_warp = tl.minimum(row // 8, blocks - 1), tl.minimum(warp, blocks - 1)
    row_at = word_pairs_ptr + (block.to(tl.int64) * rows * 8 + row % 8 * 8)[:, None]
    wide_at, narrow_at = word_places(row_at, rows, blocks)
    scales_at = scale_zero_ptr + (of_warp * (GROUPS * rows))[:, None] + word[None, :]
    x_at = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    x_at += (block * (128 * T) + row % 8 * 16)[:, None] + word[None, :]
    return wide_at, narrow_at, scales_at, x_at, scale_sum_ptr + of_warp * (16 * T)


@triton.jit
def _next_places(
    at, start, rows, blocks, WARPS: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr
):
    """The same for the turn from a block on."""
    wide_at, narrow_at, scales_at, x_at, scale_sum_at = at
    there = (start + tl.arange(0, WARPS * 8) // 8 < blocks)[:, None]
    warp_there = start + tl.arange(0, WARPS) < blocks
    words, scales = rows * (8 * WARPS), rows * (GROUPS * WARPS)
    wide_at += tl.where(there, words, 0)
    narrow_at += tl.where(there, words, 0)
    scales_at += tl.where(warp_there, scales, 0)[:, None]
    x_at += tl.where(there, 128 * WARPS * T, 0)
    scale_sum_at += tl.where(warp_there, 16 * WARPS * T, 0)
    return wide_at, narrow_at, scales_at, x_at, scale_sum_at


@triton.jit
def load_words(at, there, ROWS: tl.constexpr):
    """Words of more rows than are pointed at, 8 at a time, so that one address serves them.

    [ROWS / 8 W 8, 16], where 8 rows of each warp are pointed at; those that are, if ROWS is 8.
    """
    made = tl.load(at, mask=there, other=0)
    if ROWS > 8:
        second = tl.load(at + 64, mask=there, other=0)
        if ROWS == 16:
            made = tl.permute(tl.join(made, second), (2, 0, 1))
        else:
            third = tl.load(at + 128, mask=there, other=0)
            fourth = tl.load(at + 192, mask=there, other=0)
            made = tl.permute(tl.join(tl.join(made, third), tl.join(second, fourth)), (2, 3, 0, 1))
        made = tl.reshape(made, (ROWS // 8 * at.shape[0], 16))
    return made


@triton.jit
def load_first(at, rows, ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr):
    """What every width reads of a turn: words of the first slice, and scales.

    Words [ROWS / 8 W 8, 16], and for each group scales and zeros int32 [W, ROWS].
    """
    wide_at, _, scales_at, _, _ = at
    pairs = ()
    # 16 rows at a time: the compiler loads what has fewer elements than threads to where it is
    # used.
    for group in tl.static_range(GROUPS):
        pair = tl.load(scales_at + group * rows)
        if ROWS == 32:
            both = tl.join(pair, tl.load(scales_at + group * rows + 16))
            pair = tl.reshape(tl.permute(both, (0, 2, 1)), (WARPS, ROWS))
        pairs += (pair,)  # type: ignore[assignment]
    return load_words(wide_at, True, ROWS), pairs


@triton.jit
def load_rest(at, first, bits, rows, blocks, ROWS: tl.constexpr, BITS: tl.constexpr):
    """All words that a width, BITS at most, reads of a turn, given those of the first slice.

    Those of the first slice, the high and the low bits of the second, the third slice, the fourth;
    what the width does not read is zero, or repeats the first.
    """
    SLICES: tl.constexpr = (BITS + 1) // 2
    wide_at, narrow_at = at[0], at[1]
    plane_words = (blocks * rows).to(tl.int64) * _row_words(wide_at)
    high = load_words(narrow_at, True, ROWS) if SLICES > 1 else first
    low = tl.zeros_like(first)
    if BITS > 3:
        low = load_words(narrow_at + plane_words, bits > 3, ROWS)
    third = load_words(wide_at + 4 * plane_words, True, ROWS) if SLICES > 2 else first
    fourth = load_words(wide_at + 6 * plane_words, bits > 6, ROWS) if SLICES > 3 else first
    return first, high, low, third, fourth


@triton.jit
def load_next(
    at, start, bits, rows, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Places of the turn from a block on, and all that a width reads of weights there."""
    at = _next_places(at, start, rows, blocks, WARPS, GROUPS, T)
    first, pairs = load_first(at, rows, ROWS, WARPS, GROUPS)
    return at, load_rest(at, first, bits, rows, blocks, ROWS, BITS), pairs


@triton.constexpr_function
def column_tokens(tokens: int) -> int:
    """Of the four tokens that columns hold at a time, how many differ."""
    return min(tokens, 4)


@triton.jit
def load_tokens(at, GROUPS: tl.constexpr, T: tl.constexpr):
    """Tokens of a turn: T times int32 [W 8, 16], and scales and sums.

    Of these, for each part of a block, each half of 32 inputs that has a group of its own and each
    set of columns, float32 [W, 4, 2].
    """
    _, _, _, x_at, scale_sum_at = at
    xs = ()
    for i in tl.static_range(T):
        xs += (tl.load(x_at + 128 * i),)  # type: ignore[assignment]
    column = tl.arange(0, 4)
    position, token = column // T, column % column_tokens(T)
    scale_sums = ()
    for part in tl.static_range(parts_of(T, GROUPS)):
        for half in tl.static_range(halves_of(GROUPS)):
            for column_set in tl.static_range(sets_of(T)):
                chunk = 8 // parts_of(T, GROUPS) * part + 2 * position + half
                place = (chunk * T + token + 4 * column_set) * 2
                place = place[:, None] + tl.arange(0, 2)[None, :]
                loaded = tl.load(scale_sum_at[:, None, None] + place[None, :, :])
                scale_sums += (loaded,)  # type: ignore[assignment]
    return xs, scale_sums
