"""The report: everything it promises, nothing from elsewhere, and a browser that shows it."""

import dataclasses
import html
import html.parser
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts import keys
from mbq.artifacts.documents import Manifest, TokenBits
from mbq.artifacts.errors import CorruptError, NotFoundError
from mbq.artifacts.sealed import get_document, put_document
from mbq.artifacts.store import LocalStore
from mbq.orchestrator.report import NAMES, collect, render
from mbq.workers.data import SAMPLE_TEXT
from tests.support.faulty import flip

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, _NAMES) if path), None)
RIVALS = ["linear", "norm", "learned", "shuffled", "random", "oracle"]


@pytest.fixture(scope="module")
def ablation_run(finish_run: Callable[..., Any], tiny_document: Any) -> Any:
    text = tiny_document()["evaluation"] | {"rivals": RIVALS, "average_bits": [2.5, 3.0, 5.0]}
    return finish_run(tiny_document(evaluation=text))


@pytest.fixture(scope="module")
def page(ablation_run: Any) -> str:
    return render(collect(ablation_run.store, ablation_run.document))


class _Outside(html.parser.HTMLParser):
    """Every address in a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            local = (value or "").startswith("#")
            if name in ("src", "href", "xlink:href", "data", "srcset", "action") and not local:
                self.found.append(f"{tag} {name}={value}")
        if tag in ("script", "link", "iframe", "object", "embed", "image", "img"):
            self.found.append(tag)


def _table_rows(page: str) -> list[list[str]]:
    """The cells of every row of every table."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    cells = (re.findall(r"<t[dh]>(.*?)</t[dh]>", row, re.DOTALL) for row in rows)
    return [[html.unescape(cell) for cell in found] for found in cells]


def _samples(page: str) -> list[list[tuple[str, str, str]]]:
    """Colour, title and text of every token of every sample."""
    samples = re.findall(r'<div class="sample">(.*?)</div>', page, re.DOTALL)
    span = r'<span style="background:(#\w{6})" title="([^"]*)">(.*?)</span>'
    return [
        [(colour, title, html.unescape(text)) for colour, title, text in found]
        for found in (re.findall(span, sample, re.DOTALL) for sample in samples)
    ]


def test_says_when_rounding_loses_less(ablation_run: Any) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    assert found.results is not None

    def page_with_gap(gap: float) -> str:
        rows = [
            row.model_copy(update={"gap": gap}) if row.variant.startswith("mbq-") else row
            for row in found.results.rows
        ]
        results = found.results.model_copy(update={"rows": tuple(rows)})
        return render(dataclasses.replace(found, results=results))

    said = "rounding to nearest loses less"
    assert said in page_with_gap(9.0) and said not in page_with_gap(-9.0)


def test_asks_for_nothing_outside(page: str) -> None:
    outside = _Outside()
    outside.feed(page)
    assert outside.found == []
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_holds_every_part(ablation_run: Any, page: str) -> None:
    for title in (
        "Perplexity by average bits",
        "Ways to share the bits",
        "Bits by block and linear",
        "Bits by token",
        "Block errors by width",
        "Outlier migration",
        "Average bits, asked and realised",
        "Kernels",
        "Provenance",
    ):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == 4
    assert ablation_run.document.run in page
    assert "no GPU was there: nothing was timed" in page
    assert ablation_run.document.model_digest in page
    assert "sequence_length: 32" in page
    for way in ("learned router, tokens shuffled", "random mix", "oracle (true errors"):
        assert way in page


def test_shows_the_sample_text_and_the_numbers_measured(ablation_run: Any, page: str) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    assert found.results is not None and found.sample is not None
    assert list(found.sample.bits) == ["2.25", "2.5", "2.75", "3.5"]
    # The tiny model has 128 positions: the text is cut there.
    shown = "".join(found.tokens).removeprefix("<s>")
    assert len(shown) > 100 and SAMPLE_TEXT.startswith(shown)
    for average, bits in found.sample.bits.items():
        assert all(2 <= value <= 8 for value in bits)
        assert sum(bits) / len(bits) == pytest.approx(float(average), abs=0.8)
    rows = {row.variant: row for row in found.results.rows}
    for variant in ("routed-2.5", "oracle-2.75", "shuffled-2.25", "random-3.5"):
        assert f"{rows[variant].gap:.4f}" in page


def test_every_row_is_in_a_table(ablation_run: Any, page: str) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    assert found.results is not None
    shown = _table_rows(page)
    kinds = {row.variant: row.variant.partition("-")[0] for row in found.results.rows}
    ways: dict[str, dict[float, str]] = {}
    for row in found.results.rows:
        kind = kinds[row.variant]
        perplexity = f"{row.perplexity:.3f} ± {row.perplexity_error:.3f}"
        if row.bits is None or row.realised_bits is None or row.total_bits is None:
            assert ["full precision", "", "", "", perplexity, ""] in shown
            continue
        if kind not in RIVALS:
            bits = [f"{row.bits:g}", f"{row.realised_bits:.2f}", f"{row.total_bits:.2f}"]
            gap = f"{row.gap:+.4f} ± {row.gap_error:.4f}"
            assert [NAMES[kind], *bits, perplexity, gap] in shown
        cell = f"{row.gap:.4f} ± {row.gap_error:.4f} ({row.total_bits:.2f})"
        ways.setdefault(kind, {})[row.bits] = cell
    averages = (2.25, 2.5, 2.75, 3.5)
    assert ["", *(f"average {bits:g}" for bits in averages)] in shown
    for kind in ("routed", *RIVALS):
        # The checkpoint was measured at 2.5 and 3 of these.
        assert [NAMES[kind], *(ways[kind].get(bits, "") for bits in averages)] in shown


def test_the_sample_is_whole_and_darker_where_more_bits_went(ablation_run: Any, page: str) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    assert found.sample is not None
    samples = _samples(page)
    assert len(samples) == len(found.sample.bits) == 4
    for sample, bits in zip(samples, found.sample.bits.values(), strict=True):
        assert [text for _, _, text in sample] == list(found.tokens)
        assert [title for _, title, _ in sample] == [f"{value:.2f} bits" for value in bits]
    # Colours are of what a text spends, from its fewest bits to its most.
    by_hand = TokenBits(
        manifest_sha256="0" * 64,
        ids=(5, 6, 7),
        bits={"2.5": (2.0, 4.0, 3.0), "3": (3.0, 3.0, 3.0)},
    )
    made = type(found)(**{**vars(found), "sample": by_hand, "tokens": [" <a", "b\n", "c"]})
    light, middle, dark = "#ffffcc", "#feba55", "#ed2e21"
    other_page = render(made)
    assert _samples(other_page) == [
        [(light, "2.00 bits", " <a"), (dark, "4.00 bits", "b\n"), (middle, "3.00 bits", "c")],
        [(light, "3.00 bits", " <a"), (light, "3.00 bits", "b\n"), (light, "3.00 bits", "c")],
    ]
    assert "<h3>average 2.5: 2.00 to 4.00 bits</h3>" in other_page


def test_each_figure_stands_in_its_part(ablation_run: Any, page: str) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    parts = dict(re.findall(r"<h2>([^<]*)</h2>(.*?)(?=<h2>|</body>)", page, re.DOTALL))
    drawn = {title: re.findall(r"<svg.*?</svg>", part, re.DOTALL) for title, part in parts.items()}
    figures = {title: svgs[0] for title, svgs in drawn.items() if svgs}
    words = {
        "Perplexity by average bits": ["log perplexity minus that", *NAMES.values()],
        "Bits by block and linear": ["average 2.5", "average 3", "average 5", "down", "code bits"],
        "Block errors by width": ["mean squared output error", "2 bits", "8 bits", "before"],
        "Outlier migration": ["100%"],
    }
    assert list(figures) == list(words)
    assert len(set(figures.values())) == 4
    for title, expected in words.items():
        for word in expected:
            assert html.escape(word) in figures[title], title
    # A number that only the records hold.
    overlaps = [record.outlier_overlap[2][8] for record in found.records]
    assert f">{sum(overlaps) / len(overlaps):.0%}<" in figures["Outlier migration"]


def test_rivals_are_measured_beside_the_checkpoint(ablation_run: Any) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    assert found.results is not None
    rows = {row.variant: row for row in found.results.rows}
    for rival in RIVALS:
        for bits in (2.25, 2.5, 2.75, 3.5):
            read = rows[f"{rival}-{bits:g}"].realised_bits
            assert read is not None
            assert read == pytest.approx(bits, abs=0.35), rival
    # The learned routers are the only ones that read weights of their own.
    totals = {r: rows[f"{r}-2.5"].total_bits - rows[f"{r}-2.5"].realised_bits for r in RIVALS}  # type: ignore[operator]
    assert totals["learned"] > totals["norm"] > totals["linear"]
    assert totals["learned"] == pytest.approx(totals["shuffled"])
    assert totals["linear"] == pytest.approx(totals["random"]) == pytest.approx(totals["oracle"])


def test_what_a_user_named_is_text_and_not_markup(ablation_run: Any) -> None:
    found = collect(ablation_run.store, ablation_run.document)
    evil = "<script>alert(1)</script>"
    document = found.document.model_copy(update={"name": evil, "model_location": evil})
    page = render(type(found)(**{**vars(found), "document": document, "tokens": [evil] * 128}))
    assert "<script" not in page


def test_without_an_evaluation_the_rest_is_there(
    finish_run: Callable[..., Any], tiny_document: Any
) -> None:
    run = finish_run(tiny_document(evaluation=None, slices=1, optimisation={"widths": [2]}))
    page = render(collect(run.store, run.document))
    assert "Block errors by width" in page
    assert "Perplexity by average bits" not in page


def test_an_unfinished_run_has_no_report(
    store: LocalStore, write_run: Callable[..., Any], tiny_document: Any
) -> None:
    document = write_run(store, tiny_document())
    with pytest.raises(NotFoundError, match="has no checkpoint yet"):
        collect(store, document)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; install the package chromium")
def test_a_browser_shows_it(page: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    picture = tmp_path / "report.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path}", "--window-size=1000,4000"]
    shown = subprocess.run(
        [BROWSER, *options, f"--screenshot={picture}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    # Whatever the page's policy refuses, a browser says on its console.
    assert "Content Security Policy" not in shown.stderr
    assert "Refused" not in shown.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    dumped = subprocess.run(
        [BROWSER, *options, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert dumped.stdout.count("<svg") == 4


@pytest.mark.parametrize("fault", ["damaged", "unnamed"])
def test_a_tokenizer_that_is_not_the_manifests_is_refused(
    ablation_run: Any, tmp_path: Path, fault: str
) -> None:
    store = LocalStore(Path(shutil.copytree(ablation_run.store.root, tmp_path / "store")))
    run, name = ablation_run.document.run, "tokenizer.json"
    if fault == "damaged":
        key = keys.checkpoint_key(run, name)
        store.put(key, [flip(store.read(key), 100)])
    else:
        key = keys.manifest_key(run)
        manifest = get_document(store, key, Manifest)
        files = {n: digest for n, digest in manifest.files.items() if n != name}
        put_document(store, key, manifest.model_copy(update={"files": files}))
    with pytest.raises(CorruptError, match=name):
        collect(store, ablation_run.document)
