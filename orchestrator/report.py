"""The report of a run: one HTML file that needs nothing else, made from what the store holds.

`collect` reads the documents, `figures.py` draws, `report.html` arranges. The page refuses every
request by its own content security policy; figures are inline SVG.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from mbq.artifacts import keys
from mbq.artifacts.digests import CheckedObject
from mbq.artifacts.documents import (
    BlockRecord,
    Manifest,
    Results,
    RoutingRecord,
    Row,
    RunDocument,
    TokenBits,
    ValidationRecord,
    VariantLosses,
)
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.sealed import document_sha256, find_document
from mbq.artifacts.store import Store
from mbq.orchestrator import figures
from mbq.orchestrator.display import lost_to_rounding, validation_lines
from mbq.orchestrator.status import no_checkpoint, validations_of
from mbq.workers.variants import FULL, PACKED, ROUNDED, ROUTED, parse

_SHOWN_WIDTHS = 4
# How variants are called in tables and legends.
NAMES = {
    PACKED: "every token alike",
    ROUTED: "this checkpoint",
    ROUNDED: "round to nearest, one model per width",
    "linear": "shared across linears only",
    "norm": "activation norm",
    "learned": "learned router",
    "shuffled": "learned router, tokens shuffled",
    "random": "random mix",
    "oracle": "oracle (true errors; not possible at run time)",
}


@dataclass(frozen=True)
class Found:
    """What the store holds of a finished run; parts that were not asked for are empty.

    Attributes:
        routing: how the checkpoint shares bits, settled.
        linear_bits: bits of every linear, by average width.
        tokens: the sample text, token by token.
    """

    document: RunDocument
    manifest: Manifest
    manifest_sha256: str
    records: Sequence[BlockRecord]
    results: Results | None
    routing: RoutingRecord | None
    linear_bits: dict[float, dict[str, float]]
    sample: TokenBits | None
    tokens: Sequence[str]
    validations: Sequence[ValidationRecord]


def collect(store: Store, document: RunDocument) -> Found:
    """Read what a report needs.

    Raises:
        NotFoundError: the run has not published its checkpoint.
    """
    run = document.run
    manifest = find_document(store, keys.manifest_key(run), Manifest)
    if manifest is None:
        raise no_checkpoint(store, document)
    results = find_document(store, keys.results_key(run), Results)
    sample = find_document(store, keys.sample_key(run), TokenBits)
    method = results.method if results else None
    routing = find_document(store, keys.routing_key(run, method), RoutingRecord) if method else None
    return Found(
        document=document,
        manifest=manifest,
        manifest_sha256=document_sha256(store, keys.manifest_key(run)),
        records=_records(store, run, len(manifest.blocks)),
        results=results,
        routing=routing,
        linear_bits=_linear_bits(store, document, results) if results else {},
        sample=sample,
        tokens=_pieces(store, run, manifest, sample.ids) if sample else (),
        validations=validations_of(store, document),
    )


def render(found: Found) -> str:
    """The page."""
    # importlib.resources does not know the namespace package of an editable install.
    source = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    rows = found.results.rows if found.results else ()
    drawn = {
        "curve": figures.curve(rows, NAMES) if rows else "",
        "linears": figures.linear_bits(found.linear_bits) if found.linear_bits else "",
        "errors": figures.block_errors(found.records) if found.records else "",
        "outliers": figures.outliers(found.records) if found.records else "",
    }
    return environment.from_string(source).render(
        found=found,
        figures={name: Markup(svg) for name, svg in drawn.items()},
        widths=[row for row in rows if not _is_rival(row)],
        rivals=_rivals(rows),
        rival_averages=sorted({row.bits for row in rows if _is_rival(row)}),
        names=NAMES,
        kind=lambda row: parse(row.variant)[0],
        sample=_coloured(found),
        worse=lost_to_rounding(rows),
        kernels=validation_lines(found.validations),
        spec=yaml.safe_dump(found.document.spec.model_dump(mode="json"), sort_keys=False),
    )


def _records(store: Store, run: str, blocks: int) -> list[BlockRecord]:
    """Records of the blocks; a published checkpoint does not need what they describe."""
    found = [find_document(store, keys.block_key(run, b), BlockRecord) for b in range(blocks)]
    return [record for record in found if record is not None]


def _rivals(rows: Sequence[Row]) -> list[tuple[str, dict[float | None, Row]]]:
    """The ablation: for every way to share bits its row at each average width of the rivals."""
    averages = {row.bits for row in rows if _is_rival(row)}
    if not averages:
        return []
    ways: dict[str, dict[float | None, Row]] = {}
    for row in rows:
        kind, bits = parse(row.variant)
        if bits in averages and kind not in (ROUNDED, PACKED):
            ways.setdefault(kind, {})[bits] = row
    return list(ways.items())


def _is_rival(row: Row) -> bool:
    return parse(row.variant)[0] not in (FULL, ROUNDED, PACKED, ROUTED)


def _linear_bits(
    store: Store, document: RunDocument, results: Results
) -> dict[float, dict[str, float]]:
    found: dict[float, dict[str, float]] = {}
    for row in results.rows:
        # The lowest widths: higher up every linear reads much the same.
        if parse(row.variant)[0] == ROUTED and row.bits is not None and len(found) < _SHOWN_WIDTHS:
            key = keys.evaluation_key(document.run, results.tokens_sha256, row.variant)
            losses = find_document(store, key, VariantLosses)
            if losses is not None:
                found[row.bits] = losses.linear_bits
    return found


def _pieces(store: Store, run: str, manifest: Manifest, ids: Sequence[int]) -> list[str]:
    """The text of each token, by what it adds to the text before it."""
    from tokenizers import Tokenizer

    name = "tokenizer.json"
    if name not in manifest.files:
        raise CorruptError(f"the manifest of run {run} names no {name}; pack again")
    data = CheckedObject(store, keys.checkpoint_key(run, name), manifest.files[name]).read()
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise CorruptError(f"the checkpoint's {name} cannot be read: {error}") from error
    texts = [
        tokenizer.decode(list(ids[:n]), skip_special_tokens=False) for n in range(len(ids) + 1)
    ]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]


def _coloured(found: Found) -> list[dict[str, Any]]:
    """The sample text at every average width: pieces of text with their bits and a colour."""
    if found.sample is None:
        return []
    return [
        {
            "average": average,
            "fewest": min(bits),
            "most": max(bits),
            "pieces": [
                {"text": text, "bits": token_bits, "colour": colour}
                for text, token_bits, colour in zip(
                    found.tokens, bits, figures.colours(bits), strict=True
                )
            ],
        }
        for average, bits in found.sample.bits.items()
    ]
