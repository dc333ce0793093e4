"""Words of digits on their way to matrix units, for products of more than 8 tokens.

A thread takes 16 bytes of a row at a time, the codes of 8 neighbouring inputs of each chunk of 32.
Of a chunk matrix units want other inputs of a thread; so inputs change places, codes and tokens
(`triton_prepare.py`) alike, and nothing moves between threads:

    place 16 i + 8 h + 2 q + p    is of input    8 q + 4 i + 2 h + p    of a chunk

q being the number of the thread, of four that share a row. Rows change places, too: those of a warp
lie together.

Where warps multiply in groups of four, on Hopper, words go from memory to the very registers in
which matrix units take codes, a turn ahead; a turn is a block of 256 inputs. Up to four chunks are
multiplied at once: waiting for a product takes longer than the product. The data centres' Blackwell
does the same, but that codes go on to memory of its matrix units. Elsewhere words come through
shared memory, in the background, and products are of one chunk: chunks that are put side by side
would have to change registers there.

Legend: W warps, M times 16 rows of each.
"""

import triton
import triton.language as tl

from mbq.kernels.triton_words import ALL_ROWS, load_rest, word_places

# Architectures whose warps multiply in groups, and of how many.
_GROUPING = (9, 10, 11)
_GROUP = 4


def loads_ahead(warps: int, architecture: tuple[int, int]) -> bool:
    """Whether programs of so many warps ask for words a turn ahead."""
    return architecture[0] in _GROUPING and warps % _GROUP == 0


@triton.constexpr_function
def chunks_at_once(chunks: int, ahead: bool) -> int:
    """Of the chunks whose codes have one scale, as many as are multiplied at once."""
    return min(chunks, 4) if ahead else 1


@triton.jit
def input_places(j):
    """The places of inputs j of a chunk of 32."""
    return j // 4 % 2 * 16 + j // 2 % 2 * 8 + j // 8 * 2 + j % 2


@triton.jit
def rows_of_tile(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """The rows of a tile in the order of their places: int32 [ROWS]."""
    place = tl.arange(0, ROWS)
    of_warp = place // 16 % WARPS * (ROWS // WARPS)
    return of_warp + place // (16 * WARPS) * 16 + place % 16


@triton.jit
def digit_places(
    digits_ptr, first_row, block, rows, blocks, ROWS: tl.constexpr, WARPS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Where the words of a tile of rows lie in a block: pointers, as those of `word_places`.

    To pairs of words [ROWS, 16] where they are asked for ahead, as registers that hold less would
    be copied; else to words [ROWS, 32].
    """
    if AHEAD:
        digits_ptr = digits_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    WORDS: tl.constexpr = 256 // digits_ptr.dtype.element_ty.primitive_bitwidth
    # Loads bring 8 rows of every warp at a time.
    loaded = tl.arange(0, ROWS)
    row = loaded // 8 % WARPS * (ROWS // WARPS) + loaded // (8 * WARPS) * 8 + loaded % 8
    row_at = digits_ptr + (block.to(tl.int64) * rows + first_row) * WORDS
    return word_places(row_at + row[:, None] * WORDS, rows, blocks)


@triton.jit
def moved(at, blocks, rows):
    """Pointers of `digit_places` so many blocks further on."""
    words = rows * (at[0].shape[1] // 2)
    return at[0] + blocks * words, at[1] + blocks * words


@triton.jit
def late_words(at):
    """1 for words of the second plane of a block, else 0: [1, 16 or 32], of the words' type."""
    WORDS: tl.constexpr = at[0].shape[1]
    return (tl.arange(0, WORDS) // (WORDS // 2))[None, :].to(at[0].dtype.element_ty)


@triton.jit
def load_digits(at, bits, rows, blocks, BITS: tl.constexpr):
    """All words that a width, BITS at most, reads of a block, as `load_rest` gives them.

    Five of [ROWS, 16] or [ROWS, 32], as pointers are.
    """
    return load_rest(at, tl.load(at[0]), bits, rows, blocks, ALL_ROWS, BITS)


@triton.jit
def load_scales(
    scale_zero_ptr, block, rows, ROWS: tl.constexpr, WARPS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of a tile of rows, in their places: int32 [ROWS] for each group of a block.

    The pointer is to those of the tile.
    """
    pairs = ()
    for group in tl.static_range(BLOCK_GROUPS):
        at = scale_zero_ptr + (block * BLOCK_GROUPS + group) * rows
        if ROWS == 32 * WARPS:
            # 16 rows of every warp at a time: what has fewer elements than there are threads is
            # loaded to where it is used.
            place = tl.arange(0, ROWS // 2)
            at += place // 16 * 32 + place % 16
            both = tl.join(tl.load(at), tl.load(at + 16))
            pair = tl.reshape(tl.permute(both, (1, 0)), (ROWS,))
        else:
            pair = tl.load(at + rows_of_tile(ROWS, WARPS))
        pairs += (pair,)  # type: ignore[assignment]
    return pairs


@triton.jit
def words_apart(words, WARPS: tl.constexpr):
    """Words of a tile, one by one: int16 [M, 2, W, 8, 4, 2, 2, 2], of rows and inputs."""
    if words.dtype == tl.int32:
        words = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    return tl.reshape(words, (words.shape[0] // WARPS // 16, 2, WARPS, 8, 4, 2, 2, 2))


@triton.jit
def side_by_side(codes, WARPS: tl.constexpr):
    """Codes of one, two or four chunks in their places: [ROWS, 32 chunks]."""
    CHUNKS: tl.constexpr = len(codes)
    if CHUNKS == 1:
        made = tl.permute(codes[0], (0, 2, 1, 3, 5, 6, 4, 7))
    elif CHUNKS == 2:
        made = tl.permute(tl.join(codes[0], codes[1]), (0, 2, 1, 3, 8, 5, 6, 4, 7))
    else:
        four = tl.join(tl.join(codes[0], codes[2]), tl.join(codes[1], codes[3]))
        made = tl.permute(four, (0, 2, 1, 3, 8, 9, 5, 6, 4, 7))
    return tl.reshape(made, (made.shape[0] * WARPS * 16, 32 * CHUNKS))
