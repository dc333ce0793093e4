"""Static peers of a run: one model per width, each made in the peer's own environment and kept.

    python benchmarks/static.py SPEC PEER=PYTHON ... [--row 2-asym ...]

SPEC is a preset or a YAML file; its calibration tokens and group size are what each peer gets.
PYTHON is the interpreter of an environment that has the peer (README.md says how they are made).
What is made lies in build/quality, by model, calibration tokens and group size, and is not made
again; `quality.py` measures it. A peer that fails is kept as such, with its last line.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import click
from safetensors.torch import load, save_file

from mbq.artifacts.documents import RunDocument
from mbq.orchestrator.submit import prepare, read_spec

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "auto-round": "with_auto_round.py",
    "gptqmodel": "with_gptqmodel.py",
    "llmcompressor": "with_llmcompressor.py",
}
ROWS = tuple(f"{bits}-{kind}" for kind in ("asym", "sym") for bits in (2, 3, 4))

Entry = dict[str, Any]


@click.command()
@click.argument("spec")
@click.argument("peers", nargs=-1, required=True)
@click.option("--row", "rows", multiple=True, type=click.Choice(ROWS), default=ROWS)
def main(spec: str, peers: tuple[str, ...], rows: tuple[str, ...]) -> None:
    """Make what is missing of a spec's peers."""
    prepared = prepare(*read_spec(spec, ()))
    folder = folder_of(prepared.document)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = load(b"".join(prepared.blobs[0]))["tokens"]
    save_file({"ids": tokens}, folder / "tokens.safetensors")
    for peer in peers:
        name, _, python = peer.partition("=")
        for row in rows:
            record = folder / f"{name}-{row}.json"
            if not record.exists():
                made = make(name, python, prepared.document, folder, row)
                record.write_text(json.dumps(made) + "\n", encoding="utf-8")
            click.echo(f"{record.stem}: {record.read_text(encoding='utf-8').strip()}")


def folder_of(document: RunDocument) -> Path:
    """Where the peers of a run's model, calibration tokens and group size are kept."""
    digests = document.model_digest, document.calibration_tokens.sha256
    model, tokens = (digest.rpartition(":")[2][:12] for digest in digests)
    return ROOT / "build" / "quality" / f"{model}-{tokens}-{document.spec.group_size}"


def make(peer: str, python: str, document: RunDocument, folder: Path, row: str) -> Entry:
    """Let a peer quantize a run's model into `folder`.

    Returns its version and its seconds, of the clock and of the processor; or why it failed.
    """
    script = Path(__file__).resolve().parent / "peers" / SCRIPTS[peer]
    bits, kind = row.split("-")
    model, group = document.model_location, str(document.spec.group_size)
    tokens, out = folder / "tokens.safetensors", folder / f"{peer}-{row}"
    done = subprocess.run(
        [python, script, model, tokens, out, bits, kind, group],
        cwd=folder,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}
    line = next(t for t in reversed(done.stdout.splitlines()) if t.startswith("seconds "))
    seconds, cpu_seconds = map(float, line.split()[1:])
    command = f"from importlib.metadata import version; print(version({peer!r}))"
    found = subprocess.check_output([python, "-c", command], text=True).strip()
    return {"version": found, "seconds": seconds, "cpu_seconds": cpu_seconds}


if __name__ == "__main__":
    main()
