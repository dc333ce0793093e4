"""The fastest tiles of every shape on this GPU: `kernels/tiles_<architecture>.json`."""

import itertools
import math
import multiprocessing
import os

import click
import torch
from weights import decode_times, hungry_tokens, multiply, random_digits, rotation, tokens_at

from mbq.kernels import dispatch
from mbq.kernels.digits import BLOCK_INPUTS
from mbq.kernels.triton_prepare import Prepared
from mbq.kernels.triton_tiles import Tile

SPLITS = (1, 2, 4, 8, 16)
STAGES = (2, 3, 4)
# Rows and warps, by kernel.
CUTS = {
    "uniform": ((64, 2), (64, 4), (128, 4), (128, 8), (256, 8)),
    "mixed": ((64, 2), (128, 2), (128, 4), (256, 4)),
}
TOKENS = {"uniform": (1, 16, 32, 64), "mixed": (8, 16, 32)}
BITS = (2, 4, 8)

Tiles = dict[str, dict[str, dict[str, list[int]]]]


def candidates(kind: str, n: int, k: int) -> list[Tile]:
    """Tiles worth timing: enough programs for every multiprocessor, not far too many."""
    found = []
    for (rows, warps), split, stages in itertools.product(CUTS[kind], SPLITS, STAGES):
        programs = n // rows * split
        if n % rows == 0 and 128 <= programs <= 2000 and split <= k // BLOCK_INPUTS:
            found.append(Tile(rows, split, warps, stages))
    return found


def tune_tiles(shapes: list[tuple[int, int]]) -> Tiles:
    """The fastest tile per kernel, shape and token tile, over 2, 4 and 8 bits alike."""
    compile_all()
    best: Tiles = {}
    for kind, (n, k) in itertools.product(CUTS, shapes):
        weights = rotation(n, k, 2)
        entry = best.setdefault(kind, {}).setdefault(f"{n} x {k}", {})
        for m in TOKENS[kind]:
            scores = {}
            for tile in candidates(kind, n, k):
                times = [
                    decode_times(weights[: math.ceil(len(weights) * 2 / b) + 1], p, b, tile, 5)[0]
                    for b in BITS
                    for p in [tokens_of(kind, m, k, b)]
                ]
                scores[tile] = sum(math.log(t) for t in times)
            tile = min(scores, key=lambda t: scores[t])
            width = dispatch.token_tile(m, kind == "mixed")
            entry[str(width)] = [tile.rows, tile.split, tile.warps, tile.stages]
        click.echo(f"{kind} {n} x {k}: {entry}")
    return best


def tokens_of(kind: str, m: int, k: int, bits: int) -> Prepared:
    """Tokens for a kernel."""
    return tokens_at(m, k, bits) if kind == "uniform" else hungry_tokens(m, k, bits, 0)


def compile_all() -> None:
    """Fill Triton's cache from many processes."""
    jobs = {
        (kind, m, bits if kind == "uniform" else 2, t.rows, t.split, t.warps, t.stages)
        for kind in CUTS
        for n in (4096, 28672)
        for t in candidates(kind, n, 14336)
        for m in TOKENS[kind]
        for bits in BITS
    }
    workers = max((os.cpu_count() or 2) - 2, 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, sorted(jobs), chunksize=4)


def _compile(job: tuple[str, int, int, int, int, int, int]) -> None:
    kind, m, bits, *cut = job
    multiply(tokens_of(kind, m, 4096, bits), bits, random_digits(256, 4096), Tile(*cut))
    torch.cuda.synchronize()
