"""Tables and lines as they stand on a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from mbq.artifacts import keys
from mbq.artifacts.documents import KernelTiming, Results, Row, Running, Status, ValidationRecord
from mbq.artifacts.sealed import get_document
from mbq.orchestrator import display
from mbq.orchestrator.display import (
    Watch,
    _duration,
    lost_to_rounding,
    result_table,
    validation_lines,
)
from mbq.orchestrator.status import RunState


def _row(variant: str, *numbers: float | None) -> Row:
    """Bits, read, total, perplexity, its error, gap, its error."""
    return Row.model_validate(dict(zip(Row.model_fields, (variant, *numbers), strict=True)))


def _printed(results: Results) -> tuple[str, list[str]]:
    """The title, which is broken where the table ends, and the lines below it."""
    out = io.StringIO()
    Console(file=out, width=120).print(result_table(results))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    top = next(number for number, line in enumerate(lines) if "BITS" in line)
    return " ".join(lines[:top]), lines[top:]


def test_the_table_shows_every_width_and_what_it_reads() -> None:
    results = Results(
        run="0123456789ab",
        method="norm",
        tokens_sha256="0" * 64,
        tokens=25_600,
        sequence_length=256,
        rows=(
            _row("full", None, None, None, 11.5, 0.25, 0.0, 0.0),
            _row("rtn-2", 2, 2, 2.25, 27.1, 0.7, 0.85, 0.008),
            _row("rtn-3", 3, 3, 3.25, 12.9, 0.37, 0.112, 0.0024),
            _row("mbq-2", 2, 2, 2.346, 13.375, 0.375, 0.1443, 0.0043),
            _row("mbq-3", 3, 3, 3.346, 11.91, 0.34, 0.0281, 0.0017),
            _row("mbq-8", 8, 8, 8.346, 11.499, 0.251, -0.0001, 0.0003),
            _row("routed-2.5", 2.5, 2.487, 2.854, 12.28, 0.34, 0.059, 0.0028),
            # Shared bits may be fewer than asked: then they stand above the whole width.
            _row("routed-3", 3, 2.994, 3.36, 11.86, 0.339, 0.0241, 0.0016),
            # Rivals are for the report.
            _row("oracle-2.5", 2.5, 2.5, 2.9, 12.0, 0.3, 0.0556, 0.0027),
        ),
        slice_bytes=(1_234_567, 765_432),
        base_bytes=2_345_678,
    )
    title = "perplexity ± standard error, 25,600 held-out tokens"
    expected = """\
       BITS  READ  TOTAL         ELASTIC       GAP TO FULL  ROUND TO NEAREST
       full               11.500 ± 0.250
          2  2.00   2.35  13.375 ± 0.375  +0.1443 ± 0.0043    27.100 ± 0.700
average 2.5  2.49   2.85  12.280 ± 0.340  +0.0590 ± 0.0028
  average 3  2.99   3.36  11.860 ± 0.339  +0.0241 ± 0.0016    12.900 ± 0.370
          3  3.00   3.35  11.910 ± 0.340  +0.0281 ± 0.0017    12.900 ± 0.370
          8  8.00   8.35  11.499 ± 0.251  -0.0001 ± 0.0003
bytes: base 2,345,678, slices 1,234,567, 765,432"""
    shared = f"{title}; averages by norm"
    assert _printed(results) == (shared, expected.splitlines())
    assert _printed(results.model_copy(update={"method": None}))[0] == title


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0m00s"), (59, "0m59s"), (59.6, "1m00s"), (61, "1m01s"), (3661, "1h01m")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert _duration(seconds) == text


def _record(shape: tuple[int, int], error: float, *timings: KernelTiming) -> ValidationRecord:
    return ValidationRecord(
        linear="model.layers.0.mlp.up_proj",
        out_features=shape[0],
        in_features=shape[1],
        manifest_sha256="0" * 64,
        hardware="H200",
        checks=20,
        largest_error=error,
        timings=timings,
    )


def _timing(bits: int | None, tokens: int, microseconds: float) -> KernelTiming:
    return KernelTiming(bits=bits, tokens=tokens, seconds=microseconds / 1e6, spread_seconds=1e-7)


def test_times_stand_beside_those_of_bf16_for_as_many_tokens() -> None:
    one = [_timing(None, 1, 30), _timing(2, 1, 12), _timing(4, 1, 20)]
    many = [_timing(2, 64, 80), _timing(4, 64, 160), _timing(None, 64, 40)]
    records = [_record((4096, 11008), 1.5e-6, *one, *many), _record((96, 64), 2.5e-4)]
    assert validation_lines(records) == [
        "kernels: 40 products of 2 shapes are right, largest error 2.5e-04 (H200)",
        "4096 x 11008, 1 token: 2 bits 12.0 us (2.50x), 4 bits 20.0 us (1.50x); bf16 30.0 us",
        "4096 x 11008, 64 tokens: 2 bits 80.0 us (0.50x), 4 bits 160.0 us (0.25x); bf16 40.0 us",
    ]


def test_a_checkpoint_that_rounding_beats_says_so() -> None:
    rounded = [
        _row("full", None, None, None, 11.5, 0.25, 0.0, 0.0),
        _row("rtn-2", 2, 2, 2.25, 27.1, 0.7, 0.85, 0.008),
        _row("rtn-8", 8, 8, 8.25, 11.5, 0.25, 0.0, 0.001),
    ]
    # Worse at 8 bits, but not so that anybody would notice; 3 bits have nothing beside them.
    good = _row("mbq-2", 2, 2, 2.35, 13.0, 0.4, 0.87, 0.004)
    others = [
        _row("mbq-3", 3, 3, 3.35, 30.0, 0.4, 1.0, 0.001),
        _row("mbq-8", 8, 8, 8.35, 11.6, 0.25, 0.009, 0.001),
    ]
    assert lost_to_rounding([*rounded, good, *others]) is None
    line = lost_to_rounding([*rounded, good.model_copy(update={"gap": 0.89}), *others])
    assert line is not None and line.startswith("at 2 bits rounding to nearest loses less")
    assert lost_to_rounding([]) is None


def test_what_was_not_timed_is_said() -> None:
    assert validation_lines([]) == []
    cpu = _record((96, 64), 1e-7).model_copy(update={"hardware": "Xeon"})
    assert validation_lines([_record((64, 64), 2e-7), cpu]) == [
        "kernels: 40 products of 2 shapes are right, largest error 2.0e-07 (H200; Xeon)",
        "no GPU was there: nothing was timed",
    ]


def test_a_narrow_terminal_keeps_what_counts(
    finished_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(
        display, "STDERR", Console(file=out, width=60, force_terminal=True, color_system=None)
    )
    document = finished_run.document
    status = get_document(finished_run.store, keys.status_key(document.run), Status)
    tasks = tuple(Running(task=f"calibrate {n:03}", fraction=0.5) for n in range(4))
    running = status.model_copy(update={"state": "running", "fraction": 0.42, "running": tasks})
    with Watch() as live:
        live.show(RunState(document, "running", running, ""))
        live._progress.refresh()
    assert any(document.run in line and "42%" in line for line in out.getvalue().splitlines())
