"""Words and scales for products of few tokens: where they lie, and when they are asked for.

Warps take blocks of inputs in turn, all of the same rows (`triton_narrow.py`); the blocks that they
take at a time are a turn. Of a block, a tile of rows reads one piece of each plane, 32 bytes a row,
and one piece for each group, 4 bytes of scale and zero a row.

What every width reads, words of the first slice and scales, is loaded apart from what only some do:
it can be asked for before the width is known.

Legend: W warps.
"""

import triton
import triton.language as tl


@triton.jit
def _scale_pairs(
    scale_zero_ptr, block, rows, WARPS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Scales and zeros of a block for each warp, by group: int32 [W, ROWS] each.

    16 rows at a time: the compiler loads what has fewer elements than threads to where it is used.
    """
    pairs = ()
    at = scale_zero_ptr + tl.arange(0, 16)[None, :]
    for group in tl.static_range(GROUPS):
        group_ptr = at + ((block * GROUPS + group) * rows)[:, None]
        pair = tl.load(group_ptr)
        if ROWS == 32:
            both = tl.join(pair, tl.load(group_ptr + 16))
            pair = tl.reshape(tl.permute(both, (0, 2, 1)), (WARPS, ROWS))
        pairs += (pair,)  # type: ignore[assignment]
    return pairs


@triton.jit
def _places(rows, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """Of what is loaded of words at once: the warp of each row, and where in a block words lie.

    In the two planes of a slice, and in one, where each word serves twice.
    """
    of_row = tl.arange(0, ROWS * WARPS)
    word = tl.arange(0, 16)
    row = of_row // (8 * WARPS) * 8 + of_row % 8
    narrow = row[:, None] * 8 + (word % 8)[None, :]
    wide = narrow + (word // 8 * (blocks * rows * 8))[None, :]
    return of_row // 8 % WARPS, wide, narrow


@triton.jit
def load_first(
    word_pairs_ptr, scale_zero_ptr, start, rows, blocks,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """What every width reads of the turn from a block on: words of the first slice, and scales.

    Warps that have no block left take the last one.
    """
    row_warp, wide, _ = _places(rows, blocks, ROWS, WARPS)
    block = tl.minimum(start + row_warp, blocks - 1)
    first = tl.load(word_pairs_ptr + (block.to(tl.int64) * rows * 8)[:, None] + wide)
    block = tl.minimum(start + tl.arange(0, WARPS), blocks - 1)
    return first, _scale_pairs(scale_zero_ptr, block, rows, WARPS, ROWS, GROUPS)


@triton.jit
def load_rest(
    word_pairs_ptr, first, start, rows, blocks,
    ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """All words that a width reads of a turn, given those of the first slice.

    Those of the first slice, the high and the low bits of the second, the third slice, the fourth;
    what the width does not read repeats the first.
    """
    SLICES: tl.constexpr = (BITS + 1) // 2
    row_warp, wide, narrow = _places(rows, blocks, ROWS, WARPS)
    block = tl.minimum(start + row_warp, blocks - 1)
    block_ptr = word_pairs_ptr + (block.to(tl.int64) * rows * 8)[:, None]
    plane_words = blocks * rows * 8
    slice_words = 2 * plane_words.to(tl.int64)
    high = tl.load(block_ptr + slice_words + narrow) if SLICES > 1 else first
    low = tl.load(block_ptr + slice_words + plane_words + narrow) if BITS > 3 else first
    third = tl.load(block_ptr + 2 * slice_words + wide) if SLICES > 2 else first
    fourth = tl.load(block_ptr + 3 * slice_words + wide) if SLICES > 3 else first
    return first, high, low, third, fourth
