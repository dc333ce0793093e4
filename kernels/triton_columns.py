"""Few tokens as the columns of a matrix: the narrowest matrix instruction takes 8.

Of fewer tokens there are columns to spare, and a token has several, each for other chunks of 32
inputs: one load brings what would else take 8. Of T tokens and the 8 chunks of a block, load i has

    in column j    chunk 8 / T i + j // T    of token j % T

Where a chunk is multiplied, the columns of others are multiplied by zero. The columns of a token
are added when all is done.

The multiplication that selects columns also moves digits of 2 bits to where they belong: they meet
matrix units in the place that they have in a word, as subnormal numbers (`triton_uniform.py`),
shifted only where an exponent would begin, and inputs are divided by what that makes of them:

    q 2^(b - 24)  x 2^-b  =  q x 2^-24      for a digit q that lies at bit b

Words and tokens change places alike (`in_order`), so no register moves.

Legend: W warps, T tokens of a program: 1, 2, 4 or 8.
"""

import triton
import triton.language as tl

from mbq.kernels.triton_prepare import position_of
from mbq.kernels.triton_tiles import halves

# Columns of a program.
COLUMNS = 8
_COLUMNS = tl.constexpr(COLUMNS)
# Multiplies two float16 in a register by two others.
SCALING = tl.constexpr("mul.rn.f16x2 $0, $1, $2;")
# Digits of two words under a mask, as they lie and after a shift.
MASKING = tl.constexpr("and.b32 $0, $1, $2;")
SHIFTING = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 10; and.b32 $0, t, $2; }")


@triton.constexpr_function
def plain_bit(p: int) -> int:
    """The bit of a float16 at which the digit at position p of a word lies, in its mantissa."""
    return 2 * p if p < 5 else 2 * p - 10


@triton.constexpr_function
def two_halves(exponent: int) -> int:
    """2^exponent as a float16, twice in an int32."""
    return (exponent + 15) * 0x04000400


@triton.constexpr_function
def _load_of(c: int, tokens: int) -> int:
    """Which load brings a chunk."""
    return c * tokens // COLUMNS


@triton.constexpr_function
def _part_of(c: int, tokens: int) -> int:
    """And in which of a token's columns."""
    return c % (COLUMNS // tokens)


@triton.jit
def plain_digit(word, p: tl.constexpr, ASM: tl.constexpr):
    """The digit at position p of int16 words as float16: its value times 2^(bit - 24)."""
    mask = tl.full(word.shape, 3 << plain_bit(p), tl.int16)
    if ASM:
        if p < 5:
            made = tl.inline_asm_elementwise(
                MASKING.value, "=r,r,r", [word, mask], dtype=tl.float16, is_pure=True, pack=2
            )
        else:
            made = tl.inline_asm_elementwise(
                SHIFTING.value, "=r,r,r", [word, mask], dtype=tl.float16, is_pure=True, pack=2
            )
    else:
        shifted = word if p < 5 else word >> 10
        made = (shifted & mask).to(tl.int16).to(tl.float16, bitcast=True)
    return made


@triton.jit
def in_order(pairs, WARPS: tl.constexpr):
    """What 32 inputs have, two in an int32 as loaded, [M W 8, 16], apart and in order.

    int16 [M, W, 8, 2, 4, 2, 2]: groups, warps, rows, and inputs.
    """
    apart = tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    made = tl.reshape(apart, (pairs.shape[0] // WARPS // 8, WARPS, 8, 4, 2, 2, 2))
    return tl.permute(made, (0, 1, 2, 5, 3, 4, 6))


@triton.jit
def _in_columns(pairs, WARPS: tl.constexpr):
    """[W 8, 16] int32 to [W, 32, 8] float16."""
    made = tl.permute(in_order(pairs, WARPS), (0, 1, 3, 4, 5, 6, 2))
    return tl.reshape(made, (WARPS, 32, _COLUMNS)).to(tl.float16, bitcast=True)


@triton.jit
def token_places(x_ptr, tokens, blocks, WARPS: tl.constexpr, T: tl.constexpr):
    """Where the tokens of each warp's columns begin, as pairs of inputs: pointers [W 8, 16].

    What there are too few tokens for repeats the last one, and is thrown away.
    """
    column = tl.arange(0, WARPS * _COLUMNS) % _COLUMNS
    token = tl.minimum(column % T, tokens - 1)
    pairs_ptr = x_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    at = token * blocks * 128 + column // T * 16
    return pairs_ptr + at[:, None] + tl.arange(0, 16)[None, :]


@triton.jit
def load_tokens(
    x_at, sum_ptr, bias_sum_ptr, start, blocks, padded_tokens,
    WARPS: tl.constexpr, GROUPS: tl.constexpr, T: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """Tokens in the blocks from one on, one for each warp: inputs, and sums of their groups.

    T times [W 8, 16] int32; and for each group [W, 8] twice, plain and weighted by biases, in the
    first column of each token, zero in others. Warps that have no block left take the last one.
    """
    block = tl.minimum(start + tl.arange(0, WARPS * _COLUMNS) // _COLUMNS, blocks - 1)
    block_ptr = x_at + (block * 128)[:, None]
    xs = ()
    for i in tl.static_range(T):
        xs += (tl.load(block_ptr + i * (128 // T)),)  # type: ignore[assignment]
    block = tl.minimum(start + tl.arange(0, WARPS), blocks - 1)
    column = tl.arange(0, _COLUMNS)[None, :]
    sums = ()
    for group in tl.static_range(GROUPS):
        at = ((block * GROUPS + group) * padded_tokens)[:, None] + column
        plain = tl.load(sum_ptr + at, mask=column < T, other=0.0)
        weighted = tl.load(bias_sum_ptr + at, mask=column < T, other=0.0) if BIASED else plain
        sums += ((plain, weighted),)  # type: ignore[assignment]
    return xs, sums


@triton.jit
def chunk(
    xs, c: tl.constexpr, WARPS: tl.constexpr, T: tl.constexpr, PLAIN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Tokens at a chunk of inputs, in their columns of it: [W, 32, 8] float16.

    `PLAIN` if they meet digits as `plain_digit` makes them.
    """
    pairs = xs[_load_of(c, T)]
    if T < _COLUMNS:
        exponent: tl.constexpr = -plain_bit(position_of(c)) if PLAIN else 0
        column = tl.arange(0, WARPS * _COLUMNS) % _COLUMNS
        there = (column // T == _part_of(c, T))[:, None]
        if ASM:
            factor = tl.where(there, two_halves(exponent), 0)
            pairs = tl.inline_asm_elementwise(
                SCALING.value, "=r,r,r", [pairs, factor], dtype=tl.int32, is_pure=True, pack=1
            )
        else:
            low, high = halves(pairs)
            factor = tl.where(there, 2.0**exponent, 0.0)
            low = (low * factor).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            high = (high * factor).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
            pairs = (low & 0xFFFF) | (high << 16)
    return _in_columns(pairs, WARPS)


@triton.jit
def of_tokens(total, T: tl.constexpr):
    """Sums of columns [W, ROWS, 8] to those of tokens [W, ROWS, T]."""
    if T < _COLUMNS:
        shape: tl.constexpr = (total.shape[0], total.shape[1], _COLUMNS // T, T)
        total = tl.sum(tl.reshape(total, shape), axis=2)
    return total
