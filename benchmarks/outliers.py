"""How calibration bears what large models have and the demo model lacks: large channels.

    python benchmarks/outliers.py --out benchmarks/results

The demo model is changed, calibrated and evaluated, on a quarter of the demo's calibration text:

    channels F   four channels of every norm times F, what reads them divided by F
    neurons F    four rows of every up_proj times F, what reads them divided by F
    norms F      the same channels of every norm times F and nothing else: another model

The first two compute what the demo model does. Gaps are beside full precision of the same model,
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


def channels(weights: Weights, factor: float, compensated: bool = True) -> None:
    """Some channels of every norm times a factor; what reads them divided by it, if compensated."""
    chosen = some(len(weights["model.norm.weight"]))
    for block in blocks(weights):
        for norm, readers in READERS.items():
            weights[f"{block}.{norm}.weight"][chosen] *= factor
            for reader in readers if compensated else ():
                weights[f"{block}.{reader}.weight"][:, chosen] /= factor


def neurons(weights: Weights, factor: float) -> None:
    """Some rows of every `up_proj` times a factor, and what reads them divided by it."""
    for block in blocks(weights):
        up = weights[f"{block}.mlp.up_proj.weight"]
        chosen = some(len(up))
        up[chosen] *= factor
        weights[f"{block}.mlp.down_proj.weight"][:, chosen] /= factor


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
    "norms 8": lambda weights: channels(weights, 8.0, compensated=False),
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
