"""What the multiplying kernels share: digits, and how products are cut into tiles and summed.

Of the second slice, whose planes hold high and low bits, a word of each serves 32 inputs: they are
shifted by a bit for the last 16, and digits put together.

A digit becomes a float16 without any arithmetic: two bits in the mantissa of a power of two,

    ((word << or >> shift) & (3 << b)) | magic   =   2^(10 - b) + q

one instruction for two weights.

A program makes a tile of rows and tokens over a part of the inputs. The last program of a tile to
finish adds up all parts in the order of their numbers, so results are the same from run to run.

Everything is judged by `reference.routed_linear`. Under Triton's interpreter there is no inline
assembly.

Legend: N out_features, T tokens.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, ODD_BITS, Digits
from mbq.kernels.triton_operands import loads_ahead
from mbq.kernels.triton_prepare import PreparedHalves, digit_bit, launching, zeros

INTERPRETED = bool(triton.knobs.runtime.interpret)
# So that the counters seldom grow.
_COUNTERS = 4096


@dataclass(frozen=True)
class Tile:
    """How a multiplication is cut: rows a program, programs along K, warps, loads in flight.

    There are no more programs along K than blocks of inputs.
    Of more than 8 tokens a warp has 16 rows or a multiple; of fewer (`triton_narrow.py`) split and
    stages are 1.
    """

    rows: int
    split: int
    warps: int
    stages: int


# PTX that makes two words ($0) of high and low bits ($1, $2), shifted by $3, under a selector ($4).
REJOINING = tl.constexpr(
    "{ .reg .b32 t, u; shf.l.wrap.b32 t, 0, $1, $3; shf.r.wrap.b32 u, $2, 0, $3; "
    "lop3.b32 $0, t, u, $4, 0xE4; }"
)
# High bits of the second slice.
ODD = tl.constexpr(ODD_BITS)
# The same of two words.
_ODD_PAIR = tl.constexpr(ODD_BITS << 16 | ODD_BITS & 0xFFFF)


@triton.constexpr_function
def words_in_register(dtype: Any) -> int:
    """Elements of int16 or int32 in the 32 bits that assembly works on."""
    return 32 // dtype.primitive_bitwidth


@triton.jit
def high_bits_of(words):
    """Which bits of words like these, int16 or int32, are high ones of the second slice."""
    return tl.full(words.shape, ODD if words.dtype == tl.int16 else _ODD_PAIR, words.dtype)


@triton.jit
def second_digits(high, low, late, selector, ASM: tl.constexpr):
    """Words of the second slice's digits, from those of its high bits and of its low bits.

    int16, or two words in an int32. `late` is 1 for the last 16 inputs of 32, else 0; `selector`
    says which bits are high ones.
    """
    if ASM:
        made = tl.inline_asm_elementwise(
            REJOINING.value, "=r,r,r,r,r", [high, low, late, selector],
            dtype=high.dtype, is_pure=True, pack=words_in_register(high.dtype),
        )  # fmt: skip
    else:
        made = ((high << late) & selector) | ((low >> late) & ~selector)
    return made


@triton.jit
def row_of(bits):
    """Where a width stands in WIDTHS."""
    return tl.where(bits <= 4, bits - 2, bits // 2)


@triton.constexpr_function
def assembly(p: int) -> str:
    """PTX that makes the digit at position p of two words ($1) with mask $2 and magic $3."""
    if p < 2:
        return "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, $2, $3, 0xEA; }"
    if p < 5:
        return "lop3.b32 $0, $1, $2, $3, 0xEA;"
    return "{ .reg .b32 t; shr.u32 t, $1, 6; lop3.b32 $0, t, $2, $3, 0xEA; }"


@triton.jit
def digit(word, p: tl.constexpr, selector, ASM: tl.constexpr):
    """The digit at position p of int16 words, under a mask of 3, 2 or 1.

    As float16: its value plus 2^(10 - bit).
    """
    bit: tl.constexpr = digit_bit(p)
    magic: tl.constexpr = (25 - bit) << 10
    # A choice of constants: a mask that is computed, and `elif` too, would keep the compiler from
    # bringing words, rather than digits, to the threads that need them.
    mask = tl.full(word.shape, 3 << bit, tl.int16)
    if selector == 2:
        mask = tl.full(word.shape, 2 << bit, tl.int16)
    if selector == 1:
        mask = tl.full(word.shape, 1 << bit, tl.int16)
    if ASM:
        g = tl.full(word.shape, magic, tl.int16)
        made = tl.inline_asm_elementwise(
            assembly(p), "=r,r,r,r", [word, mask, g], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        shifted = (word << 4) if p < 2 else (word if p < 5 else (word >> 6))
        made = ((shifted & mask) | magic).to(tl.int16).to(tl.float16, bitcast=True)
    return made


@triton.jit
def halves(pair):
    """Float32 values of the low and the high float16 of int32 pairs."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def finish(
    total, gain_row, unscale_ptr, part_ptr, arrived_ptr, out_ptr, n, t, rows, padded_tokens, tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a tile of sums, with gain and bias; the last program of a tile adds up all parts."""
    tile = tl.program_id(0)
    finished = True
    if SPLIT > 1:
        parts = part_ptr + t[None, :] * rows + n[:, None]
        size = padded_tokens.to(tl.int64) * rows
        there = t[None, :] < tokens
        tl.store(parts + tl.program_id(1) * size, total, mask=there)
        tl.debug_barrier()
        counter = arrived_ptr + tl.program_id(2) * tl.num_programs(0) + tile
        finished = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if finished:
            total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for p in tl.range(0, SPLIT):
                total += tl.load(parts + p * size, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if finished:
        gain_bias = tl.load(gain_row + n[:, None])
        total *= tl.load(unscale_ptr + t)[None, :]
        write(total, gain_bias, out_ptr, n, t, rows, tokens)


@triton.jit
def write(total, gain_bias, out_ptr, n, t, rows, tokens):
    """Write sums [rows, tokens], with gain and bias."""
    gain, bias = halves(gain_bias)
    y = gain * total + bias
    at = t[None, :].to(tl.int64) * rows + n[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=t[None, :] < tokens)


def launch(
    kernel: Any,
    prepared: PreparedHalves,
    pointers: tuple[Tensor, ...],
    weight: Digits,
    tile: Tile,
    width: int,
    dtype: torch.dtype,
    **constants: int,
) -> Tensor:
    """Multiply by a kernel.

    Args:
        pointers: what it reads beside all that every kernel does.
        width: tokens of a program.

    Returns [T, N'], linears side by side.

    Raises:
        ValueError: a tile would reach from one linear into the next, or has no inputs.
    """
    *_, blocks, rows, _ = weight.digits_SHBN16.shape
    if tile.split > blocks:
        raise ValueError(f"{tile.split} programs along K are more than {blocks} blocks of inputs")
    padded_tokens = len(prepared.x_TK)
    grid = (rows // tile.rows, tile.split, padded_tokens // width)
    out = weight.digits_SHBN16.new_empty(prepared.tokens, rows, dtype=dtype)
    parts = prepared.sum_GT.new_empty(tile.split if tile.split > 1 else 0, padded_tokens, rows)
    counters = zeros(out.device, "tiles", max(grid[0] * grid[2], _COUNTERS))
    kernel[grid](
        prepared.x_TK, weight.digits_SHBN16, weight.scale_zero_GN, weight.gain_bias_WN,
        prepared.sum_GT, prepared.bias_sum_GT, prepared.unscale_T, *pointers,
        parts, counters, out, rows, blocks, padded_tokens, prepared.tokens,
        *next_linears(weight, tile.rows),
        ROWS=tile.rows, TOKENS=width, SPLIT=tile.split, WARPS=tile.warps,
        BLOCK_GROUPS=BLOCK_INPUTS // weight.group_size, AHEAD=_ahead(tile.warps, out.device),
        ASM=not INTERPRETED, num_warps=tile.warps, num_stages=tile.stages,
        **launching(out.device), **constants,
    )  # fmt: skip
    return out


@cache
def _ahead(warps: int, device: torch.device) -> bool:
    """`loads_ahead` of a device; the interpreter does as Hopper does."""
    cuda = device.type == "cuda"
    return loads_ahead(warps, torch.cuda.get_device_capability(device) if cuda else (9, 0))


def next_linears(weight: Digits, tile_rows: int) -> tuple[int, int]:
    """The tiles at which the second and the third linear start, or more than there are.

    Raises:
        ValueError: a tile would reach from one linear into the next.
    """
    if any(start % tile_rows for start in weight.starts):
        raise ValueError(f"tiles of {tile_rows} rows do not divide linears of {weight.starts} rows")
    last = weight.starts[-1]
    second, third = [*(start // tile_rows for start in weight.starts[1:]), last, last][:2]
    return second, third
