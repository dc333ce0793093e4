"""Finished runs beside static peers: the same model, text, tokens and group size.

    python benchmarks/quality.py NAME RUN [RUN ...] \
        --peer auto-round=PYTHON --peer gptqmodel=PYTHON --peer llmcompressor=PYTHON

RUN is in MBQ_HOME's store; its calibration tokens are what each peer gets, its evaluation tokens
what each is measured on, by the same code. PYTHON is the interpreter of an environment that has the
peer (benchmarks/README.md says how they are made). Each peer makes 2, 3 and 4 bits, symmetric and
asymmetric, one model each; what it makes is kept under build/quality and not made again. A peer
that fails is reported with its last line.

`gap` is the mean difference of log perplexity to full precision, its error paired by sequence;
`bits` are those of the codes, `total` adds scales, zeros, gains, biases and routers. For every
average of ours, `best` is the peer with the smallest gap at the largest width that is not above it,
and `beside` the difference of the gaps, its error paired again. Writes
benchmarks/results/<date>-quality-NAME.json.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from mbq.artifacts import keys
from mbq.artifacts.manifest import Results, VariantLosses
from mbq.artifacts.sealed import get_document
from mbq.artifacts.source import open_source
from mbq.orchestrator.status import locate
from mbq.orchestrator.submit import home
from mbq.workers.determinism import attention
from mbq.workers.evaluate import sequence_losses
from mbq.workers.model import open_model
from mbq.workers.opened import Job, Opened
from mbq.workers.variants import FULL, parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
SCRIPTS = {
    "auto-round": "with_auto_round.py",
    "gptqmodel": "with_gptqmodel.py",
    "llmcompressor": "with_llmcompressor.py",
}
WIDTHS = (2, 3, 4)
# A float16 scale for a group of 128; asymmetric ones have a zero as large as a code, too.
SCALE_BITS = 16 / 128
# What of a spec is recorded.
RECORDED = {"slices", "group_size", "optimisation", "routing", "propagation", "dtype"}

Entry = dict[str, Any]


@click.command()
@click.argument("name")
@click.argument("runs", nargs=-1, required=True)
@click.option("--peer", "peers", multiple=True, metavar="NAME=PYTHON")
def main(name: str, runs: tuple[str, ...], peers: tuple[str, ...]) -> None:
    """Measure peers on the text of the first run, and put its and the other runs' rows beside."""
    store_uri = str(home() / "store")
    opened = [Opened(Job(store_uri, locate(run, store_uri)[1].run, "cpu")) for run in runs]
    first = opened[0]
    documents = [one.document for one in opened]
    texts = {(d.model_digest, d.calibration_tokens, d.evaluation_tokens) for d in documents}
    if len(texts) > 1:
        raise click.ClickException("these runs differ in model or text: nothing to compare")
    full: Sequence[float] = ()
    ours: dict[str, Entry] = {}
    for one in opened:
        found = our_entries(one)
        full = found.pop(FULL)["losses"]
        ours |= {f"{one.document.spec.propagation} {key}": row for key, row in found.items()}
    theirs: dict[str, Entry] = {}
    for peer in peers:
        known, _, python = peer.partition("=")
        theirs |= peer_entries(first, known, python)
    rows = {**ours, **theirs}
    for row in rows.values():
        if "losses" in row:
            row["gap"], row["gap_error"] = paired(row["losses"], full)
    for row in ours.values():
        row |= beside(row, theirs)
    click.echo(table(rows))
    result = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("mbq-cluster", "torch", "transformers")},
        "peers": {p.partition("=")[0]: peer_version(*p.split("=")) for p in peers},
        "command": " ".join(["python", "benchmarks/quality.py", name, *runs]),
        "runs": {d.run: d.spec.model_dump(mode="json", include=RECORDED) for d in documents},
        "sequences": len(full),
        "rows": {key: {k: v for k, v in row.items() if k != "losses"} for key, row in rows.items()},
    }
    out = RESULTS / f"{result['date']}-quality-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(out)


def our_entries(opened: Opened) -> dict[str, Entry]:
    """Rows of a run by variant."""
    store, document = opened.store, opened.document
    results = get_document(store, keys.results_key(document.run), Results)
    found = {}
    for row in results.rows:
        if parse(row.variant)[0] in (FULL, "mbq", "routed"):
            key = keys.evaluation_key(document.run, results.tokens_sha256, row.variant)
            losses = get_document(store, key, VariantLosses).losses
            bits = {"bits": row.realised_bits, "total": row.total_bits, "asked": row.bits}
            found[row.variant] = {"losses": losses, **bits}
    return found


def peer_entries(opened: Opened, peer: str, python: str) -> dict[str, Entry]:
    """Rows of a peer by width and kind."""
    document = opened.document
    assert document.evaluation_tokens is not None, "a run with results has a text for them"
    ids = opened.tokens(document.evaluation_tokens)
    folder = ROOT / "build" / "quality" / document.run
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder / "tokens.safetensors"
    save_file({"ids": opened.tokens(document.calibration_tokens).int()}, tokens)
    found = {}
    for bits in WIDTHS:
        for kind in ("sym", "asym"):
            stem = folder / f"{peer}-{bits}-{kind}"
            done = stem.with_suffix(".json")
            if not done.exists():
                done.write_text(
                    json.dumps(make(opened, peer, python, tokens, stem, ids, bits, kind))
                )
            found[f"{peer} {bits} {kind}"] = json.loads(done.read_text())
    return found


def make(
    opened: Opened,
    peer: str,
    python: str,
    tokens: Path,
    out: Path,
    ids: torch.Tensor,
    bits: int,
    kind: str,
) -> Entry:
    """Let a peer quantize the model and measure what it made."""
    script = Path(__file__).parent / "peers" / SCRIPTS[peer]
    source = opened.document.model_location
    done = subprocess.run(
        [python, script, source, tokens, out, str(bits), kind],
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}
    line = next(t for t in reversed(done.stdout.splitlines()) if t.startswith("seconds "))
    model = open_model(open_source(str(out), "main"), torch.float32, torch.device("cpu"))
    blocks = (model.block(index) for index in range(model.block_count))
    with attention():
        losses = sequence_losses(model, blocks, ids, opened.spec.microbatch, lambda _: None)
    total = bits + SCALE_BITS + (bits / 128 if kind == "asym" else 0.0)
    return {
        "losses": losses,
        "bits": bits,
        "total": total,
        "seconds_per_block": float(line.split()[1]) / model.block_count,
    }


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error over sequences."""
    differences = [one - other for one, other in zip(values, others, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5


def beside(row: Entry, theirs: Mapping[str, Entry]) -> Entry:
    """The best peer at the largest width that is not above this one, and how far it is away."""
    below = [t for t in theirs.values() if "losses" in t and t["bits"] <= row["asked"]]
    if not below:
        return {}
    width = max(t["bits"] for t in below)
    best = min(
        (key for key, t in theirs.items() if "losses" in t and t["bits"] == width),
        key=lambda key: float(theirs[key]["gap"]),
    )
    difference, error = paired(row["losses"], theirs[best]["losses"])
    return {"best": best, "beside": difference, "beside_error": error}


def table(rows: Mapping[str, Entry]) -> str:
    lines = [
        f"{'':32}{'bits':>7}{'total':>7}{'gap':>9}{'±':>8}   beside the best peer at its width"
    ]
    for key, row in rows.items():
        if "failed" in row:
            lines.append(f"{key:32}  failed: {row['failed']}")
            continue
        numbers = f"{row['bits']:7.2f}{row['total']:7.2f}{row['gap']:9.4f}{row['gap_error']:8.4f}"
        seconds = row.get("seconds_per_block")
        end = f"   {seconds:.0f} s a block" if seconds else ""
        if "best" in row:
            end = f"   {row['beside']:+.4f} ± {row['beside_error']:.4f} to {row['best']}"
        lines.append(f"{key:32}{numbers}{end}")
    return "\n".join(lines)


def peer_version(peer: str, python: str) -> str:
    command = f"from importlib.metadata import version; print(version({peer!r}))"
    return subprocess.check_output([python, "-c", command], text=True).strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
