"""How runs and results look on a terminal: rich tables and one live line per run."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from mbq.artifacts.documents import Results, Row, ValidationRecord
from mbq.artifacts.errors import printable
from mbq.orchestrator.status import RunState
from mbq.workers.variants import FULL, PACKED, ROUNDED, ROUTED, parse

# Without a terminal rich assumes 80 columns and breaks the lines of a table.
_PIPE_COLUMNS = 120
_RUN_DIGITS = 12
# Between lines in a file or a pipe, where the live line is not drawn.
_QUIET_SECONDS = 10.0
# Nats of log perplexity.
_NOTICED = 0.01
STDERR = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _PIPE_COLUMNS)
STDOUT = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[float], None]]:
    """A live bar for something with a known end; yields what is called with the fraction done."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()
    quiet = not STDERR.is_terminal
    with Progress(
        *columns, TimeRemainingColumn(), console=STDERR, transient=True, disable=quiet
    ) as progress:
        line = progress.add_task(what, total=1.0)
        yield lambda fraction: progress.update(line, completed=fraction)


class Watch:
    """A live line: what runs, how much is done, how long it takes."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[run]}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            # Whatever the terminal has room for: the others keep their widths.
            TextColumn(
                "{task.fields[what]}", markup=False, table_column=Column(no_wrap=True, ratio=1)
            ),
            expand=True,
            console=STDERR,
            disable=not STDERR.is_terminal,
        )
        self._line = self._progress.add_task("", total=1.0, run="", what="waiting for the cluster")
        self._failures = 0
        self._tasks: set[str] = set()
        self._said = -_QUIET_SECONDS

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def show(self, state: RunState) -> None:
        status = state.status
        if status is None or state.state == "pending":
            what = state.detail.splitlines()[0] if state.detail else "waiting for the cluster"
            self._progress.update(self._line, run=state.document.run, what=what)
            return
        for failure in status.failures[self._failures :]:
            verdict = "given up" if failure.final else "trying again"
            self._progress.console.print(
                printable(
                    f"{failure.task}, attempt {failure.attempt}: {failure.error} ({verdict})"
                ),
                markup=False,
                soft_wrap=True,
            )
        self._failures = len(status.failures)
        tasks, now = {running.task for running in status.running}, time.monotonic()
        if self._progress.disable and tasks != self._tasks and now - self._said >= _QUIET_SECONDS:
            self._progress.console.print(_activity(state), markup=False, soft_wrap=True)
            self._tasks, self._said = tasks, now
        done = status.fraction if state.state != "done" else 1.0
        self._progress.update(
            self._line, completed=done, run=state.document.run, what=_activity(state)
        )


def run_table(states: Sequence[RunState]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("RUN", "MODEL", "STATE", "BLOCKS", "DONE", "LEFT"):
        # What is cut off there could not be typed again.
        table.add_column(column, no_wrap=True, min_width=_RUN_DIGITS if column == "RUN" else None)
    for state in states:
        status = state.status
        table.add_row(
            state.document.run,
            escape(printable(state.document.name)),
            state.state,
            f"{status.blocks_done}/{status.blocks_total}" if status else "-",
            f"{status.fraction:.0%}" if status else "-",
            _duration(status.seconds_left) if status and state.state == "running" else "-",
        )
    return table


def run_json(state: RunState, results: Results | None = None) -> dict[str, Any]:
    status = state.status.model_dump(mode="json") if state.status else None
    return {
        "results": results.model_dump(mode="json") if results else None,
        "run": state.document.run,
        "model": state.document.name,
        "state": state.state,
        "detail": state.detail,
        "status": status,
    }


def result_table(results: Results) -> Table:
    """Perplexity by width, each with its standard error, and what a width costs to fetch.

    BITS are code bits per weight that were asked for, READ those that were read, TOTAL adds scales,
    zeros, exponents, gains, biases and routers; GAP is the difference of log perplexity, paired by
    sequence.
    """
    slices = ", ".join(f"{size:,}" for size in results.slice_bytes)
    # Broken where the table ends, so it is short.
    shared = f"; averages by {results.method}" if results.method else ""
    table = Table(
        title=f"perplexity ± standard error, {results.tokens:,} held-out tokens{shared}",
        title_justify="left",
        caption=f"bytes: base {results.base_bytes:,}, slices {slices}",
        caption_justify="left",
        box=None,
        pad_edge=False,
    )
    columns = ("BITS", "READ", "TOTAL", "ELASTIC", "GAP TO FULL", "ROUND TO NEAREST")
    for column in columns:
        table.add_column(column, justify="right")
    rows = {row.variant: row for row in results.rows}
    full = rows[FULL]
    table.add_row("full", "", "", f"{full.perplexity:.3f} ± {full.perplexity_error:.3f}")
    for row in _by_width(results):
        uniform = parse(row.variant)[0] == PACKED
        rounded = rows.get(f"{ROUNDED}-{row.bits:g}")
        table.add_row(
            f"{row.bits:g}" if uniform else f"average {row.bits:g}",
            f"{row.realised_bits:.2f}",
            f"{row.total_bits:.2f}",
            f"{row.perplexity:.3f} ± {row.perplexity_error:.3f}",
            f"{row.gap:+.4f} ± {row.gap_error:.4f}",
            f"{rounded.perplexity:.3f} ± {rounded.perplexity_error:.3f}" if rounded else "",
        )
    return table


def lost_to_rounding(rows: Sequence[Row]) -> str | None:
    """A line if rounding to nearest loses clearly less than the checkpoint at some width."""
    found = {parse(row.variant): row for row in rows}
    worse = [
        f"{bits:g}"
        for (kind, bits), ours in found.items()
        if kind == PACKED and (rounded := found.get((ROUNDED, bits)))
        # Neither by chance nor by what nobody would notice.
        if ours.gap - rounded.gap > _NOTICED + 2 * (ours.gap_error + rounded.gap_error)
    ]
    if not worse:
        return None
    return (
        f"at {', '.join(worse)} bits rounding to nearest loses less than this checkpoint: the "
        "model may have channels that calibration does not bear (README, Limits)"
    )


def validation_lines(records: Sequence[ValidationRecord]) -> list[str]:
    """What was found of packed linears: one line on errors, then one for every shape on times."""
    if not records:
        return []
    largest = max(record.largest_error for record in records)
    hardware = "; ".join(sorted({record.hardware for record in records}))
    lines = [
        f"kernels: {sum(record.checks for record in records)} products of {len(records)} shapes "
        f"are right, largest error {largest:.1e} ({hardware})"
    ]
    if not any(record.timings for record in records):
        lines.append("no GPU was there: nothing was timed")
    for record in records:
        full = {timing.tokens: timing.seconds for timing in record.timings if timing.bits is None}
        for tokens, seconds in full.items():
            times = ", ".join(
                f"{t.bits} bits {1e6 * t.seconds:.1f} us ({seconds / t.seconds:.2f}x)"
                for t in record.timings
                if t.tokens == tokens and t.bits is not None
            )
            lines.append(
                f"{record.out_features} x {record.in_features}, {tokens} "
                f"token{'s' if tokens > 1 else ''}: {times}; bf16 "
                f"{1e6 * seconds:.1f} us"
            )
    return lines


def _by_width(results: Results) -> list[Row]:
    """Rows of the packed checkpoint, by the bits that were read."""
    packed = [row for row in results.rows if parse(row.variant)[0] in (PACKED, ROUTED)]
    return sorted(packed, key=lambda row: row.realised_bits or 0.0)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True)


def _activity(state: RunState) -> str:
    status = state.status
    assert status is not None
    blocks = f"{status.blocks_done}/{status.blocks_total} blocks"
    if state.state != "running":
        return f"{state.state}, {blocks}"
    running = ", ".join(f"{r.task} {r.fraction:.0%}" for r in status.running) or "starting"
    return f"{blocks}, {_duration(status.seconds_left)} left: {running}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
