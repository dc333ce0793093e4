"""Decode kernels on a GPU: correctness first, then microseconds beside the bounds and peers.

    python benchmarks/decode.py --out benchmarks/results
    python benchmarks/decode.py --tune kernels          # tiles for this GPU, then the same

For every shape, width and number of tokens: time of one launch in a captured graph of many, with
weights that rotate through more memory than the L2 cache holds; median of replays, and the share
that the middle half of them spreads over. Bounds: bytes (codes, scales, zeros, inputs, outputs) at
the measured memory speed, operations at the measured bf16 speed. `empty` is a graph node of an
empty kernel. Peers in the same run: cuBLAS in bf16 and torch's int4 kernel (tinygemm), at 4 bits.
The bound of 3 bits counts 3, though the kernel reads two whole slices for them. `prompts` are many
tokens times a weight that is dequantized each time, beside cuBLAS with a weight that is there.
Data are random; outputs are held against float64 first. Needs torch, triton and click only.
"""

import datetime
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import torch
import triton
from ceilings import measure_ceilings
from torch import Tensor
from tuning import tune_tiles
from weights import (
    BLOCKS,
    GROUP,
    ROTATED_BYTES,
    SHAPES,
    decode_times,
    hungry_tokens,
    multiply,
    random_digits,
    rotation,
    tokens_at,
)

from mbq.kernels import dispatch
from mbq.kernels.digits import join_digits, pack_digits
from mbq.kernels.quantize import dequantize, pack_pair, unpack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.router import Gates, bits_taken, score
from mbq.kernels.timing import time_graph
from mbq.kernels.triton_dequantize import dequantize_digits
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.widths import CODE_BITS, MAX_SLICES, WIDTHS

TOKENS = (1, 4, 8, 16, 32, 64)
PROMPTS = (256, 1024, 4096)
TOLERANCE = 5e-3
# Numbers of tokens, and the widths that they are drawn from.
CHECKS = (
    *((1, (bits,)) for bits in WIDTHS),
    (8, (3,)),
    *((33, (bits,)) for bits in WIDTHS),
    (3, (2, 8)),
    (5, (2, 3)),
    (16, (2, 4, 6, 8)),
    (33, WIDTHS),
    (64, WIDTHS),
)
# Linears that share an input, and rows of their router's trunk.
SHARING, TRUNK = 3, 8

Point = dict[str, Any]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for results.")
@click.option("--tune", type=click.Path(path_type=Path), help="Folder for measured tiles.")
@click.option("--model", "models", multiple=True, type=click.Choice(list(SHAPES)))
def main(out: Path, tune: Path | None, models: tuple[str, ...]) -> None:
    """Check and time the decode kernels on the shapes of LLaMA models."""
    torch.manual_seed(0)
    chosen = models or tuple(SHAPES)
    ceilings = measure_ceilings()
    click.echo(json.dumps(ceilings))
    shapes = sorted({shape for model in chosen for shape in SHAPES[model].values()})
    if tune is not None:
        tiles = tune_tiles(shapes)
        major, minor = torch.cuda.get_device_capability()
        name = f"tiles_sm{major}{minor}.json"
        (tune / name).write_text(json.dumps(tiles, indent=1) + "\n", encoding="utf-8")
        (out / name).write_text(json.dumps(tiles, indent=1) + "\n", encoding="utf-8")
    errors = {f"{n} x {k}": check(n, k) for n, k in shapes}
    errors |= {f"joined x {k}": check_joined(k) for k in sorted({k for _, k in shapes})}
    click.echo(f"largest error against float64: {max(errors.values()):.1e}")
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "command": "python " + " ".join(sys.argv),
        "ceilings": ceilings,
        "errors": errors,
        "repeatable": all(repeatable(n, k) for n, k in shapes),
    }
    inputs = sorted({k for _, k in shapes})
    result["routed_differently"] = {k: routed_differently(k) for k in inputs}
    result["preparing"] = [point for k in inputs for point in time_preparing(k)]
    result["mixed"] = [p for shape in shapes[-1:] for p in time_mixed(*shape)]
    result["prompts"] = [p for shape in shapes for p in time_prompts(*shape)]
    points: list[Point] = []
    path = out / f"{result['date']}-decode.json"
    for shape in shapes:
        points += time_shape(*shape, ceilings)
        document = result | {"points": points, "sums": model_sums(points, chosen)}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    show(points, model_sums(points, chosen))
    otherwise = max(result["routed_differently"].values())
    click.echo(f"widths routed otherwise than by torch: {otherwise:.2%}")
    if max(errors.values()) > TOLERANCE or otherwise > TOLERANCE or not result["repeatable"]:
        raise click.ClickException("wrong or unrepeatable results")


def check(n: int, k: int) -> float:
    """Largest relative error over `CHECKS`, against float64."""
    code = torch.randint(0, 256, (n, k), dtype=torch.uint8, device="cuda")
    scale = (0.5 + torch.rand(n, k // GROUP, device="cuda")).half().float()
    zero = (1.5 + torch.rand(n, k // GROUP, device="cuda")).half().float()
    gain = 0.9 + 0.2 * torch.rand(len(WIDTHS), n, device="cuda")
    gain_bias = pack_pair(gain, torch.randn_like(gain))
    gain_WN, bias_WN = unpack_pair(gain_bias)
    weight = pack_digits(code, pack_pair(scale, zero), gain_bias, MAX_SLICES)
    weight_WNK = torch.stack(
        [
            dequantize(code, scale, zero, bits) * gain_N[:, None]
            for bits, gain_N in zip(WIDTHS, gain_WN, strict=True)
        ]
    )
    worst = 0.0
    for bits, weight_NK in zip(WIDTHS, weight_WNK, strict=True):
        made_NK = dequantize_digits(weight, bits, torch.bfloat16).float()
        worst = max(worst, ((made_NK - weight_NK).norm() / weight_NK.norm()).item())
    for m, widths in CHECKS:
        x = 10 * torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        # In turn, so that every width occurs wherever there are enough tokens.
        bits_T = torch.tensor(list(itertools.islice(itertools.cycle(widths), m)), device="cuda")
        asked = bits_T[None] if len(widths) > 1 else widths[0]
        prepared = prepare(x, asked, 1, GROUP, CODE_BITS)
        known = asked if isinstance(asked, int) else None
        tile = dispatch.tile(n, k, m, x.device, dispatch.kind_of(prepared.mixed, known))
        # What is allocated next lies where this was: an element that is not written stays NaN.
        poison = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        del poison
        # A width that the host knows, and the same again as one that it does not.
        any_tile = dispatch.tile(n, k, m, x.device, dispatch.kind_of(prepared.mixed, None))
        outs = multiply(prepared, known, weight, tile)
        outs += multiply(prepared, None, weight, any_tile)
        some = torch.randperm(m, device="cuda")[:8]
        expected = routed_linear(x[some].double(), weight_WNK, bias_WN, bits_T[some])
        for out in outs:
            error = ((out[some].double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check_joined(k: int) -> float:
    """Largest relative error of three linears of one input, at widths that a router decides."""
    made = [random_digits(n, k) for n in (1024, 256, 512)]
    x = torch.randn(9, k, device="cuda", dtype=torch.bfloat16)
    gates = random_gates(k)
    bits_LT = prepare(x, gates, SHARING, GROUP, CODE_BITS).bits_LT[:, : len(x)]
    worst = 0.0
    outs = dispatch.decode(x, gates, CODE_BITS, join_digits(made))
    for out, weight, bits_T in zip(outs, made, bits_LT, strict=True):
        (n,) = weight.out_features
        weight_WNK = torch.stack(
            [dequantize_digits(weight, bits, torch.float32) for bits in WIDTHS]
        )
        _, bias_WN = unpack_pair(weight.gain_bias_WN)
        expected = routed_linear(x, weight_WNK, bias_WN[:, :n], bits_T)
        error = ((out.double() - expected).norm() / expected.norm()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def repeatable(n: int, k: int) -> bool:
    """Whether two runs give the same bits."""
    weight, prepared = random_digits(n, k), tokens_at(5, k, 6)
    tile = dispatch.tile(n, k, 5, weight.digits_SBN32.device, dispatch.kind_of(False, 6))
    outs = [multiply(prepared, 6, weight, tile)[0] for _ in range(3)]
    return all(torch.equal(out, outs[0]) for out in outs)


def random_gates(k: int) -> Gates:
    """A router of three linears whose gates are open for about half of all tokens."""
    extra = len(WIDTHS) - 1
    return Gates(
        (torch.randn(TRUNK, k, device="cuda") / math.sqrt(k)).half(),
        torch.randn(TRUNK, device="cuda"),
        torch.randn(extra, SHARING, TRUNK + 2, device="cuda"),
        torch.zeros(extra, SHARING, device="cuda"),
    )


def routed_differently(k: int) -> float:
    """Share of widths that the kernel's router decides otherwise than torch's."""
    gates = random_gates(k)
    x = torch.randn(64, k, device="cuda", dtype=torch.bfloat16)
    score_ELT = score(x.float(), gates.trunk_HK.float(), gates.offset_H, gates.head_ELF)
    expected_LT = bits_taken(score_ELT >= gates.threshold_EL[..., None])
    found_LT = prepare(x, gates, SHARING, GROUP, CODE_BITS).bits_LT
    return (found_LT != expected_LT).double().mean().item()


def time_preparing(k: int) -> list[Point]:
    """Tokens made ready for three linears: at one width, and at widths that a router decides."""
    gates = random_gates(k)
    tally = torch.zeros(2, SHARING, dtype=torch.int64, device="cuda")
    points = []
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        alike, routed = (
            time_graph(lambda x=x, w=w: prepare(x, w, SHARING, GROUP, CODE_BITS, tally), 24)[0]
            for w in (CODE_BITS, gates)
        )
        points.append({"k": k, "tokens": m, "alike_seconds": alike, "routed_seconds": routed})
    return points


def time_shape(n: int, k: int, ceilings: dict[str, float]) -> list[Point]:
    """All widths and numbers of tokens of one shape, with peers."""
    points = []
    peers = {m: time_peers(n, k, m) for m in TOKENS}
    for bits in WIDTHS:
        weights = rotation(n, k, bits)
        for m in TOKENS:
            device = torch.device("cuda")
            tile, any_tile = (
                dispatch.tile(n, k, m, device, dispatch.kind_of(False, b)) for b in (bits, None)
            )
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
                    **peers[m],
                }
            )
    return points


def time_mixed(n: int, k: int) -> list[Point]:
    """One token in ten has 8 bits, the others 2 or 3: a batch reads what its hungriest does."""
    weights = rotation(n, k, 2)
    points = []
    for m in (1, 4, 16, 64):
        for bits, hungry in itertools.product((2, 3), sorted({0, math.ceil(m / 10)})):
            prepared = hungry_tokens(m, k, bits, hungry)
            kind = dispatch.kind_of(prepared.mixed, None)
            tile = dispatch.tile(n, k, m, torch.device("cuda"), kind)
            points.append(
                {
                    "n": n,
                    "k": k,
                    "tokens": m,
                    "tokens_with_8_bits": hungry,
                    "bits_of_others": bits,
                    "steps": int(prepared.steps_L2[0, 0]),
                    "seconds": decode_times(weights, prepared, None, tile)[0],
                }
            )
    return points


def time_prompts(n: int, k: int) -> list[Point]:
    """Many tokens: dequantizing and multiplying, and multiplying alone."""
    digits = itertools.cycle(rotation(n, k, 8))
    full_NK = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    points = []
    for m in PROMPTS:
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        cublas = time_graph(lambda x=x: torch.mm(x, full_NK.T), 8)[0]
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
                    "cublas_seconds": cublas,
                }
            )
    return points


def time_peers(n: int, k: int, m: int) -> dict[str, float]:
    """Seconds of cuBLAS in bf16 and of torch's int4 kernel on the same shape."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    full = [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(math.ceil(ROTATED_BYTES / (2 * n * k)), 2))
    ]
    turn = itertools.cycle(full)
    cublas = time_graph(lambda: torch.mm(x, next(turn).T), 24)[0]
    count = math.ceil(ROTATED_BYTES / (n * k / 2))
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = [torch._convert_weight_to_int4pack(codes, 8) for _ in range(count)]
    scales: Tensor = torch.rand(k // GROUP, n, 2, device="cuda").bfloat16()
    quarter = itertools.cycle(packed)
    tinygemm = time_graph(
        lambda: torch._weight_int4pack_mm(x, next(quarter), GROUP, scales), max(count, 24)
    )[0]
    return {"cublas_seconds": cublas, "tinygemm_4bit_seconds": tinygemm}


def model_sums(points: list[Point], models: tuple[str, ...]) -> list[Point]:
    """All linears of a model, by width and tokens: seconds, shares of the bound, against peers."""
    by_key = {(p["n"], p["k"], p["tokens"], p["bits"]): p for p in points}
    sums = []
    for model, m, bits in itertools.product(models, TOKENS, WIDTHS):
        found = [by_key.get((*shape, m, bits)) for shape in SHAPES[model].values()]
        if None in found:
            continue
        total = {
            key: BLOCKS[model] * sum(p[key] for p in found if p)
            for key in ("seconds", "bound_seconds", "cublas_seconds", "tinygemm_4bit_seconds")
        }
        shares = {
            "of_bound": total["bound_seconds"] / total["seconds"],
            "faster_than_cublas": total["cublas_seconds"] / total["seconds"],
        }
        sums.append({"model": model, "tokens": m, "bits": bits, **total, **shares})
    return sums


def show(points: list[Point], sums: list[Point]) -> None:
    """Short tables, the sums last."""
    click.echo(
        "N x K | tokens | bits | us | unknown | bound | % | with empty | cuBLAS | int4 | tile"
    )
    for p in points:
        kinds = ("unknown", "bound", "cublas", "tinygemm_4bit")
        us = {kind: p[f"{kind}_seconds"] * 1e6 for kind in kinds}
        click.echo(
            f"{p['n']} x {p['k']} | {p['tokens']} | {p['bits']} | {p['seconds'] * 1e6:.1f} | "
            f"{us['unknown']:.1f} | {us['bound']:.1f} | {p['of_bound']:.0%} | "
            f"{p['of_bound_and_empty']:.0%} | "
            f"{us['cublas']:.1f} | {us['tinygemm_4bit']:.1f} | {p['tile']}"
        )
    for s in sums:
        click.echo(
            f"{s['model']} | {s['tokens']} | {s['bits']} | {s['seconds'] * 1e3:.3f} ms | "
            f"{s['of_bound']:.0%} of bound | {s['faster_than_cublas']:.2f}x cuBLAS"
        )


if __name__ == "__main__":
    main()
