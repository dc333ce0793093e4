"""Decode kernels on a GPU: correctness first, then microseconds beside the bounds and peers.

    python benchmarks/decode.py --out benchmarks/results
    python benchmarks/decode.py --out DIR --any-precision any_precision.cubin

For every shape, width and number of tokens: time of one launch in a captured graph of many, with
weights that rotate through more memory than the L2 cache holds; median of replays, and the share
that the middle half of them spreads over. Bounds: bytes (codes, scales, zeros, inputs, outputs) at
the measured speed of memory, operations at the measured bf16 speed. `empty` is a graph node of an
empty kernel. `blocks` are all products of a model in turn, each input made ready as in a step.
`peers` are others in the same run (`kernel_peers.py`). `prompts` are many tokens times a weight
that is dequantized each time, beside cuBLAS with a weight that is there. Data are random; outputs
are held against float64 first. Needs torch, triton and click only.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from ceilings import measure_ceilings
from checks import (
    CHAINS,
    JOINED_ROWS,
    JOINED_TOKENS,
    SHARING,
    check,
    check_joined,
    in_order,
    open_gates,
    random_gates,
    repeatable,
    routed_differently,
)
from compiling import Product, compile_products
from kernel_peers import cublas, time_peers
from provenance import gpu_provenance
from torch import Tensor
from weights import (
    BLOCKS,
    GROUP,
    SHAPES,
    decode_times,
    hungry_tokens,
    model_in_turn,
    multiply,
    random_powers,
    rotation,
    tile_for,
    tokens_at,
)

from mbq.kernels import dispatch
from mbq.kernels.digits import Digits
from mbq.kernels.router import Gates
from mbq.kernels.timing import time_graph
from mbq.kernels.triton_dequantize import dequantize_digits
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.widths import CODE_BITS, WIDTHS

TOKENS = (1, 4, 8, 16, 32, 64)
PROMPTS = (256, 1024, 4096)
TOLERANCE = 5e-3
Point = dict[str, Any]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for results.")
@click.option("--any-precision", type=click.Path(path_type=Path, exists=True), help="Its cubin.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(SHAPES)))
def main(out: Path, any_precision: Path | None, models: tuple[str, ...]) -> None:
    """Check and time the decode kernels on the shapes of LLaMA models."""
    torch.manual_seed(0)
    chosen = models or tuple(SHAPES)
    shapes = sorted({shape for model in chosen for shape in SHAPES[model].values()})
    inputs = sorted({k for _, k in shapes})
    result = gpu_provenance()
    path = out / f"{result['date']}-decode.json"

    def keep(**found: Any) -> None:
        """Write what is known: a run that is cut off leaves it."""
        result.update(found)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    compile_products(products(shapes))
    errors = {f"{n} x {k}": check(n, k) for n, k in shapes}
    errors |= {f"joined x {k}": check_joined(k) for k in inputs}
    click.echo(f"largest error against float64: {max(errors.values()):.1e}")
    otherwise = {k: routed_differently(k) for k in inputs}
    click.echo(f"widths routed otherwise than by torch: {max(otherwise.values()):.2%}")
    same = all(repeatable(n, k) for n, k in shapes) and all(in_order(k) for k in inputs)
    keep(errors=errors, repeatable=same, routed_differently=otherwise)
    # Not before: a GPU that was idle is slow.
    keep(ceilings=measure_ceilings(), points=[], peers=[], blocks=[], mixed=[], prompts=[])
    click.echo(json.dumps(result["ceilings"]))
    keep(preparing=[point for k in inputs for point in time_preparing(k)])
    # What matters most first.
    for model in chosen:
        keep(blocks=result["blocks"] + time_blocks(model))
    for n, k in shapes:
        keep(points=result["points"] + time_shape(n, k, result["ceilings"]))
        peers = [
            {"n": n, "k": k, "tokens": m, **time_peers(n, k, m, any_precision)} for m in TOKENS
        ]
        keep(peers=result["peers"] + peers)
        keep(sums=model_sums(result, chosen))
    keep(mixed=time_mixed(*shapes[-1]))
    for shape in shapes:
        keep(prompts=result["prompts"] + time_prompts(*shape))
    show(result)
    if max(errors.values()) > TOLERANCE or max(otherwise.values()) > TOLERANCE or not same:
        raise click.ClickException("wrong or unrepeatable results")


def products(shapes: list[tuple[int, int]]) -> list[Product]:
    """All that is checked and timed."""
    kinds = [*((bits, False) for bits in (*WIDTHS, None)), (None, True)]
    wanted = [
        (n, k, m, bits, mixed)
        for (n, k), m, (bits, mixed) in itertools.product(shapes, TOKENS, kinds)
    ]
    for k in {k for _, k in shapes}:
        wanted.append((sum(JOINED_ROWS), k, JOINED_TOKENS, None, True))
        wanted += [(k, k, m, bits, bits is None and m > 1) for m, bits, _ in CHAINS]
    return [
        Product(
            bits,
            mixed,
            dispatch.token_tile(m, dispatch.kind_of(mixed, bits)),
            tile_for(n, k, m, bits, mixed),
        )
        for n, k, m, bits, mixed in wanted
    ]


def time_preparing(k: int) -> list[Point]:
    """Tokens made ready for three linears: at one width, and at widths that a router decides."""
    gates, powers = random_gates(k), random_powers(k)
    tally = torch.zeros(2, SHARING, dtype=torch.int64, device="cuda")
    points = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        alike, routed = (
            time_graph(partial(prepare, x, powers, w, SHARING, GROUP, CODE_BITS, tally), 24)[0]
            for w in (CODE_BITS, gates)
        )
        points.append({"k": k, "tokens": m, "alike_seconds": alike, "routed_seconds": routed})
    return points


def time_shape(n: int, k: int, ceilings: dict[str, float]) -> list[Point]:
    """All widths and numbers of tokens of one shape."""
    points = []
    for bits in WIDTHS:
        weights = rotation(n, k, bits)
        for m in TOKENS:
            tile, any_tile = tile_for(n, k, m, bits), tile_for(n, k, m, None)
            prepared = tokens_at(m, k, bits)
            seconds, spread = decode_times(weights, prepared, bits, tile)
            moved = n * k * (bits + 32 / GROUP) / 8 + 2 * m * (n + k)
            bound = max(
                moved / ceilings["bytes_per_second"],
                2 * m * n * k / ceilings["flop_per_second"],
            )
            points.append(
                {
                    "n": n,
                    "k": k,
                    "tokens": m,
                    "bits": bits,
                    "tile": [tile.rows, tile.split, tile.warps, tile.stages],
                    "seconds": seconds,
                    "spread_seconds": spread,
                    "unknown_seconds": decode_times(weights, prepared, None, any_tile)[0],
                    "bound_seconds": bound,
                    "of_bound": bound / seconds,
                    "of_bound_and_empty": (bound + ceilings["empty_seconds"]) / seconds,
                }
            )
    return points


def time_mixed(n: int, k: int) -> list[Point]:
    """One token in ten has 8 bits, the others fewer: a batch reads what its hungriest does.

    Without such a token the same widths are timed in `points`, by the kernel for one width.
    """
    weights = rotation(n, k, 2)
    points = []
    for m in (1, 4, 16, 64):
        for bits, hungry in itertools.product((2, 3, 4), sorted({0, math.ceil(m / 10)})):
            prepared = hungry_tokens(m, k, bits, hungry)
            points.append(
                {
                    "n": n,
                    "k": k,
                    "tokens": m,
                    "tokens_with_8_bits": hungry,
                    "bits_of_others": bits,
                    "bits_read": CODE_BITS if hungry else bits,
                    "seconds": decode_times(
                        weights, prepared, None, tile_for(n, k, m, None, prepared.mixed)
                    )[0],
                }
            )
    return points


def time_blocks(model: str) -> list[Point]:
    """All inputs of a model in turn, made ready and multiplied.

    As a step runs at a width that the host knows; and as one that was captured does: it asks
    routers, and only the device knows the width.
    """
    shapes = SHAPES[model].values()
    inputs = {k for _, k in shapes}
    points = []
    for bits in WIDTHS:
        turn, count = model_in_turn(model, bits)
        block = partial(itertools.islice, turn, len(shapes))
        gates = {k: open_gates(k, bits) for k in inputs}
        for m in TOKENS:
            xs = {k: torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for k in inputs}
            known = partial(step, block, xs, dict.fromkeys(inputs, bits), bits)
            seconds, spread = time_graph(known, 2 * count)
            captured = time_graph(partial(step, block, xs, gates, None), 2 * count)[0]
            points.append(
                {
                    "model": model,
                    "tokens": m,
                    "bits": bits,
                    "seconds": BLOCKS[model] * seconds,
                    "spread_seconds": BLOCKS[model] * spread,
                    "captured_seconds": BLOCKS[model] * captured,
                }
            )
    return points


def step(
    block: Callable[[], Iterator[Digits]],
    xs: dict[int, Tensor],
    widths: Mapping[int, int | Gates],
    known: int | None,
) -> None:
    """The next block: each of its inputs made ready, and multiplied."""
    for weight in block():
        (n,), k = weight.out_features, weight.in_features
        prepared = prepare(xs[k], weight.power_K, widths[k], SHARING, GROUP, CODE_BITS)
        tile = tile_for(n, k, len(xs[k]), known, prepared.mixed)
        multiply(prepared, known, weight, tile)


def time_prompts(n: int, k: int) -> list[Point]:
    """Many tokens: dequantizing and multiplying, and multiplying alone."""
    digits = itertools.cycle(rotation(n, k, 8))
    points = []
    for m in PROMPTS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        launch, turns = cublas(n, k, m)
        cublas_seconds = time_graph(launch, max(turns, 8))[0]
        for bits in WIDTHS:
            seconds, spread = time_graph(
                lambda x=x, b=bits: torch.mm(
                    x, dequantize_digits(next(digits), b, torch.bfloat16).T
                ),
                8,
            )
            points.append(
                {
                    "n": n,
                    "k": k,
                    "tokens": m,
                    "bits": bits,
                    "seconds": seconds,
                    "spread_seconds": spread,
                    "cublas_seconds": cublas_seconds,
                }
            )
    return points


def model_sums(result: Point, models: tuple[str, ...]) -> list[Point]:
    """All linears of a model, by tokens: seconds of each width, of its bound, and of each peer.

    Ours as `time_blocks` runs them, and `multiplying` alone: sums of products.
    """
    sums = []
    for model, m in itertools.product(models, TOKENS):
        shapes = list(SHAPES[model].values())
        ours, theirs = (
            [p for p in result[kind] if p["tokens"] == m and (p["n"], p["k"]) in shapes]
            for kind in ("points", "peers")
        )
        if len(theirs) < len(shapes):
            continue
        steps = [p for p in result["blocks"] if p["tokens"] == m and p["model"] == model]
        total = {"model": model, "tokens": m}
        for point in steps:
            bits = point["bits"]
            found = [p for p in ours if p["bits"] == bits]
            for name, of_product in (("bound", "bound_seconds"), ("multiplying", "seconds")):
                seconds = BLOCKS[model] * sum(p[of_product] for p in found)
                total[f"{bits}_{name}_seconds"] = seconds
            total[f"{bits}_seconds"] = point["seconds"]
            total[f"{bits}_captured_seconds"] = point["captured_seconds"]
        # Those that serve every shape.
        for name in sorted(set.intersection(*(set(p) for p in theirs)) - {"n", "k", "tokens"}):
            total[name] = BLOCKS[model] * sum(p[name] for p in theirs)
        sums.append(total)
    return sums


def show(result: Point) -> None:
    """Short tables, the sums last."""
    peers = {(p["n"], p["k"], p["tokens"]): p for p in result["peers"]}
    empty = result["ceilings"]["empty_seconds"] * 1e6
    click.echo(f"an empty kernel: {empty:.1f} us")
    click.echo("N x K | tokens | bits | us | unknown | bound | % | with empty | tile | peers")
    for p in result["points"]:
        us = {kind: p[f"{kind}_seconds"] * 1e6 for kind in ("unknown", "bound")}
        others = peers[p["n"], p["k"], p["tokens"]]
        beside = [
            f"{name} {seconds * 1e6:.1f} ({seconds / p['seconds']:.2f}x)"
            for name, seconds in others.items()
            if name.endswith((f"_{p['bits']}", "_16"))
        ]
        click.echo(
            f"{p['n']} x {p['k']} | {p['tokens']} | {p['bits']} | {p['seconds'] * 1e6:.1f} | "
            f"{us['unknown']:.1f} | {us['bound']:.1f} | {p['of_bound']:.0%} | "
            f"{p['of_bound_and_empty']:.0%} | {p['tile']} | {', '.join(beside)}"
        )
    for p in result["mixed"]:
        click.echo(
            f"{p['n']} x {p['k']} | {p['tokens']} tokens, {p['tokens_with_8_bits']} with 8 bits, "
            f"others {p['bits_of_others']} | {p['bits_read']} bits | "
            f"{p['seconds'] * 1e6:.1f} us"
        )
    for p in result["prompts"]:
        click.echo(
            f"{p['n']} x {p['k']} | {p['tokens']} tokens | {p['bits']} | "
            f"{p['seconds'] * 1e6:.1f} us | {p['cublas_seconds'] / p['seconds']:.2f}x cuBLAS"
        )
    for s in result["sums"]:
        ours = [
            f"{bits}: {s[f'{bits}_seconds'] * 1e3:.3f} ms "
            f"({s[f'{bits}_bound_seconds'] / s[f'{bits}_seconds']:.0%} of bound, "
            f"{s['cublas_16'] / s[f'{bits}_seconds']:.2f}x cuBLAS; "
            f"captured {s[f'{bits}_captured_seconds'] * 1e3:.3f} ms)"
            for bits in WIDTHS
        ]
        theirs = [f"{name}: {s[name] * 1e3:.3f} ms" for name in s if name[-1].isdigit()]
        click.echo(f"{s['model']} | {s['tokens']} | {', '.join(ours)} | {', '.join(theirs)}")


if __name__ == "__main__":
    main()
