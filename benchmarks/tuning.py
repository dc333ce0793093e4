"""The fastest tile of every shape on this GPU: `kernels/tiles_<architecture>.json`."""

import itertools
import math
import multiprocessing
import os

import click
import torch
from weights import decode_times, random_digits, rotation, tokens_at

from mbq.kernels.digits import BLOCK_INPUTS
from mbq.kernels.triton_decode import multiply
from mbq.kernels.triton_prepare import token_tile
from mbq.kernels.triton_tiles import Tile

SPLITS = (1, 2, 4, 8, 16)
CUTS = ((64, 1), (64, 2), (128, 2), (128, 4), (256, 4))
STAGES = (3, 5)


def candidates(n: int, k: int) -> list[Tile]:
    """Tiles worth timing: enough programs for every multiprocessor, not far too many."""
    found = []
    for (rows, warps), split, stages in itertools.product(CUTS, SPLITS, STAGES):
        programs = n // rows * split
        if n % rows == 0 and 128 <= programs <= 3000 and split <= k // BLOCK_INPUTS:
            found.append(Tile(rows, split, warps, stages))
    return found


def tune_tiles(shapes: list[tuple[int, int]]) -> dict[str, dict[str, list[int]]]:
    """The fastest tile per shape and token tile, over 2, 4 and 8 bits alike."""
    compile_all()
    best: dict[str, dict[str, list[int]]] = {}
    for n, k in shapes:
        weights = rotation(n, k, 2)
        for m in (1, 16, 32):
            scores = {}
            for tile in candidates(n, k):
                times = [
                    decode_times(weights[: math.ceil(len(weights) * 2 / bits) + 1], p, tile, 5)[0]
                    for bits in (2, 4, 8)
                    for p in [tokens_at(m, k, bits)]
                ]
                scores[tile] = sum(math.log(t) for t in times)
            tile = min(scores, key=lambda t: scores[t])
            entry = best.setdefault(f"{n} x {k}", {})
            entry[str(token_tile(m))] = [tile.rows, tile.split, tile.warps, tile.stages]
        click.echo(f"{n} x {k}: {best[f'{n} x {k}']}")
    return best


def compile_all() -> None:
    """Fill Triton's cache from many processes."""
    tiles = {tile for n in (4096, 28672) for tile in candidates(n, 14336)}
    jobs = [(m, t.rows, t.split, t.warps, t.stages) for m in (1, 16, 32) for t in tiles]
    workers = max((os.cpu_count() or 2) - 2, 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, jobs, chunksize=4)


def _compile(job: tuple[int, ...]) -> None:
    m, *cut = job
    multiply(tokens_at(m, 4096, 4), random_digits(256, 4096), Tile(*cut), torch.bfloat16)
    torch.cuda.synchronize()
