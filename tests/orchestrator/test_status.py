"""What a run is said to be doing, from what the store and the cluster know of it."""

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts import keys
from mbq.artifacts.documents import RunDocument, Status
from mbq.artifacts.errors import ClusterError, InputError
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import put_document
from mbq.artifacts.store import LocalStore
from mbq.cluster.jobs import JobInfo
from mbq.orchestrator import status as looking
from mbq.orchestrator import submit as submitting
from mbq.orchestrator.status import follow, state_of, validations_of


def _job(state: str, attempt: int, message: str = "") -> JobInfo:
    return JobInfo("596505d6f4dc", attempt, state, message, "file:///store")


@pytest.fixture
def document(finished_run: Any) -> RunDocument:
    found: RunDocument = finished_run.document
    return found


@pytest.fixture
def said(tmp_path: Path, document: RunDocument) -> Callable[[str, int, float], LocalStore]:
    """A store in which a driver said something at a time."""

    def say(state: str, attempt: int, at: float) -> LocalStore:
        store = LocalStore(tmp_path / "store")
        status = Status.model_validate(
            {
                "run": document.run, "attempt": attempt, "state": state, "blocks_done": 1,
                "blocks_total": 3, "fraction": 0.3, "seconds_left": None, "running": (),
                "failures": (), "started_at": at, "updated_at": at,
            }
        )  # fmt: skip
        put_document(store, keys.status_key(document.run), status)
        return store

    return say


@pytest.mark.parametrize(
    ("said_state", "job", "expected"),
    [
        ("running", _job("RUNNING", 1), "running"),
        ("running", _job("FAILED", 1), "interrupted"),
        ("running", None, "running"),
        ("done", _job("SUCCEEDED", 1), "done"),
        ("stopped", _job("PENDING", 2), "pending"),
        # A new attempt that died before it said anything is not the old one.
        ("done", _job("FAILED", 2, "log\nmbq-cluster: no config.json"), "failed"),
        ("stopped", _job("FAILED", 2, "log\nmbq-cluster: no config.json"), "failed"),
        ("failed", _job("STOPPED", 2, "stopped by its user"), "stopped"),
    ],
)
def test_the_newest_that_is_known_counts(
    said: Any, document: RunDocument, said_state: str, job: JobInfo | None, expected: str
) -> None:
    found = state_of(said(said_state, 1, time.time()), document, job)
    assert found.state == expected
    if job is not None and job.message:
        assert found.detail == job.message.splitlines()[-1]


def test_before_anything_was_said(document: RunDocument, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert state_of(store, document, None).state == "interrupted"
    assert state_of(store, document, _job("PENDING", 1)).state == "pending"
    assert state_of(store, document, _job("STOPPED", 1)).state == "stopped"


class _Cluster:
    """Answers in turn what it is told to."""

    def __init__(self, *answers: JobInfo | Exception | None) -> None:
        self._answers = list(answers)

    def latest(self, run: str, store: str) -> JobInfo | None:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_cluster_that_does_not_answer_once_is_asked_again(
    said: Any, document: RunDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(looking, "_POLL_SECONDS", 0.0)
    long_ago = time.time() - 1000
    store = said("running", 1, long_ago)
    cluster: Any = _Cluster(
        _job("RUNNING", 1), ClusterError("busy"), _job("RUNNING", 1), _job("FAILED", 1)
    )
    seen: list[str] = []
    final = follow(store, document, cluster, lambda state: seen.append(state.state))
    assert (seen, final.state) == (["running"] * 3 + ["interrupted"], "interrupted")


def test_a_run_of_another_cluster_is_not_taken_over(
    said: Any, document: RunDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = said("running", 1, 1000.0)
    cluster: Any = _Cluster(None)

    times = itertools.count(1001.0)

    def pause(seconds: float) -> None:
        said("running", 1, next(times))

    monkeypatch.setattr(submitting.time, "sleep", pause)
    with pytest.raises(InputError, match=r"driven on another cluster \(attempt 1\)"):
        submitting._is_running(document.run, store, cluster, lambda text: None)
    # One that says nothing more was killed, or dies with its cluster.
    dying = iter([2000.0, 2001.0, 2001.0])
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: said("running", 1, next(dying)))
    assert not submitting._is_running(document.run, store, cluster, lambda text: None)
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: None)
    assert not submitting._is_running(document.run, store, cluster, lambda text: None)


def test_an_attempt_that_this_cluster_saw_die_is_not_waited_for(
    said: Any, document: RunDocument, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = said("running", 1, 1000.0)
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: pytest.fail("it waited"))
    dead: Any = _Cluster(_job("FAILED", 1))
    assert not submitting._is_running(document.run, store, dead, lambda text: None)
    alive: Any = _Cluster(_job("RUNNING", 1))
    assert submitting._is_running(document.run, store, alive, lambda text: None)


def test_results_are_shown_without_the_source(finished_run: Any, tmp_path: Path) -> None:
    store = LocalStore(Path(shutil.copytree(finished_run.store.root, tmp_path / "store")))
    document = find_run(store, finished_run.document.run)
    gone = document.model_copy(update={"model_location": str(tmp_path / "gone")})
    assert len(validations_of(store, gone)) == 4
