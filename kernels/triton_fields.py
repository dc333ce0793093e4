"""Words of digits put together to words of codes, and codes taken out of them.

At 2 bits words are digits as they are (`triton_tiles.digit`). Words of two slices become two words
of 4-bit fields, one for even and one for odd positions, and words of four slices four words of
8-bit fields, by one shift and one selection of bits each; what is missing of a field is zero. A
field becomes a float16 by masking alone, in the mantissa of a subnormal number: at bit m it is

    q 2^(m - 24)     where     q = code >> (8 - f)

for f bits a field. Matrix units take subnormal numbers as they are (Khattak and Mikaitis, arXiv
2512.07004, for all from the V100 on). Fields of 8 bits lie at bit 0, those of 4 bits at 0 or 4, all
of a group alike. The weight of w bits is s 2^(2-f) (q + 2^(f-w) / 2 - 2^(f-2) z); what does not
depend on the code is multiplied by sums of the tokens, per group.

Legend: p the position of a digit or a field in a word (`digits.py`).
"""

from typing import Any

import triton
import triton.language as tl

from mbq.kernels.triton_tiles import high_bits_of, second_digits, words_in_register

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
