"""Finished runs beside static peers: the same model, text, tokens and group size.

    python benchmarks/static.py SPEC PEER=PYTHON ...      # makes the peers
    python benchmarks/quality.py NAME RUN [RUN ...]

RUN is in MBQ_HOME's store. Every peer that was made for the first run's model and calibration
tokens is measured on its evaluation tokens, by the same code; a peer that failed is reported.

`gap` is the mean difference of log perplexity to full precision, its error paired by sequence;
`bits` are those of the codes, `total` adds scales, zeros, exponents, gains, biases and routers. For
every average of ours, `best` is the peer with the smallest gap at the largest width that is not
above it, and `beside` the difference of the gaps, its error paired again. Seconds a block are those
of the clock and, for peers, of the processor too, since runs may have shared it. Writes
benchmarks/results/<date>-quality-NAME.json.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from provenance import provenance
from static import folder_of

from mbq.artifacts import keys
from mbq.artifacts.documents import Results, VariantLosses
from mbq.artifacts.sealed import get_document
from mbq.artifacts.source import open_source
from mbq.orchestrator.local import default_store
from mbq.orchestrator.status import locate
from mbq.workers.determinism import attention
from mbq.workers.evaluate import sequence_losses
from mbq.workers.model import open_model
from mbq.workers.opened import Opened, RunRef
from mbq.workers.variants import FULL, parse

RESULTS = Path(__file__).with_name("results")
# Of a group's scale; asymmetric groups have a zero as large as a code, too.
SCALE_BITS = 16
# What of a spec is recorded.
RECORDED = {"slices", "group_size", "optimisation", "routing", "propagation", "dtype"}

Entry = dict[str, Any]


@click.command()
@click.argument("name")
@click.argument("runs", nargs=-1, required=True)
def main(name: str, runs: tuple[str, ...]) -> None:
    """Measure peers on the text of the first run, and put its and the other runs' rows beside."""
    opened = [open_run(run) for run in runs]
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
    theirs = peer_entries(first)
    rows = {**ours, **theirs}
    for row in rows.values():
        if "losses" in row:
            row["gap"], row["gap_error"] = paired(row["losses"], full)
    for row in ours.values():
        row |= beside(row, theirs)
    click.echo(table(rows))
    result = {
        **provenance(),
        "runs": {d.run: d.spec.model_dump(mode="json", include=RECORDED) for d in documents},
        "sequences": len(full),
        "rows": {key: {k: v for k, v in row.items() if k != "losses"} for key, row in rows.items()},
    }
    out = RESULTS / f"{result['date']}-quality-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(out)


def open_run(run: str) -> Opened:
    """A run of MBQ_HOME's store."""
    store_uri = default_store()
    return Opened(RunRef(store_uri, locate(run, store_uri)[1].run, "cpu"))


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


def peer_entries(opened: Opened) -> dict[str, Entry]:
    """Rows of all peers that were made, by peer, width and kind."""
    text = opened.document.evaluation_tokens
    assert text is not None, "a run with results has a text for them"
    group, found = opened.spec.group_size, {}
    for record in sorted(folder_of(opened.document).glob("*-*-*sym.json")):
        made = json.loads(record.read_text(encoding="utf-8"))
        if "failed" not in made:
            kept = record.with_suffix(f".{text.sha256[:12]}")
            if not kept.exists():
                losses = measure(opened, record.with_suffix(""), opened.tokens(text))
                kept.write_text(json.dumps(losses), encoding="utf-8")
            made |= {"losses": json.loads(kept.read_text(encoding="utf-8"))}
            _, bits, kind = record.stem.rsplit("-", 2)
            made |= {"bits": int(bits), "total": total_bits(int(bits), kind, group)}
            for seconds in ("seconds", "cpu_seconds"):
                made[f"{seconds}_per_block"] = made.pop(seconds) / opened.model.block_count
        found[record.stem] = made
    return found


def measure(opened: Opened, folder: Path, ids: torch.Tensor) -> list[float]:
    """Losses of a model that a peer made."""
    model = open_model(open_source(str(folder), "main"), torch.float32, torch.device("cpu"))
    blocks = (model.block(index) for index in range(model.block_count))
    with attention():
        return sequence_losses(model, blocks, ids, opened.spec.microbatch, lambda _: None)


def total_bits(bits: int, kind: str, group: int) -> float:
    return bits + (SCALE_BITS + (bits if kind == "asym" else 0)) / group


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
        end = f"   {row['cpu_seconds_per_block']:.0f} s a block" if "version" in row else ""
        if "best" in row:
            end = f"   {row['beside']:+.4f} ± {row['beside_error']:.4f} to {row['best']}"
        lines.append(f"{key:32}{numbers}{end}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
