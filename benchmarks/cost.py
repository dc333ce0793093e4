"""Seconds a block of one elastic checkpoint and of the static ones that it replaces, at once.

    python benchmarks/cost.py NAME SPEC PYTHON [--row 4-asym ...]

SPEC is a preset or a YAML file, calibrated with 6 passes on one thread; PYTHON is the interpreter
of an environment that has auto-round, whose rows are made one after the other on one thread, too,
from the same tokens. Both start together, on two cores that nothing else should use, so what slows
one slows the other. Ours are the records' seconds, routers included. Writes
benchmarks/results/<date>-cost-NAME.json.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from provenance import provenance
from safetensors.torch import load, save_file
from static import ROWS, make

from mbq.artifacts.runs import block_records
from mbq.artifacts.store import LocalStore
from mbq.orchestrator.submit import prepare, read_spec

SETTINGS = ("threads=1", "optimisation.passes=6", "resources.workers=1", "evaluation=null")
RESULTS = Path(__file__).resolve().parent / "results"


@click.command()
@click.argument("name")
@click.argument("spec")
@click.argument("python")
@click.option("--row", "rows", multiple=True, type=click.Choice(ROWS))
def main(name: str, spec: str, python: str, rows: tuple[str, ...]) -> None:
    """Calibrate, and let auto-round quantize, at the same time."""
    prepared = prepare(*read_spec(spec, SETTINGS))
    document = prepared.document
    blocks = int(document.source.config["num_hidden_layers"])
    with TemporaryDirectory() as made, TemporaryDirectory() as home, ThreadPoolExecutor() as pool:
        tokens = load(b"".join(prepared.blobs[0]))["tokens"]
        save_file({"ids": tokens}, Path(made) / "tokens.safetensors")
        ours = pool.submit(calibrate, spec, home)
        entries: dict[str, Any] = {
            row: make("auto-round", python, document, Path(made), row) for row in rows or ROWS[:3]
        }
        ours.result()
        store = LocalStore(Path(home) / "store")
        seconds = [r.seconds for r in block_records(store, document.run, blocks).values()]
    for entry in (e for e in entries.values() if "version" in e):
        entry["seconds_per_block"] = entry.pop("seconds") / blocks
        entry["cpu_seconds_per_block"] = entry.pop("cpu_seconds") / blocks
    result = provenance() | {
        # Where the peer's environment lies says nothing.
        "command": f"python benchmarks/cost.py {name} {spec} PEERS/auto-round/bin/python",
        "blocks": blocks,
        "seconds_per_block": statistics.fmean(seconds),
        "seconds": seconds,
        "auto-round": entries,
    }
    path = RESULTS / f"{result['date']}-cost-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(path.read_text(encoding="utf-8"))


def calibrate(spec: str, home: str) -> None:
    """A run of its own, from nothing."""
    command = [str(Path(sys.executable).with_name("mbq-cluster"))]
    environment = os.environ | {"MBQ_HOME": home}
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    try:
        subprocess.run(
            [*command, "submit", spec, "--watch", *settings], env=environment, check=True
        )
    finally:
        subprocess.run([*command, "head", "stop"], env=environment, check=True)


if __name__ == "__main__":
    main()
