"""Few tokens times a quantized weight, at widths that only the device knows.

Two launches. The first prepares the tokens:

    x16   float16, each token scaled by a power of two so that its largest value is near 2^10
    sums  per group of inputs: sum of x16, and sum weighted by the bias of each digit (below)

The second multiplies. The weight of b bits is s * (sum_e q_e 4^-e + 2^(2-b) / 2 - z), e from 0. A
digit becomes a float16 without any arithmetic: two bits in the mantissa of a power of two,

    ((word << or >> shift) & (3 << b)) | magic   =   2^(10 - b) + q

one instruction for two weights. Tensor cores sum digits and their biases; the biases are taken off
per group by the weighted sums. Slices are the inner loop and their number is read from memory, so
one kernel, captured once in a graph, serves whatever widths the tokens turn out to have. A token
that takes fewer slices than another has zeros for inputs in the others: what is read follows the
hungriest token.

Where a token stops at 3 bits, the second slice takes two steps: its high bits, under the mask 2 in
place of 3, then its low bits, under the mask 1, with zeros for the tokens that stopped. A mask that
changes from step to step lies in registers, and the inputs have one copy per width. Only launches
that may need this pay for it: tokens of differing widths, and all tokens at 3 bits.

Blocks of inputs are split over programs. The last program of a tile to finish adds up all parts in
the order of their numbers, so results are the same from run to run.

Everything is judged by `reference.routed_linear`. Under Triton's interpreter the digits are made
without inline assembly.

Legend: N out_features, K in_features, B blocks of 256 inputs, G groups, T tokens, W widths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, Digits
from mbq.kernels.widths import widths_up_to

MAX_TOKENS = 64
INTERPRETED = bool(triton.knobs.runtime.interpret)
# Bit at which each of a word's 8 digits lies after its shift; the bias of digit i is 2^(10 - bit).
DIGIT_BITS = (4, 6, 4, 6, 8, 4, 6, 8)


@dataclass(frozen=True)
class Tile:
    """How a multiplication is cut: rows a program, programs along K, warps, loads in flight."""

    rows: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Prepared:
    """Tokens as the kernel reads them; made once for all linears that share an input and widths.

    Attributes:
        x_WTK: float16 [W or 1, T', K']; row i of W has zeros for tokens of fewer bits than
            WIDTHS[i]; with one row all steps read the same.
        sum_GT: float32 [G', T'].
        bias_sum_WGT: float32 [W or 1, G', T'], rows as those of `x_WTK`.
        unscale_T: float32 [T'].
        bits_T: int32 [T'].
        steps: int32 [2], steps through the slices, and 1 if the second slice is halved, else 0.
        halvable: whether it may be.
    """

    x_WTK: Tensor
    sum_GT: Tensor
    bias_sum_WGT: Tensor
    unscale_T: Tensor
    bits_T: Tensor
    steps: Tensor
    halvable: bool
    tokens: int


_MOST_TOKENS = tl.constexpr(MAX_TOKENS)


@triton.jit
def _row(bits):
    """Where a width stands in WIDTHS."""
    return tl.where(bits <= 4, bits - 2, bits // 2)


@triton.jit
def _prepare_kernel(
    x_ptr, bits_ptr, x16_ptr, sum_ptr, bias_sum_ptr, unscale_ptr, padded_bits_ptr, steps_ptr,
    in_features, padded_inputs, groups, padded_tokens,
    CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, CHUNKS)
    at = chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + token * in_features + at, mask=at < in_features, other=0.0).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 11), 254)
    scale = ((264 - exponent) << 23).to(tl.float32, bitcast=True)
    tl.store(unscale_ptr + token, ((exponent - 10) << 23).to(tl.float32, bitcast=True))
    x16 = (x * scale).to(tl.float16)
    chunk_sum = tl.sum(x16.to(tl.float32), axis=1)
    digit = chunk % 8
    bit = tl.where((digit == 0) | (digit == 2) | (digit == 5), 4, 6)
    bit = tl.where((digit == 4) | (digit == 7), 8, bit)
    biased = chunk_sum * (1 << (10 - bit)).to(tl.float32)
    GROUPS: tl.constexpr = CHUNKS // GROUP_CHUNKS
    group = tl.arange(0, GROUPS)
    sums = tl.sum(tl.reshape(chunk_sum, (GROUPS, GROUP_CHUNKS)), axis=1)
    bias_sums = tl.sum(tl.reshape(biased, (GROUPS, GROUP_CHUNKS)), axis=1)
    stored = group < groups
    tl.store(sum_ptr + group * padded_tokens + token, sums, mask=stored)
    row = _row(tl.load(bits_ptr + token))
    for w in tl.static_range(COPIES):
        # One copy serves all steps of all tokens; with more, each token's end where it has enough.
        kept = 1.0 if COPIES == 1 else (row >= w).to(tl.float32)
        tl.store(
            x16_ptr + (w * padded_tokens + token) * padded_inputs + at,
            x16 * kept,
            mask=at < padded_inputs,
        )
        tl.store(
            bias_sum_ptr + (w * groups + group) * padded_tokens + token,
            bias_sums * kept,
            mask=stored,
        )
    if token == 0:
        t = tl.arange(0, _MOST_TOKENS)
        bits = tl.load(bits_ptr + t, mask=t < tl.num_programs(0), other=2).to(tl.int32)
        tl.store(padded_bits_ptr + t, bits, mask=t < padded_tokens)
        halved = tl.max((bits == 3).to(tl.int32), axis=0)
        tl.store(steps_ptr, tl.max(bits, axis=0) // 2 + halved)
        tl.store(steps_ptr + 1, halved)


_KEEP = tl.constexpr("lop3.b32 $0, $1, $2, $3, 0xEA;")
_LEFT = tl.constexpr("{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, $2, $3, 0xEA; }")
_RIGHT = tl.constexpr("{ .reg .b32 t; shr.u32 t, $1, 6; lop3.b32 $0, t, $2, $3, 0xEA; }")


def assembly(i: int) -> str:
    """PTX that makes digit i of two words ($1) with mask $2 and magic $3."""
    body: str = (_LEFT if i < 2 else _KEEP if i < 5 else _RIGHT).value
    return body


@triton.jit
def _digit(word, i: tl.constexpr, selector, ASM: tl.constexpr):
    """Digit i of int16 words under a mask of 3, 2 or 1, as float16: its value plus 2^(10 - bit)."""
    bit: tl.constexpr = (
        4 if (i == 0 or i == 2 or i == 5) else (6 if (i == 1 or i == 3 or i == 6) else 8)
    )
    magic: tl.constexpr = (25 - bit) << 10
    # A choice of constants: a mask that is computed, and `elif` too, would keep the compiler from
    # bringing words, rather than digits, to the threads that need them.
    mask = tl.full(word.shape, 3 << bit, tl.int16)
    if selector == 2:
        mask = tl.full(word.shape, 2 << bit, tl.int16)
    if selector == 1:
        mask = tl.full(word.shape, 1 << bit, tl.int16)
    if ASM:
        body: tl.constexpr = _LEFT if i < 2 else (_KEEP if i < 5 else _RIGHT)
        g = tl.full(word.shape, magic, tl.int16)
        made = tl.inline_asm_elementwise(
            body, "=r,r,r,r", [word, mask, g], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        shifted = (word << 4) if i < 2 else (word if i < 5 else (word >> 6))
        made = ((shifted & mask) | magic).to(tl.int16).to(tl.float16, bitcast=True)
    return made


@triton.jit
def halves(pair):
    """Float32 values of the low and the high float16 of int32 pairs."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


# Fewer variants to compile: these need no alignment.
@triton.jit(do_not_specialize=["blocks", "padded_tokens", "tokens", "bias_sum_copy"])
def _decode_kernel(
    x_ptr, digits_ptr, scale_zero_ptr, gain_bias_ptr, sum_ptr, bias_sum_ptr, unscale_ptr,
    bits_ptr, steps_ptr, part_ptr, arrived_ptr, out_ptr,
    out_features, rows, blocks, padded_tokens, tokens, x_copy, bias_sum_copy,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr, HALVABLE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, 32)
    steps = tl.load(steps_ptr)
    if HALVABLE:
        halved = tl.load(steps_ptr + 1)
    bits = tl.load(bits_ptr + t)
    half_bin = 0.5 * tl.exp2((2 - bits).to(tl.float32))
    GROUP_CHUNKS: tl.constexpr = 8 // BLOCK_GROUPS
    inputs = blocks * 256
    slice_words = blocks.to(tl.int64) * rows * 32
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    turns = ((blocks - part + SPLIT - 1) // SPLIT) * steps
    for turn in tl.range(0, turns, num_stages=STAGES):
        step = turn % steps
        block = part + SPLIT * (turn // steps)
        if HALVABLE:
            # The step completes width w (where it stands in WIDTHS): 1 and 2 share a slice.
            w = step + tl.minimum(step, 1 - halved)
            e = tl.where(w < 2, w, w - 1)
            selector = tl.where((halved == 1) & (e == 1), 3 - w, 3)
        else:
            w = step
            e = step
            selector = 3
        word_at = e * slice_words + (block.to(tl.int64) * rows + n[:, None]) * 32 + j[None, :]
        word = tl.load(digits_ptr + word_at)
        weight_of_slice = tl.exp2((-2 * e).to(tl.float32))
        first = tl.where(e == 0, 1.0, 0.0)
        x_at = x_ptr + w.to(tl.int64) * x_copy + t[None, :] * inputs + block * 256 + j[:, None]
        for h in tl.static_range(BLOCK_GROUPS):
            group = block * BLOCK_GROUPS + h
            s, z = halves(tl.load(scale_zero_ptr + group * rows + n))
            sums = tl.load(sum_ptr + group * padded_tokens + t) * first
            biases = tl.load(bias_sum_ptr + w * bias_sum_copy + group * padded_tokens + t)
            acc = (half_bin[None, :] - z[:, None]) * sums[None, :] - biases[None, :]
            for c in tl.static_range(GROUP_CHUNKS):
                x = tl.load(x_at + (h * GROUP_CHUNKS + c) * 32)
                acc = tl.dot(_digit(word, h * GROUP_CHUNKS + c, selector, ASM), x, acc)
            total += (s * weight_of_slice)[:, None] * acc

    here = t[None, :] * rows + n[:, None]
    finished = True
    if SPLIT > 1:
        parts = part_ptr + here
        size = padded_tokens.to(tl.int64) * rows
        tl.store(parts + part * size, total)
        tl.debug_barrier()
        counter = arrived_ptr + tl.program_id(2) * tl.num_programs(0) + tile
        finished = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if finished:
            total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for p in tl.range(0, SPLIT):
                total += tl.load(parts + p * size, cache_modifier=".cg")
            tl.store(counter, 0)
    if finished:
        gain, bias = halves(tl.load(gain_bias_ptr + _row(bits)[None, :] * rows + n[:, None]))
        y = gain * (total * tl.load(unscale_ptr + t)[None, :]) + bias
        at = t[None, :].to(tl.int64) * out_features + n[:, None]
        kept = (n[:, None] < out_features) & (t[None, :] < tokens)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=kept)


def prepare(x_TK: Tensor, bits: Tensor | int, group_size: int, max_bits: int) -> Prepared:
    """Prepare tokens [T, K], T of 1 to 64, float16, bfloat16 or float32.

    Args:
        bits: one of WIDTHS for all tokens; or, if they may differ, int32 or int64 [T], which the
            host does not read.
        max_bits: stored bits, the most that a token may ask for.

    Raises:
        ValueError: there are too many tokens or none.
    """
    tokens, inputs = x_TK.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: the decode kernel takes 1 to {MAX_TOKENS}")
    width = token_tile(tokens)
    padded_tokens = -(-tokens // width) * width
    padded_inputs = -(-inputs // BLOCK_INPUTS) * BLOCK_INPUTS
    groups = padded_inputs // group_size
    if isinstance(bits, int):
        copies, halvable = 1, bits == 3
        bits = x_TK.new_full((tokens,), bits, dtype=torch.int32)
    else:
        copies, halvable = len(widths_up_to(max_bits)), max_bits > 2
    made = Prepared(
        x_TK.new_empty(copies, padded_tokens, padded_inputs, dtype=torch.float16),
        x_TK.new_empty(groups, padded_tokens, dtype=torch.float32),
        x_TK.new_empty(copies, groups, padded_tokens, dtype=torch.float32),
        x_TK.new_empty(padded_tokens, dtype=torch.float32),
        x_TK.new_empty(padded_tokens, dtype=torch.int32),
        x_TK.new_empty(2, dtype=torch.int32),
        halvable,
        tokens,
    )
    _prepare_kernel[(tokens,)](
        x_TK.contiguous(), bits.contiguous(), made.x_WTK, made.sum_GT, made.bias_sum_WGT,
        made.unscale_T, made.bits_T, made.steps, inputs, padded_inputs, groups, padded_tokens,
        CHUNKS=triton.next_power_of_2(padded_inputs // 32), GROUP_CHUNKS=group_size // 32,
        COPIES=copies, num_warps=8,
    )  # fmt: skip
    return made


def multiply(prepared: Prepared, weight: Digits, tile: Tile, dtype: torch.dtype) -> Tensor:
    """Each token times the weight of its own width, with gain and bias: [T, N].

    Raises:
        ValueError: the tile's rows do not divide the padded rows.
    """
    _, blocks, rows, _ = weight.digits_SBN32.shape
    if rows % tile.rows:
        raise ValueError(f"tiles of {tile.rows} rows do not divide {rows} rows")
    padded_tokens = prepared.bits_T.shape[0]
    width = token_tile(prepared.tokens)
    copies = prepared.x_WTK.shape[0]
    out = weight.digits_SBN32.new_empty(prepared.tokens, weight.out_features, dtype=dtype)
    grid = (rows // tile.rows, tile.split, padded_tokens // width)
    parts = prepared.sum_GT.new_empty(tile.split if tile.split > 1 else 0, padded_tokens, rows)
    _decode_kernel[grid](
        prepared.x_WTK, weight.digits_SBN32, weight.scale_zero_GN, weight.gain_bias_WN,
        prepared.sum_GT, prepared.bias_sum_WGT, prepared.unscale_T, prepared.bits_T,
        prepared.steps, parts, _counters(out.device, grid[0] * grid[2]), out,
        weight.out_features, rows, blocks, padded_tokens, prepared.tokens,
        prepared.x_WTK.stride(0) if copies > 1 else 0,
        prepared.bias_sum_WGT.stride(0) if copies > 1 else 0,
        ROWS=tile.rows, TOKENS=width, SPLIT=tile.split, STAGES=tile.stages,
        BLOCK_GROUPS=BLOCK_INPUTS // weight.group_size, HALVABLE=prepared.halvable,
        ASM=not INTERPRETED, num_warps=tile.warps,
    )  # fmt: skip
    return out


def token_tile(tokens: int) -> int:
    """Tokens of a program: matrix instructions take 8 at least, and 32 fill the registers."""
    return min(max(1 << (tokens - 1).bit_length(), 8), 32)


_COUNTERS: dict[torch.device, Tensor] = {}


def _counters(device: torch.device, count: int) -> Tensor:
    """Zeros; every launch leaves them zero. Launches of one stream run one after the other."""
    found = _COUNTERS.get(device)
    if found is None or len(found) < count:
        found = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
        _COUNTERS[device] = found
    return found
