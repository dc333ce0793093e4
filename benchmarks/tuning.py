"""The fastest tiles of every shape on this GPU: `kernels/tiles_<architecture>.json`."""

import contextlib
import itertools
import multiprocessing
import os

import click
import torch
from triton.runtime.errors import OutOfResources
from weights import decode_times, hungry_tokens, multiply, random_digits, rotation, tokens_at

from mbq.kernels import dispatch
from mbq.kernels.digits import BLOCK_INPUTS
from mbq.kernels.triton_prepare import Prepared
from mbq.kernels.triton_tiles import Tile

SPLITS = (1, 2, 4, 8, 16)
STAGES = (2, 3, 4)
# Rows and warps.
CUTS = ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 8))
TOKENS = (1, 16, 32, 64)
# What each kind of product is timed at; mixed tokens all take 4 bits, unknown to the host.
BITS = {"2": 2, "4": 4, "8": 8, dispatch.MIXED: 4}

Tiles = dict[str, dict[str, dict[str, list[int]]]]


def candidates(n: int, k: int) -> list[Tile]:
    """Tiles worth timing: enough programs for every multiprocessor, not far too many."""
    found = []
    for (rows, warps), split, stages in itertools.product(CUTS, SPLITS, STAGES):
        programs = n // rows * split
        if n % rows == 0 and 128 <= programs <= 2000 and split <= k // BLOCK_INPUTS:
            found.append(Tile(rows, split, warps, stages))
    return found


def tune_tiles(shapes: list[tuple[int, int]]) -> Tiles:
    """The fastest tile per kind of product, shape and token tile."""
    compile_all()
    best: Tiles = {}
    for (kind, bits), (n, k) in itertools.product(BITS.items(), shapes):
        weights = rotation(n, k, bits)
        entry = best.setdefault(kind, {}).setdefault(f"{n} x {k}", {})
        for m in TOKENS:
            prepared = tokens_of(kind, m, k, bits)
            seconds = {}
            for tile in candidates(n, k):
                with contextlib.suppress(OutOfResources):
                    seconds[tile] = decode_times(weights, prepared, bits, tile, 5)[0]
            tile = min(seconds, key=lambda t: seconds[t])
            width = str(dispatch.token_tile(m, kind))
            # Tokens of mixed widths are cut at 32.
            entry.setdefault(width, [tile.rows, tile.split, tile.warps, tile.stages])
        click.echo(f"{kind} {n} x {k}: {entry}")
    return best


def tokens_of(kind: str, m: int, k: int, bits: int) -> Prepared:
    """Tokens for a kind of product; a single one cannot be mixed."""
    if kind == dispatch.MIXED:
        return hungry_tokens(max(m, 2), k, bits, 0)
    return tokens_at(m, k, bits)


def compile_all() -> None:
    """Fill Triton's cache from many processes."""
    tiles = {tile for n in (4096, 28672) for tile in candidates(n, 14336)}
    jobs = [
        (kind, m, t.rows, t.split, t.warps, t.stages)
        for kind in BITS
        for t in tiles
        for m in TOKENS
    ]
    workers = max((os.cpu_count() or 2) - 2, 1)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(_compile, jobs, chunksize=4)


def _compile(job: tuple[str, int, int, int, int, int]) -> None:
    kind, m, *cut = job
    bits = BITS[kind]
    # A tile that needs more shared memory than there is.
    with contextlib.suppress(OutOfResources):
        multiply(tokens_of(kind, m, 4096, bits), bits, random_digits(256, 4096), Tile(*cut))
        torch.cuda.synchronize()
