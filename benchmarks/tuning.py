"""The fastest tiles of a model's shapes on this GPU: `tiles_<architecture>.json`.

    python benchmarks/tuning.py --out kernels --model llama2-7b

What is timed is a product and the launch before it, which makes its tokens ready, as in a step: a
product begins while that launch runs. Adds to what the file holds, fewest tokens first, so a run
that is cut off leaves what it found. One model takes some minutes, most of them for the compiler.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import click
import torch
from compiling import Product, compile_products
from weights import GROUP, SHAPES, multiply, rotation

from mbq.kernels import dispatch
from mbq.kernels.digits import BLOCK_INPUTS
from mbq.kernels.timing import time_graph
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.widths import CODE_BITS

SPLITS = (1, 2, 4, 8)
STAGES = (2, 3)
# Rows and warps.
CUTS = ((64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 8))
# Rows and warps for few tokens, where warps share the inputs.
NARROW = tuple(itertools.product((16, 32), (2, 4, 8)))
TOKENS = (1, 2, 4, 8, 16, 32, 64)
# What each kind of product is timed at, and where the host does not know it.
BITS = {"2": 2, "4": 4, "8": 8, dispatch.ANY: 4, dispatch.MIXED: 4}
UNKNOWN = (dispatch.ANY, dispatch.MIXED)
LAUNCHES, REPLAYS = 48, 5


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the file.")
@click.option("--model", type=click.Choice(list(SHAPES)), required=True)
def main(out: Path, model: str) -> None:
    """Time the tiles worth timing and keep the fastest."""
    torch.manual_seed(0)
    major, minor = torch.cuda.get_device_capability()
    path = out / f"tiles_sm{major}{minor}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    shapes = sorted(set(SHAPES[model].values()))

    def keep() -> None:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for m in TOKENS:
        kinds = [kind for kind in BITS if tuned(m, kind)]
        compile_products(
            Product(known(kind), kind == dispatch.MIXED, m, tile)
            for kind, (n, k) in itertools.product(kinds, shapes)
            for tile in candidates(n, k, m)
        )
        for (n, k), kind in itertools.product(shapes, kinds):
            best = fastest(n, k, m, kind)
            of_shape = found.setdefault(kind, {}).setdefault(f"{n} x {k}", {})
            of_shape[str(dispatch.token_tile(m, kind))] = best
            keep()
            click.echo(f"{kind} {n} x {k}, {m} tokens: {best}")


def tuned(m: int, kind: str) -> bool:
    """Whether so many tokens are cut in a way of their own.

    Of mixed widths, 64 are cut at 32, and few in one way for all shapes.
    """
    if kind != dispatch.MIXED:
        return True
    return not dispatch.narrow(m) and dispatch.token_tile(m, kind) >= m


def known(kind: str) -> int | None:
    """The width that the host knows."""
    return None if kind in UNKNOWN else BITS[kind]


def candidates(n: int, k: int, m: int) -> list[Tile]:
    """Tiles worth timing: enough programs for every multiprocessor, not far too many.

    At most 64 sums of a tile for each thread: more do not fit the registers.
    """
    if dispatch.narrow(m):
        return [
            Tile(rows, split=1, warps=warps, stages=1)
            for rows, warps in NARROW
            if 500 <= n // rows * warps <= 6000 and warps <= k // BLOCK_INPUTS
        ]
    found = []
    for (rows, warps), split, stages in itertools.product(CUTS, SPLITS, STAGES):
        programs = n // rows * split
        if rows * m > 64 * 32 * warps:
            continue
        if n % rows == 0 and 128 <= programs <= 1000 and split <= k // BLOCK_INPUTS:
            found.append(Tile(rows, split, warps, stages))
    return found


def fastest(n: int, k: int, m: int, kind: str) -> list[int]:
    """Rows, split, warps and stages of the fastest tile."""
    bits = BITS[kind]
    turn = itertools.cycle(rotation(n, k, bits))
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    size = 1, m if kind == dispatch.MIXED else 1
    widths = torch.full(size, bits, device="cuda") if kind in UNKNOWN else bits
    seconds = {}
    for tile in candidates(n, k, m):

        def launch(tile: Tile = tile) -> None:
            weight = next(turn)
            prepared = prepare(x, weight.power_K, widths, 1, GROUP, CODE_BITS)
            multiply(prepared, known(kind), weight, tile)

        try:
            seconds[tile] = time_graph(launch, LAUNCHES, REPLAYS)[0]
        except Exception as error:  # as while compiling
            click.echo(f"left out: {tile}: {error}"[:200])
    tile = min(seconds, key=lambda t: seconds[t])
    return [tile.rows, tile.split, tile.warps, tile.stages]


if __name__ == "__main__":
    main()
