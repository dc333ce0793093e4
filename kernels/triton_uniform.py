"""Few tokens times quantized weights, all tokens of a linear at one width.

The host knows the width, or only the device does: then it is read, and one of several loops taken.
The slices of a weight are put together first: one product for a weight, whatever its width, where
`triton_mixed.py` has one for each slice.

At 2 bits words are digits as they are (`triton_tiles.digit`). Words of two slices become two words
of 4-bit fields, one for even and one for odd positions, and words of four slices four words of
8-bit fields, by one shift and one selection of bits each; what is missing of a field is zero. A
field becomes a float16 by masking alone, in the mantissa of a subnormal number: at bit m it is

    q 2^(m - 24)     where     q = code >> (8 - f)

for f bits a field. Matrix units take subnormal numbers as they are (Khattak and Mikaitis, arXiv
2512.07004, for all from the V100 on). Fields of 8 bits lie at bit 0, those of 4 bits at 0 or 4, all
of a group alike. The weight of w bits is s 2^(2-f) (q + 2^(f-w) / 2 - 2^(f-2) z); what does not
depend on the code is multiplied by sums of the tokens, per group.

Legend: N' N padded, B blocks of 256 inputs, G groups, T tokens, L linears of one input.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import Digits
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
    high_bits_of,
    launch,
    row_of,
    second_digits,
    words_in_register,
)
from mbq.kernels.triton_words import ALL_ROWS, load_rest

# Triton runs these at compile time; it reads them, too, hence their plainness.


@triton.constexpr_function
def field_bits(bits: int) -> int:
    """Of a combined word: 2, 4 or 8."""
    return 2 if bits == 2 else (4 if bits <= 4 else 8)


@triton.constexpr_function
def field_bit(p: int, bits: int) -> int:
    """The bit of a float16 at which the field at position p, of 4 or 8 bits, lies."""
    return 4 if bits <= 4 and p // 2 % 2 else 0


@triton.constexpr_function
def field_one(p: int, bits: int) -> float:
    """What a field of 1 at position p adds to a float16; digits of 2 bits are whole numbers."""
    return 1.0 if bits == 2 else 2.0 ** (field_bit(p, bits) - 24)


@triton.constexpr_function
def unit(bits: int) -> float:
    """What sums of fields, each part in terms of its largest, are multiplied by."""
    return 4.0 / (1 << field_bits(bits)) / field_one(2, bits)


@triton.constexpr_function
def combining(bits: int) -> str:
    """PTX that makes words of fields ($0 ...) of two words of each slice (after them)."""
    twos, fours = "2, 0xCCCCCCCC", "4, 0xF0F0F0F0"
    if bits <= 4:
        return paired("$0 $1 $2 $3", twos)
    body = "{ .reg .b32 a, b, c, d, z; mov.b32 z, " + ("0; " if bits == 6 else "$7; ")
    body += paired("a b $4 $5", twos) + paired("c d $6 z", twos)
    return body + paired("$0 $2 a c", fours) + paired("$1 $3 b d", fours) + "}"


@triton.constexpr_function
def paired(registers: str, cut: str) -> str:
    """PTX that puts fields of two words side by side.

    Args:
        registers: for those at even positions, and at odd ones; of the high and the low fields.
        cut: how wide a field is, and the mask of high fields.
    """
    even, odd, high, low = registers.split()
    by, mask = cut.split(", ")
    body = "{ .reg .b32 t, u; shl.b32 t, " + high + ", " + by + "; shr.u32 u, " + low + ", " + by
    body += "; lop3.b32 " + even + ", t, " + low + ", " + mask + ", 0xE4; "
    return body + "lop3.b32 " + odd + ", " + high + ", u, " + mask + ", 0xE4; } "


@triton.constexpr_function
def extracting(p: int, bits: int) -> str:
    """PTX that makes float16 of the fields at position p ($0), of a word that holds them ($1)."""
    if bits > 4:
        return "and.b32 $0, $1, 0x00FF00FF;" if p < 4 else "prmt.b32 $0, $1, 0, 0x4341;"
    mask = "0x00F000F0" if field_bit(p, bits) else "0x000F000F"
    if p < 4:
        return "and.b32 $0, $1, " + mask + ";"
    return "{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 $0, t, " + mask + "; }"


@triton.constexpr_function
def high_fields(width: int, dtype: Any) -> int:
    """The mask of every other field, as an int16 or an int32."""
    mask = 0xCCCCCCCC if width == 2 else 0xF0F0F0F0
    return int(mask >> 16) - (1 << 16) if dtype.primitive_bitwidth == 16 else mask - (1 << 32)


@triton.jit
def _paired(high, low, WIDTH: tl.constexpr):
    """What `paired` makes; in the interpreter."""
    mask: tl.constexpr = high_fields(WIDTH, high.dtype)
    return (high << WIDTH) & mask | low & ~mask, high & mask | (low >> WIDTH) & ~mask


@triton.jit
def combined(
    first, second, third, fourth, BITS: tl.constexpr, SLICES: tl.constexpr, ASM: tl.constexpr
):
    """Words of fields, int16 or int32 as the words are: as many as a field has slices.

    Some are written before all of what they are made of is read, hence `&`.
    """
    body: tl.constexpr = combining(BITS)
    pack: tl.constexpr = words_in_register(first.dtype)
    if not ASM:
        even, odd = _paired(first, second, 2)
        if SLICES == 2:
            return even, odd, even, odd
        low_even, low_odd = _paired(third, fourth if SLICES > 3 else tl.zeros_like(third), 2)
        zeroth, second = _paired(even, low_even, 4)
        first, third = _paired(odd, low_odd, 4)
        return zeroth, first, second, third
    if SLICES == 2:
        even, odd = tl.inline_asm_elementwise(
            body, "=&r,=&r,r,r", [first, second],
            dtype=(first.dtype, first.dtype), is_pure=True, pack=pack,
        )  # fmt: skip
        return even, odd, even, odd
    if SLICES == 3:
        return tl.inline_asm_elementwise(
            body, "=&r,=&r,=&r,=&r,r,r,r", [first, second, third],
            dtype=(first.dtype, first.dtype, first.dtype, first.dtype), is_pure=True, pack=pack,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        body, "=&r,=&r,=&r,=&r,r,r,r,r", [first, second, third, fourth],
        dtype=(first.dtype, first.dtype, first.dtype, first.dtype), is_pure=True, pack=pack,
    )  # fmt: skip


@triton.jit
def extracted(word, p: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """The fields at position p of the int16 words that hold it, as float16."""
    if ASM:
        made = tl.inline_asm_elementwise(
            extracting(p, BITS), "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        mask: tl.constexpr = (0xFF if BITS > 4 else 0x0F) << field_bit(p, BITS)
        made = ((word if p < 4 else word >> 8) & mask).to(tl.int16).to(tl.float16, bitcast=True)
    return made


@triton.jit
def fields_of(words, late, BITS: tl.constexpr, SIGNED: tl.constexpr, ASM: tl.constexpr):
    """Four words of codes in fields of 2, 4 or 8 bits, of words of digits (`load_rest`).

    Where bytes have signs, fields of 8 bits hold 128 less than a code.
    """
    SLICES: tl.constexpr = (BITS + 1) // 2
    first, high, low, third, fourth = words
    if SLICES == 1:
        return first, first, first, first
    second = second_digits(high, low, late, high_bits_of(high), ASM)
    if SIGNED and SLICES > 2:
        first = first ^ high_bits_of(first)
    return combined(first, second, third, fourth, BITS, SLICES, ASM)


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
