"""What the multiplying kernels share: how products are cut into tiles, summed and written.

A program makes a tile of rows and tokens over a part of the inputs. The last program of a tile to
finish adds up all parts in the order of their numbers, so results are the same from run to run.

Legend: N out_features, T tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import Digits
from mbq.kernels.triton_prepare import zeros

INTERPRETED = bool(triton.knobs.runtime.interpret)
# So that the counters seldom grow.
_COUNTERS = 4096


@dataclass(frozen=True)
class Tile:
    """How a multiplication is cut: rows a program, programs along K, warps, loads in flight."""

    rows: int
    split: int
    warps: int
    stages: int


@triton.jit
def halves(pair):
    """Float32 values of the low and the high float16 of int32 pairs."""
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def finish(
    total, gain_row, unscale_ptr, part_ptr, arrived_ptr, out_ptr,
    rows, padded_tokens, tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a tile of sums, with gain and bias; the last program of a tile adds up all parts."""
    tile = tl.program_id(0)
    n = tile * ROWS + tl.arange(0, ROWS)
    t = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    finished = True
    if SPLIT > 1:
        parts = part_ptr + t[None, :] * rows + n[:, None]
        size = padded_tokens.to(tl.int64) * rows
        tl.store(parts + tl.program_id(1) * size, total)
        tl.debug_barrier()
        counter = arrived_ptr + tl.program_id(2) * tl.num_programs(0) + tile
        finished = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if finished:
            total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
            for p in tl.range(0, SPLIT):
                total += tl.load(parts + p * size, cache_modifier=".cg")
            tl.store(counter, 0)
    if finished:
        gain, bias = halves(tl.load(gain_row + n[:, None]))
        y = gain * (total * tl.load(unscale_ptr + t)[None, :]) + bias
        at = t[None, :].to(tl.int64) * rows + n[:, None]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=t[None, :] < tokens)


def scratch(grid: tuple[int, int, int], padded_tokens: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """For `finish`: room for the parts of sums that are split, and counters."""
    tiles, split, token_tiles = grid
    parts = (split if split > 1 else 0, padded_tokens, out.shape[1])
    counters = max(tiles * token_tiles, _COUNTERS)
    return out.new_empty(parts, dtype=torch.float32), zeros(out.device, "decode", counters)


def outputs(out: Tensor, weight: Digits) -> tuple[Tensor, ...]:
    """The columns of each linear."""
    starts = zip(weight.starts, weight.out_features, strict=False)
    return tuple(out[:, start : start + features] for start, features in starts)
