"""Words and scales for products of few tokens: where they lie, and when they are asked for.

Warps take blocks of inputs in turn, all of the same rows (`triton_narrow.py`); the blocks that they
take at a time are a turn. Of a block, a tile of rows reads one piece of each plane, 32 bytes a row,
and one piece for each group, 4 bytes of scale and zero a row.

What every width reads, words of the first slice and scales, is loaded apart from what only some do:
it can be asked for before the width is known. Without taking registers the L2 cache can be asked
for what comes later (Hopper and after): words and scales of later turns, a piece for each lane, and
the first blocks of the product after this one, shared by all warps of the launch.

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


@triton.jit
def _later(blocks, TIMES: tl.constexpr, WARPS: tl.constexpr):
    """Blocks of each warp after its first, each so many times, until it has no lanes left.

    Returns the block, which of its times it is, and whether there is such a block: [32 W] each.
    """
    lane, warp = tl.arange(0, 32 * WARPS) % 32, tl.arange(0, 32 * WARPS) // 32
    block = (1 + lane // TIMES) * WARPS + warp
    return block, lane % TIMES, block < blocks


@triton.jit
def later_words(rows, blocks, WARPS: tl.constexpr, PLANE: tl.constexpr, PLANES: tl.constexpr):
    """Where words of later blocks begin, in so many planes from one on, and whether they do."""
    block, i, there = _later(blocks, PLANES, WARPS)
    return ((PLANE + i).to(tl.int64) * blocks + block) * rows * 8, there


@triton.jit
def later_scales(rows, blocks, WARPS: tl.constexpr, GROUPS: tl.constexpr):
    """Where scales of later blocks begin, a group each, and whether they do."""
    block, i, there = _later(blocks, GROUPS, WARPS)
    return (block * GROUPS + i) * rows, there


# Units of 16 bytes in one request: the instruction counts them in 16 bits.
_MOST_UNITS = tl.constexpr(0xFFFF)
# Brings $2 bytes at $1 to the L2 cache, if there are any.
_PREFETCH = tl.constexpr(
    "{ .reg .pred some; setp.ne.b32 some, $2, 0; "
    "@some cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


@triton.jit
def _prefetch(at, size):
    tl.inline_asm_elementwise(
        _PREFETCH.value, "=r,l,r", [at, size], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def pieces(size, stride, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """So many bytes, a multiple of 16, of each of some parts that lie a stride apart.

    Every warp of all programs has a piece of each part, none above 1 MiB, and a lane for each.
    Returns where pieces begin and how long they are, in bytes, 0 for other lanes: [32 W] each.
    """
    lane, warp = tl.arange(0, 32 * WARPS) % 32, tl.arange(0, 32 * WARPS) // 32
    units = tl.minimum(tl.cdiv(size // 16, tl.num_programs(0) * WARPS), _MOST_UNITS)
    start = (tl.program_id(0) * WARPS + warp) * units * 16
    there = (lane < PARTS) & (start < size)
    at = start + lane.to(tl.int64) * stride
    return at, tl.where(there, tl.minimum(units * 16, size - start), 0)


@triton.jit
def prefetch_next(ptr, size, stride, PARTS: tl.constexpr, WARPS: tl.constexpr):
    """Bring what another launch reads to the L2 cache; all programs take part (`pieces`)."""
    at, sizes = pieces(size, stride, PARTS, WARPS)
    _prefetch(ptr.to(tl.pointer_type(tl.int8), bitcast=True) + at, sizes)


@triton.jit
def prefetch_first(
    word_pairs_ptr, scale_zero_ptr, rows, blocks,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Bring what every width reads of later blocks to the L2 cache."""
    at, exists = later_words(rows, blocks, WARPS, 0, 2)
    _prefetch(word_pairs_ptr + at, tl.where(exists, 32 * ROWS, 0))
    at, exists = later_scales(rows, blocks, WARPS, GROUPS)
    _prefetch(scale_zero_ptr + at, tl.where(exists, 4 * ROWS, 0))


@triton.jit
def prefetch_rest(
    word_pairs_ptr, rows, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr, BITS: tl.constexpr
):
    """The same of what a width above 2 reads beside that."""
    at, exists = later_words(rows, blocks, WARPS, 2, BITS - 2)
    _prefetch(word_pairs_ptr + at, tl.where(exists, 32 * ROWS, 0))
