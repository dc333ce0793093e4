"""What can go wrong while a driver works: tasks, nodes, stores and sources."""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts import keys
from mbq.artifacts.documents import Manifest, ShardRecord
from mbq.artifacts.errors import ClusterError, MbqError, NumericError, RunError, StoreError
from mbq.artifacts.sealed import find_document, get_document
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import InputLost, TaskCrashed
from mbq.orchestrator import run as running
from mbq.orchestrator.run import Superseded
from mbq.workers import opened
from mbq.workers.tasks import Host
from tests.support.driving import (
    SMALL,
    FaultyRunner,
    Make,
    WatchedStore,
    drive,
    manifest_digest,
    status_of,
)
from tests.support.faulty import flip
from tests.support.hostile import SLICE


@pytest.mark.parametrize("error", [TaskCrashed("killed"), StoreError("503"), OSError("disk")])
def test_what_may_pass_is_tried_three_times(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make, error: MbqError
) -> None:
    document = write(tiny_document())
    faults: dict[tuple[str, int], BaseException] = {
        ("calibrate 001", 1): error,
        ("calibrate 001", 2): error,
        ("capture 002", 1): error,
        ("pack model-base-00001-of-00001.safetensors", 1): error,
    }
    drive(store, document, FaultyRunner(faults), attempt=1)
    assert manifest_digest(store, document.run) == manifest_digest(finished_run.store, document.run)
    failures = [f for f in status_of(store, document.run).failures if f.task == "calibrate 001"]
    assert [(f.attempt, f.final) for f in failures] == [(1, False), (2, False)]


def test_lost_hidden_states_are_made_again(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    runner = FaultyRunner({("calibrate 002", 1): InputLost("node gone")})
    drive(store, document, runner, attempt=1)
    assert runner.submitted["capture 000"] == 2
    assert runner.submitted["calibrate 000"] == 1
    assert manifest_digest(store, document.run) == manifest_digest(finished_run.store, document.run)


def test_a_block_that_fails_fails_the_run_at_its_end(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    faults: dict[tuple[str, int], BaseException] = {
        ("calibrate 001", n): TaskCrashed("out of memory") for n in (1, 2, 3)
    }
    runner = FaultyRunner(faults)
    with pytest.raises(RunError, match=r"calibrate 001 \(attempt 3\).*out of memory.*resume"):
        drive(store, document, runner, attempt=1)
    assert runner.submitted["calibrate 001"] == 3
    # The other blocks are finished, and nothing pretends to be a checkpoint.
    assert store.children(f"runs/{document.run}/blocks") == ["00000", "00002"]
    assert find_document(store, keys.manifest_key(document.run), Manifest) is None
    assert status_of(store, document.run).state == "failed"
    drive(store, document, FaultyRunner(), attempt=2)
    assert status_of(store, document.run).state == "done"


def test_an_error_that_would_come_again_is_not_repeated(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    runner = FaultyRunner({("calibrate 000", 1): NumericError("the loss is nan")})
    with pytest.raises(RunError, match="the loss is nan"):
        drive(store, document, runner, attempt=1)
    assert runner.submitted["calibrate 000"] == 1


def test_a_damaged_blob_is_calibrated_again(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(evaluation=None))
    drive(store, document, FaultyRunner(), attempt=1)
    before = manifest_digest(store, document.run)
    record = get_document(store, keys.manifest_key(document.run), Manifest)
    store.put(keys.blob_key(record.blocks[1]), [b"truncated"])
    store.delete(keys.manifest_key(document.run))
    runner = FaultyRunner()
    drive(store, document, runner, attempt=2)
    assert runner.submitted["calibrate 001"] == 1
    assert runner.submitted["calibrate 000"] == 0
    assert manifest_digest(store, document.run) == before


def test_an_older_driver_gives_way(store: LocalStore, write: Any, tiny_document: Make) -> None:
    document = write(tiny_document())
    drive(store, document, FaultyRunner(), attempt=2)
    store.delete(keys.results_key(document.run))
    with pytest.raises(Superseded, match="attempt 2 drives"):
        drive(store, document, FaultyRunner(), attempt=1)
    assert status_of(store, document.run).attempt == 2


def test_a_cluster_without_what_the_spec_asks(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(resources={"device": "cuda"}))
    with pytest.raises(ClusterError, match="no node offers a GPU"):
        drive(store, document, FaultyRunner(), attempt=1)
    # Who only looks at the store learns why nothing goes on.
    status = status_of(store, document.run)
    assert (status.state, status.attempt) == ("failed", 1)
    assert [failure.task for failure in status.failures] == ["driver"]
    assert "no node offers a GPU" in status.failures[0].error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"code_version": "0.0.1"},
            r"runs mbq-cluster 0\.0\.1 \(.*, the run was submitted with .* same version",
        ),
        ({"format_version": 0}, r"\(format 0\), the run was submitted with .* same version"),
        (
            {"fault": "no such folder"},
            r"cannot use the store file:.*: no such folder; use a folder",
        ),
    ],
    ids=["version", "format", "fault"],
)
def test_one_node_that_is_unfit_fails_the_run(
    store: LocalStore,
    write: Any,
    tiny_document: Make,
    changes: dict[str, Any],
    message: str,
) -> None:
    document = write(tiny_document(**SMALL))
    good = Host(document.code_version, None, FORMAT_VERSION)
    runner = FaultyRunner()
    bad = dataclasses.replace(good, **changes)
    runner.on_every_node = lambda call: [good, bad]  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match=message):
        drive(store, document, runner, attempt=1)
    assert not runner.submitted
    assert status_of(store, document.run).state == "failed"
    assert store.children("probes") == []


def test_a_rival_that_fails_does_not_hold_the_checkpoint(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    text = tiny_document()["evaluation"] | {"rivals": ["linear"]}
    document = write(tiny_document(routing={"method": "norm", "steps": 5}, evaluation=text))
    runner = FaultyRunner({("settle linear", 1): NumericError("nan")})
    with pytest.raises(RunError, match="settle linear"):
        drive(store, document, runner, attempt=1)
    assert find_document(store, keys.manifest_key(document.run), Manifest) is not None


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_source_that_changes_under_a_run_is_noticed(
    store: LocalStore, write: Any, tiny_document: Make, model_copy: Path, name: str
) -> None:
    document = write(tiny_document(model={"source": str(model_copy)}, **SMALL))
    runner = FaultyRunner()

    def change(task: str) -> None:
        if task == "capture 000":
            data = (model_copy / name).read_bytes()
            (model_copy / name).write_bytes(flip(data, len(data) // 2))

    runner.before = change
    with pytest.raises(MbqError, match="bytes from 0 on are not what was written"):
        drive(store, document, runner, attempt=1)
    assert status_of(store, document.run).state == "failed"
    assert find_document(store, keys.manifest_key(document.run), Manifest) is None


def test_a_file_that_reads_back_differently_is_no_file(
    finished_run: Any, finished_copy: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, document = finished_copy, finished_run.document
    damaged = keys.checkpoint_key(document.run, SLICE)

    class FlippingStore(LocalStore):
        def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
            data = super().read(key, start, length)
            return flip(data, len(data) // 2) if key == damaged else data

    monkeypatch.setattr(opened, "open_store", lambda uri, patience: FlippingStore(store.root))
    store.delete(keys.shard_key(document.run, SLICE))
    store.delete(keys.manifest_key(document.run))
    with pytest.raises(RunError, match=rf"pack {SLICE} \(attempt 1\).*reads back differently"):
        drive(store, document, FaultyRunner(), attempt=2)
    assert find_document(store, keys.shard_key(document.run, SLICE), ShardRecord) is None
    assert find_document(store, keys.manifest_key(document.run), Manifest) is None


def test_a_status_that_cannot_be_written_holds_nothing_up(
    store: LocalStore, write: Any, tiny_document: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = write(tiny_document(**SMALL))
    tried: Counter[str] = Counter()

    def fail(key: str) -> None:
        tried[key] += 1
        if key == keys.status_key(document.run) and tried[key] <= 3:
            raise StoreError("503")

    # The status is said in every round, not every second: the run is shorter than that.
    monkeypatch.setattr(running, "_TICK_SECONDS", 0.0)
    drive(WatchedStore(store.root, fail), document, FaultyRunner(), attempt=1)
    assert tried[keys.status_key(document.run)] > 4
    assert status_of(store, document.run).state == "done"
