"""How calibration bears what other models have and the demo model lacks.

    python benchmarks/outliers.py --out benchmarks/results

The demo model is changed, calibrated and evaluated, on a quarter of the demo's calibration text:

    channels F   four channels of every norm times F, what reads them divided by F
    neurons F    four rows of every up_proj times F, what reads them divided by F
    uneven S     every channel of every norm times 2 to a normal number times S, likewise
    constant S   normal numbers times S added to all values, which o_proj's bias takes away again
    small F      every norm times F, what reads it divided by F
    norms F      the channels of `channels F`, what reads them not divided: another model

All but the last compute what the demo model does. Gaps are beside full precision of the same model,
those of rounding too. Runs are kept in build/outliers, and not made again.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from provenance import provenance
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo"
KEPT = ROOT / "build" / "outliers"
CHANNELS = 4
READERS = {
    "input_layernorm": [f"self_attn.{name}_proj" for name in "qkv"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
}

Weights = dict[str, Tensor]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for results.")
def main(out: Path) -> None:
    """Calibrate every changed model and write what it lost."""
    command("head", "start")
    try:
        found = {name: gaps(run(name, change)) for name, change in CHANGES.items()}
    finally:
        command("head", "stop")
    result = provenance() | {"calibration": calibration(), "gaps": found}
    path = out / f"{result['date']}-outliers-demo.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, rows in found.items():
        shown = [f"{key} {row['gap']:.4f} ± {row['gap_error']:.4f}" for key, row in rows.items()]
        click.echo(f"{name}: {', '.join(shown)}")


def channels(weights: Weights, factor: float) -> None:
    """Some channels of every norm times a factor, and what reads them divided by it."""
    factor_K = torch.ones_like(weights["model.norm.weight"])
    factor_K[some(len(factor_K))] = factor
    scale_norms(weights, factor_K)


def norms(weights: Weights, factor: float) -> None:
    """The same channels of every norm times a factor, and nothing else."""
    chosen = some(len(weights["model.norm.weight"]))
    for block in blocks(weights):
        for norm in READERS:
            weights[f"{block}.{norm}.weight"][chosen] *= factor


def neurons(weights: Weights, factor: float) -> None:
    """Some rows of every `up_proj` times a factor, and what reads them divided by it."""
    for block in blocks(weights):
        up = weights[f"{block}.mlp.up_proj.weight"]
        chosen = some(len(up))
        up[chosen] *= factor
        weights[f"{block}.mlp.down_proj.weight"][:, chosen] /= factor


def uneven(weights: Weights, spread: float) -> None:
    """Every channel of every norm times a power of two, and what reads it divided by it."""
    scale_norms(weights, 2.0 ** (spread * normal(len(weights["model.norm.weight"]))).round())


def small(weights: Weights, factor: float) -> None:
    """Every norm times a factor, and what reads it divided by it."""
    scale_norms(weights, torch.full_like(weights["model.norm.weight"], factor))


def constant(weights: Weights, size: float) -> None:
    """A constant vector added to the values of every block, and taken away behind them."""
    config = json.loads((DEMO / "model/config.json").read_text(encoding="utf-8"))
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    for block in blocks(weights):
        for name in "qkvo":
            rows = len(weights[f"{block}.self_attn.{name}_proj.weight"])
            weights[f"{block}.self_attn.{name}_proj.bias"] = torch.zeros(rows)
        values = size * normal(len(weights[f"{block}.self_attn.v_proj.weight"]))
        weights[f"{block}.self_attn.v_proj.bias"] = values
        read = values.view(shared, -1).repeat_interleave(heads // shared, dim=0).flatten()
        weights[f"{block}.self_attn.o_proj.bias"] = (
            -weights[f"{block}.self_attn.o_proj.weight"] @ read
        )


def scale_norms(weights: Weights, factor_K: Tensor) -> None:
    """All norms in blocks times factors, and what reads them divided by these."""
    for block in blocks(weights):
        for norm, readers in READERS.items():
            weights[f"{block}.{norm}.weight"] *= factor_K
            for reader in readers:
                weights[f"{block}.{reader}.weight"] /= factor_K


def normal(count: int) -> Tensor:
    """The same everywhere."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def some(count: int) -> Tensor:
    """The same channels everywhere, as in large models."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:CHANNELS]


def blocks(weights: Weights) -> list[str]:
    """Prefixes of the blocks' names."""
    return list(dict.fromkeys(".".join(n.split(".")[:3]) for n in weights if ".layers." in n))


CHANGES: dict[str, Callable[[Weights], None]] = {
    "none": lambda weights: None,
    "channels 8": lambda weights: channels(weights, 8.0),
    "channels 32": lambda weights: channels(weights, 32.0),
    "neurons 8": lambda weights: neurons(weights, 8.0),
    "neurons 256": lambda weights: neurons(weights, 256.0),
    "uneven 1.5": lambda weights: uneven(weights, 1.5),
    "constant 3": lambda weights: constant(weights, 3.0),
    "small 4096": lambda weights: small(weights, 4096.0),
    "norms 8": lambda weights: norms(weights, 8.0),
}


def calibration() -> dict[str, Any]:
    """The demo's spec, with less text."""
    spec: dict[str, Any] = yaml.safe_load((DEMO / "demo.yaml").read_text(encoding="utf-8"))
    return {
        "calibration": spec["calibration"] | {"samples": 16},
        "optimisation": spec["optimisation"],
        "evaluation": spec["evaluation"],
        "routing": {"method": "linear"},
    }


def run(name: str, change: Callable[[Weights], None]) -> dict[str, Any]:
    """Results of a finished run of a changed model."""
    folder = KEPT / name.replace(" ", "-")
    shutil.copytree(DEMO / "model", folder, dirs_exist_ok=True)
    weights = {key: w.float() for key, w in load_file(DEMO / "model/model.safetensors").items()}
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["attention_bias"] = any(name.endswith("q_proj.bias") for name in weights)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.copy(DEMO / "heldout.txt", KEPT)
    spec = KEPT / f"{folder.name}.yaml"
    spec.write_text(yaml.safe_dump(calibration() | {"model": {"source": str(folder)}}))
    found: dict[str, Any] = json.loads(command("watch", command("submit", str(spec)), "--json"))
    return found


def command(*words: str) -> str:
    """What a command prints."""
    program = Path(sys.executable).with_name("mbq-cluster")
    environment = os.environ | {"MBQ_HOME": str(KEPT)}
    called = [program, *words]
    return subprocess.run(
        called, env=environment, stdout=subprocess.PIPE, check=True, text=True
    ).stdout.strip()


def gaps(found: dict[str, Any]) -> dict[str, Any]:
    """Perplexity at full precision, and gaps of ours and of rounding by width."""
    rows = {row["variant"]: row for row in found["results"]["rows"]}
    kept = ("perplexity", "gap", "gap_error")
    names = ["full", *(f"{kind}-{bits}" for kind in ("mbq", "rtn") for bits in (2, 3, 4, 6, 8))]
    return {name: {key: rows[name][key] for key in kept} for name in names}


if __name__ == "__main__":
    main()
