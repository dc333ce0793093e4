"""What a run is doing: its last status in the store, corrected by what the cluster knows.

A driver that was killed leaves the status `running` behind. Only the cluster can tell: if the job
is gone, the run is `interrupted` and can be resumed.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, urlparse

from mbq.artifacts import keys
from mbq.artifacts.documents import Results, RunDocument, Status, ValidationRecord
from mbq.artifacts.errors import ClusterError, CorruptError, InputError, NotFoundError
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import find_document
from mbq.artifacts.spec import is_path
from mbq.artifacts.store import Store, open_store
from mbq.cluster.jobs import JobInfo, Jobs
from mbq.orchestrator.local import default_store

# A driver says something every second; a store may be slow.
_SILENCE_SECONDS = 30.0
_POLL_SECONDS = 0.5
# Of the cluster, which then lists all its jobs.
_ASK_SECONDS = 2.0
TERMINAL = ("done", "failed", "stopped", "interrupted")


@dataclass(frozen=True)
class RunState:
    """One run as a user sees it; `detail` is what the store or the cluster adds, if anything."""

    document: RunDocument
    state: str
    status: Status | None
    detail: str


def names_run(target: str) -> bool:
    """Whether a target is written as a run, by its id or URI, and not as a folder or prefix."""
    if is_path(target) or "://" in target:
        return target.rstrip("/").split("/")[-2:-1] == [keys.RUNS]
    return True


def as_typed(store: Store, run: str) -> str:
    """What to type for a run: its id, or its URI where commands look elsewhere."""
    try:
        found = open_store(os.environ.get("MBQ_STORE") or default_store()).uri == store.uri
    except InputError:
        found = False
    return run if found else f"{store.uri}/{keys.RUNS}/{run}"


def locate(target: str, store_uri: str) -> tuple[Store, RunDocument]:
    """A run by its id, a unique start of it, or its URI `<store>/runs/<id>`.

    Raises:
        NotFoundError: no run matches.
        InputError: several do.
    """
    if "/" in target:
        root, _, run = target.rstrip("/").rpartition("/")
        root, slash, folder = root.rpartition("/")
        if folder != keys.RUNS:
            raise InputError(f"{target} is not a run's URI; write <store>/runs/<id>")
        store: Store = open_store(root or slash)
    else:
        store, run = open_store(store_uri), target
    if not run:
        raise InputError("the name of the run is empty; `mbq-cluster list` shows the runs")
    runs = [known for known in store.children(keys.RUNS) if known.startswith(run)]
    if not runs:
        raise NotFoundError(
            f"there is no run {run} in {store.uri}; `mbq-cluster list` shows the runs, --store "
            "chooses another store"
        )
    if len(runs) > 1:
        raise InputError(f"{run} is the start of {len(runs)} runs: {', '.join(runs)}; give more")
    return store, find_run(store, runs[0])


def state_of(store: Store, document: RunDocument, job: JobInfo | None) -> RunState:
    """Join the store's and the cluster's view of a run.

    Args:
        job: the run's latest attempt on the cluster; None if the cluster is gone or knows none.
    """
    status = find_document(store, keys.status_key(document.run), Status)
    current = job if job and (status is None or job.attempt >= status.attempt) else None
    if current is not None and current.alive:
        newer = status is None or current.attempt > status.attempt
        return RunState(document, "pending" if newer else "running", status, current.message)
    if current is not None and (status is None or current.attempt > status.attempt):
        # It ended before it said anything.
        ended = "stopped" if current.state == "STOPPED" else "failed"
        return RunState(document, ended, status, _last_line(current.message))
    if status is None:
        return RunState(document, "interrupted", None, "no driver has started")
    if status.state == "running":
        if current is None and time.time() - status.updated_at < _SILENCE_SECONDS:
            return RunState(document, "running", status, "the cluster was not asked")
        detail = "its driver is gone; resume continues it"
        if current is not None:
            # What it could not write into a full store, say, the cluster has kept.
            detail += f"; `mbq-cluster logs {as_typed(store, document.run)}` may tell why it ended"
        return RunState(document, "interrupted", status, detail)
    final = "; ".join(f"{f.task}: {f.error}" for f in status.failures if f.final)
    return RunState(document, status.state, status, final)


def no_checkpoint(store: Store, document: RunDocument) -> NotFoundError:
    """What to raise for a run that has not published its checkpoint: it names what helps."""
    run, typed = document.run, as_typed(store, document.run)
    found = state_of(store, document, None)
    # Before its driver has said anything, only the cluster knows.
    if found.status is not None and found.state in TERMINAL:
        return NotFoundError(
            f"run {run} is {found.state} and has no checkpoint; `mbq-cluster resume {typed}` "
            "continues it"
        )
    return NotFoundError(f"run {run} has no checkpoint yet; `mbq-cluster watch {typed}` follows it")


def states(store: Store, jobs: Jobs | None) -> tuple[list[RunState], list[str]]:
    """Every run of a store, and why some cannot be read."""
    latest = {j.run: j for j in jobs.list() if j.store == store.uri} if jobs else {}
    found, unreadable = [], []
    for run in store.children(keys.RUNS):
        # A submit that was interrupted leaves a folder without a document.
        if store.stat(keys.spec_key(run)) is None:
            continue
        try:
            found.append(state_of(store, find_run(store, run), latest.get(run)))
        except CorruptError as error:
            unreadable.append(str(error))
    return found, unreadable


def follow(
    store: Store, document: RunDocument, jobs: Jobs | None, show: Callable[[RunState], None]
) -> RunState:
    """Show a run's state until it is final, and return that."""
    job, answered, asked = None, time.monotonic(), -math.inf
    while True:
        now = time.monotonic()
        if jobs is not None and now - asked >= _ASK_SECONDS:
            asked = now
            try:
                job, answered = jobs.latest(document.run, store.uri), now
            except ClusterError:
                # A while without an answer: it is gone, and the store says what became of the run.
                if now - answered > _SILENCE_SECONDS:
                    jobs = job = None
        state = state_of(store, document, job)
        show(state)
        if state.state in TERMINAL:
            return state
        time.sleep(_POLL_SECONDS)


def results_of(store: Store, document: RunDocument) -> Results | None:
    return find_document(store, keys.results_key(document.run), Results)


def validations_of(store: Store, document: RunDocument) -> list[ValidationRecord]:
    """What was found of the packed linears, a record for each shape."""
    shapes = (name.removesuffix(".json") for name in store.children(keys.validations(document.run)))
    found = [
        find_document(store, keys.validation_key(document.run, shape), ValidationRecord)
        for shape in shapes
    ]
    return [record for record in found if record is not None]


def checkpoint_location(store: Store, document: RunDocument) -> str:
    """Where the packed checkpoint lies: a path for a local store, a URI otherwise."""
    uri = f"{store.uri}/{keys.checkpoint_prefix(document.run)}"
    return unquote(urlparse(uri).path) if uri.startswith("file://") else uri


def _last_line(message: str) -> str:
    return (message.strip().splitlines() or ["the driver ended without a word"])[-1]
