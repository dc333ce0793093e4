"""Codes and tokens as bytes, of which matrix units multiply twice as many at a time, exactly.

From a register come four codes under one mask, where of float16 it would be two. A token is two
bytes an input: whole numbers of 16 bits, times a power of two for each group of inputs,

    x = 2^e (256 high + low)      high, low from -128 to 127

which is x itself for inputs in bfloat16 down to a 64th of the largest of their group, and in
float16 to an 8th; others are off by little more than 2^-15 of the largest. The narrowest matrix
instruction takes 8 columns, the high and the low bytes of four tokens. Of fewer tokens there are
columns to spare, and a token has several, each at other inputs: one load brings what would else
take four.

A register holds two words of codes (`digits.py`): bytes of it, under a mask, are codes at positions
j and j + 4 of both, for inputs 64 j + 32 b + i, b and i being where they lie. So the 256 inputs of
a block are four positions j of 64 bytes each, byte 2 i + b, and of T tokens, load l has

    in column c    high (c even) or low bytes of token q % 2T // 2 at position q // 2T, q = 8 l + c

Columns at other positions than the codes that they are multiplied by are thrown away.

A thread loads 16 bytes of a row, or of a column, and matrix units take two times 8 of them, so
inputs change places (`_bytes`), which costs nothing: codes and tokens change alike, and no register
moves.

Legend: B blocks of 256 inputs, C chunks of 32 in all blocks, T tokens of a program, W warps.
"""

import triton
import triton.language as tl

# Tokens that a program takes at most.
FEW = 8
# Of a matrix instruction.
_COLUMNS = tl.constexpr(8)
_POSITIONS = tl.constexpr(4)


def program_tokens(tokens: int) -> int:
    """T for so many tokens, 8 at most: a power of two."""
    return 1 << (tokens - 1).bit_length()


@triton.constexpr_function
def parts_of(tokens: int, groups: int) -> int:
    """Parts of a block: positions whose sums have one scale, or lie in columns of their own."""
    return tokens if tokens < 4 else min(groups, 4)


@triton.constexpr_function
def sets_of(tokens: int) -> int:
    """Loads for one position: four tokens in each."""
    return 2 if tokens == FEW else 1


@triton.constexpr_function
def halves_of(groups: int) -> int:
    """Halves of 64 bytes whose sums have scales of their own."""
    return 2 if groups == 8 else 1


@triton.constexpr_function
def place(j: int, field: int) -> int:
    """Codes at position j of a word are multiplied by this power of 4."""
    return min(j, 2) if field == 2 else 0


@triton.constexpr_function
def _shift(j: int, field: int) -> int:
    """How far codes at position j are shifted, so that they are not the sign of a byte."""
    if field == 4:
        return 4 * (j // 2)
    return 2 if field == 2 and j == 3 else 0


@triton.constexpr_function
def _mask(j: int, field: int, selector: int) -> int:
    """Where the codes at positions j and j + 4 lie then, or some of their bits."""
    if field == 8:
        return -1
    return 0x0F0F0F0F if field == 4 else selector * 0x01010101 << (2 * place(j, field))


@triton.constexpr_function
def taking(j: int, field: int, selector: int) -> str:
    """PTX that takes the codes at positions j and j + 4 of four bytes ($1)."""
    bits = str(_mask(j, field, selector))
    if _shift(j, field):
        by = str(_shift(j, field))
        return "{ .reg .b32 t; shr.u32 t, $1, " + by + "; and.b32 $0, t, " + bits + "; }"
    return "and.b32 $0, $1, " + bits + ";"


@triton.jit
def _bytes(word, WARPS: tl.constexpr):
    """The bytes of int32 words [M W 8, 16], apart and in order.

    int8 [M, W, 8, 2, 4, 2, 4]: groups, warps, rows, and inputs.
    """
    zeroth, first = word.to(tl.int8), (word >> 8).to(tl.int8)
    second, third = (word >> 16).to(tl.int8), (word >> 24).to(tl.int8)
    apart = tl.join(tl.join(zeroth, second), tl.join(first, third))
    made = tl.reshape(apart, (word.shape[0] // WARPS // 8, WARPS, 8, 4, 2, 2, 4))
    return tl.permute(made, (0, 1, 2, 4, 3, 5, 6))


@triton.constexpr_function
def _word_of(j: int, field: int) -> int:
    """Of the words that codes are put together to, the one that has positions j and j + 4."""
    return {2: 0, 4: j % 2, 8: j}[field]


@triton.jit
def _codes(
    words, j: tl.constexpr, FIELD: tl.constexpr, SELECTOR: tl.constexpr, ROWS: tl.constexpr,
    WARPS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes at positions j and j + 4 of words [ROWS / 8 W 8, 16]: int8 [W, ROWS, 64].

    Of words of 2 bits there is one, of 4 bits there are two and of 8 bits four.
    """
    made = _bytes(words[_word_of(j, FIELD)], WARPS)
    if FIELD < 8:
        if ASM:
            made = tl.inline_asm_elementwise(
                taking(j, FIELD, SELECTOR), "=r,r", [made], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            made = (made >> _shift(j, FIELD) & (_mask(j, FIELD, SELECTOR) & 0x7F)).to(tl.int8)
    made = tl.permute(made, (1, 0, 2, 3, 4, 5, 6))
    return tl.reshape(made, (WARPS, ROWS, 64))


@triton.jit
def columns(xs, half: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr):
    """Loads of tokens, int32 [W 8, 16] to int8 [W, 64, 8]; of two halves the other is zero."""
    made = ()
    for i in tl.static_range(T):
        x = xs[i]
        if halves_of(GROUPS) > 1:
            x = x & (0x00FF00FF if half == 0 else -0x00FF0100)
        one = tl.permute(_bytes(x, WARPS), (0, 1, 3, 4, 5, 6, 2))
        made += (tl.reshape(one, (WARPS, 64, _COLUMNS)),)  # type: ignore[assignment]
    return made


@triton.constexpr_function
def _load_of(j: int, column_set: int, tokens: int) -> int:
    return tokens * j // 4 + column_set


@triton.constexpr_function
def _count(j: int, field: int) -> int:
    """What makes up for `place`, twice: the compiler would make a selection of a product with 1."""
    return 2 * 4 ** (2 - place(j, field)) if field == 2 else 2


@triton.constexpr_function
def unit_product(field: int, tokens: int) -> int:
    """What `multiplied` makes of a code of 1 and an input of 1."""
    return _count(0, field) if field == 2 or tokens < 4 else 1


@triton.jit
def multiplied(
    words, xs, part: tl.constexpr,
    ROWS: tl.constexpr, WARPS: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr,
    FIELD: tl.constexpr, SELECTOR: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes times whole numbers of tokens (`columns`), summed over a part of a block.

    float32 [W, ROWS, 4] for each set of columns, times `unit_product`.
    """
    LENGTH: tl.constexpr = _POSITIONS // parts_of(T, GROUPS)
    column = tl.arange(0, _COLUMNS)
    sums = ()
    for _ in tl.static_range(sets_of(T)):
        sums += (tl.zeros((WARPS, ROWS, _COLUMNS), dtype=tl.int32),)  # type: ignore[assignment]
    for j in tl.static_range(part * LENGTH, (part + 1) * LENGTH):
        codes = _codes(words, j, FIELD, SELECTOR, ROWS, WARPS, ASM)
        made = ()
        for column_set in tl.static_range(sets_of(T)):
            x = xs[_load_of(j, column_set, T)]
            if T >= 4 and FIELD > 2:
                total = tl.dot(codes, x, sums[column_set], out_dtype=tl.int32)
            else:
                counts = tl.full((_COLUMNS,), _count(j, FIELD), tl.int32)
                if T < 4:
                    # High bytes count 256 times; columns at other positions do not count.
                    counts *= tl.where(column % 2 == 0, 256, 1)
                    counts = tl.where(column // (2 * T) == j - part * LENGTH, counts, 0)
                product = tl.dot(codes, x, out_dtype=tl.int32)
                total = sums[column_set] + product * counts[None, None, :]
            made += (total,)  # type: ignore[assignment]
        sums = made
    totals = ()
    for column_set in tl.static_range(sets_of(T)):
        high, low = tl.split(tl.reshape(sums[column_set], (WARPS, ROWS, _COLUMNS // 2, 2)))
        total = high + low if T < 4 else high * 256 + low
        totals += (total.to(tl.float32),)  # type: ignore[assignment]
    return totals


@triton.jit
def store_tokens(
    x, token, x_ptr, scale_sum_ptr, blocks,
    CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A token, float32 [C, 32], as bytes, with the scale of each chunk and the sum of each group.

    int8 [B, T, 8, 64], loads and columns; float32 [B, 8, T, 2], a group's sum with its first chunk.
    Products with inputs above 2^112 may overflow.
    """
    GROUPS: tl.constexpr = CHUNKS // GROUP_CHUNKS
    by_group = tl.reshape(x, (GROUPS, GROUP_CHUNKS * 32))
    # 32639 at most: a little more, and what rounds to a high byte of 128 has an exponent more.
    tops = tl.max(tl.abs(by_group), axis=1) * 1.004
    exponents = tl.maximum(tops.to(tl.int32, bitcast=True) >> 23, 15)
    scales = ((exponents - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponents) << 23).to(tl.float32, bitcast=True)
    # To the nearest whole number, which is then in the low bits.
    shifted = by_group * inverse[:, None] + 12582912.0
    sums = tl.sum(shifted - 12582912.0, axis=1) * scales

    first = tl.arange(0, GROUP_CHUNKS)[None, :] == 0
    of_chunks = tl.broadcast_to(scales[:, None], (GROUPS, GROUP_CHUNKS))
    scale_sums = tl.join(of_chunks, tl.where(first, sums[:, None], 0.0))
    chunk = tl.arange(0, GROUPS)[:, None] * GROUP_CHUNKS + tl.arange(0, GROUP_CHUNKS)[None, :]
    scale_sum_at = ((chunk * T + token) * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(scale_sum_ptr + scale_sum_at, scale_sums, mask=(chunk < 8 * blocks)[:, :, None])

    # Bytes of two chunks take turns, high and low ones lie apart.
    number = tl.reshape(shifted.to(tl.int32, bitcast=True), (CHUNKS // 2, 2, 32))
    number = tl.reshape(tl.permute(number, (0, 2, 1)), (CHUNKS // 2, 64))
    both = tl.join(((number + 128) >> 8).to(tl.int8), number.to(tl.int8))
    two = tl.arange(0, CHUNKS // 2)[:, None]
    column = two % 4 * (2 * T) + 2 * token + tl.arange(0, 2)[None, :]
    at = ((two // 4 * (8 * T) + column) * 64)[:, :, None] + tl.arange(0, 64)[None, None, :]
    tl.store(x_ptr + at, tl.permute(both, (0, 2, 1)), mask=(two < 4 * blocks)[:, :, None])
