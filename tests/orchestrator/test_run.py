"""The driver with a runner that runs everything here, and with one that fails on purpose."""

import hashlib
import json
import pickle
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.documents import (
    Manifest,
    Results,
    RoutingRecord,
    RunDocument,
    ShardRecord,
    Status,
)
from mbq.artifacts.errors import ClusterError, MbqError, NumericError, RunError, StoreError
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.sealed import find_document, get_document, put_document
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import (
    Call,
    Handle,
    InputLost,
    TaskCrashed,
    TaskResources,
)
from mbq.orchestrator import run as running
from mbq.orchestrator.run import Stopped, Superseded
from mbq.orchestrator.run import drive as drive_patiently
from mbq.workers import opened
from mbq.workers.tasks import Host
from tests.support.faulty import flip
from tests.support.hostile import SLICE, ignore
from tests.support.local_runner import LocalHandle, LocalRunner

Make = Callable[..., dict[str, Any]]

# What a run takes least time for.
SMALL: dict[str, Any] = {
    "slices": 1,
    "optimisation": {"widths": [2], "passes": 2},
    "evaluation": None,
}


class FaultyRunner(LocalRunner):
    """Fails chosen submissions: `faults[(task name, n-th submission)]` is raised instead."""

    def __init__(self, faults: dict[tuple[str, int], BaseException] | None = None) -> None:
        super().__init__()
        self.faults = faults or {}
        self.submitted: Counter[str] = Counter()
        self.before: Callable[[str], None] = lambda name: None

    def submit(self, call: Call, resources: TaskResources) -> LocalHandle:
        name = call.name.rpartition(": ")[2]
        self.before(name)
        self.submitted[name] += 1
        # What a real cluster would do: everything that goes in or out is pickled.
        call = pickle.loads(pickle.dumps(call))
        error = self.faults.get((name, self.submitted[name]))
        if error is not None:
            return LocalHandle(call.name, None, error)
        return super().submit(call, resources)


class WideRunner(FaultyRunner):
    """Finishes tasks in another order than they were submitted, two at a time."""

    def slots(self, resources: TaskResources) -> int:
        return 0 if resources.gpus else 3

    def wait(self, handles: Sequence[Handle], timeout_seconds: float) -> list[Handle]:
        return list(handles)[-1:] if len(handles) < 3 else list(handles)[1:]


@dataclass(frozen=True)
class WatchedStore(LocalStore):
    """Tells of what the driver is about to put; tasks open the folder themselves."""

    before_put: Callable[[str], None]

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        self.before_put(key)
        super().put(key, chunks)


def drive(store: LocalStore, document: RunDocument, runner: LocalRunner, attempt: int) -> None:
    drive_patiently(store, document, runner, attempt, retry_seconds=0.0)


@pytest.fixture
def write(
    store: LocalStore, write_run: Callable[..., RunDocument]
) -> Callable[[dict[str, Any]], Any]:
    return lambda document: write_run(store, document)


@pytest.fixture
def finished_copy(finished_run: Any, tmp_path: Path) -> LocalStore:
    """The store of the finished run, to be damaged."""
    return LocalStore(Path(shutil.copytree(finished_run.store.root, tmp_path / "finished")))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def _manifest_digest(store: LocalStore, run: str) -> str:
    return hashlib.sha256(store.read(keys.manifest_key(run))).hexdigest()


def _status(store: LocalStore, run: str) -> Status:
    return get_document(store, keys.status_key(run), Status)


def test_leaves_everything_the_readme_promises(finished_run: Any) -> None:
    store, run = finished_run.store, finished_run.document.run
    assert store.children(f"runs/{run}") == [
        "blocks",
        "checkpoint",
        "evaluations",
        "results.json",
        "routing",
        "sample.json",
        "sensitivity.json",
        "shards",
        "spec.json",
        "status.json",
        "validations",
    ]
    assert store.children(f"runs/{run}/blocks") == ["00000", "00001", "00002"]
    manifest = get_document(store, keys.manifest_key(run), Manifest)
    on_disk = set(store.children(f"runs/{run}/checkpoint")) - {"manifest.json"}
    assert set(manifest.files) == on_disk
    for name, record in manifest.files.items():
        data = store.read(keys.checkpoint_key(run, name))
        assert hashlib.sha256(data).hexdigest() == record.sha256
        assert len(data) == record.size_bytes
    assert _status(store, run).state == "done"
    assert _status(store, run).fraction == 1.0


def test_results_compare_every_width_with_rounding(finished_run: Any) -> None:
    run = finished_run.document.run
    results = get_document(finished_run.store, keys.results_key(run), Results)
    names = ["full", *(f"rtn-{b}" for b in (2, 3, 4, 6, 8)), *(f"mbq-{b}" for b in (2, 3, 4, 6, 8))]
    names += [f"routed-{b}" for b in (2.25, 2.5, 3, 3.5)]
    assert [row.variant for row in results.rows] == names
    gaps = {row.variant: row.gap for row in results.rows}
    assert gaps["full"] == 0
    assert abs(gaps["mbq-8"]) < abs(gaps["rtn-2"])
    # The second slice holds the gains and biases of two widths.
    slices = results.slice_bytes
    assert slices[0] == slices[2] == slices[3] < slices[1]
    read = {row.variant: row.realised_bits for row in results.rows}
    assert (read["full"], read["rtn-3"], read["mbq-3"], read["mbq-6"]) == (None, 3.0, 3.0, 6.0)
    assert read["routed-2.5"] == pytest.approx(2.5, abs=0.2)


def test_order_and_number_of_workers_change_no_byte(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    drive(store, document, WideRunner(), attempt=1)
    run = document.run
    assert run == finished_run.document.run
    assert _manifest_digest(store, run) == _manifest_digest(finished_run.store, run)


def test_finished_work_is_never_done_again(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    stopping = FaultyRunner()

    def stop_at(name: str) -> None:
        if name == "calibrate 001":
            raise KeyboardInterrupt

    stopping.before = stop_at
    with pytest.raises(KeyboardInterrupt):
        drive(store, document, stopping, attempt=1)
    first = store.read(keys.block_key(document.run, 0))
    again = FaultyRunner()
    drive(store, document, again, attempt=2)
    assert again.submitted["calibrate 000"] == 0
    assert again.submitted["calibrate 001"] == again.submitted["calibrate 002"] == 1
    assert store.read(keys.block_key(document.run, 0)) == first
    idle = FaultyRunner()
    drive(store, document, idle, attempt=3)
    assert set(idle.submitted) == {"inspect"}


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
    assert _manifest_digest(store, document.run) == _manifest_digest(
        finished_run.store, document.run
    )
    failures = [f for f in _status(store, document.run).failures if f.task == "calibrate 001"]
    assert [(f.attempt, f.final) for f in failures] == [(1, False), (2, False)]


def test_lost_hidden_states_are_made_again(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    runner = FaultyRunner({("calibrate 002", 1): InputLost("node gone")})
    drive(store, document, runner, attempt=1)
    assert runner.submitted["capture 000"] == 2
    assert runner.submitted["calibrate 000"] == 1
    assert _manifest_digest(store, document.run) == _manifest_digest(
        finished_run.store, document.run
    )


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
    assert _status(store, document.run).state == "failed"
    drive(store, document, FaultyRunner(), attempt=2)
    assert _status(store, document.run).state == "done"


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
    before = _manifest_digest(store, document.run)
    record = get_document(store, keys.manifest_key(document.run), Manifest)
    store.put(keys.blob_key(record.blocks[1]), [b"truncated"])
    store.delete(keys.manifest_key(document.run))
    runner = FaultyRunner()
    drive(store, document, runner, attempt=2)
    assert runner.submitted["calibrate 001"] == 1
    assert runner.submitted["calibrate 000"] == 0
    assert _manifest_digest(store, document.run) == before


def test_stops_when_asked_and_goes_on_later(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    runner = FaultyRunner()

    def terminate(name: str) -> None:
        if name == "calibrate 000":
            signal.raise_signal(signal.SIGTERM)

    runner.before = terminate
    with pytest.raises(Stopped):
        drive(store, document, runner, attempt=1)
    assert _status(store, document.run).state == "stopped"
    drive(store, document, FaultyRunner(), attempt=2)
    assert _status(store, document.run).state == "done"


def test_an_older_driver_gives_way(store: LocalStore, write: Any, tiny_document: Make) -> None:
    document = write(tiny_document())
    drive(store, document, FaultyRunner(), attempt=2)
    store.delete(keys.results_key(document.run))
    with pytest.raises(Superseded, match="attempt 2 drives"):
        drive(store, document, FaultyRunner(), attempt=1)
    assert _status(store, document.run).attempt == 2


def test_a_cluster_without_what_the_spec_asks(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(resources={"device": "cuda"}))
    with pytest.raises(ClusterError, match="no node offers a GPU"):
        drive(store, document, FaultyRunner(), attempt=1)
    # Who only looks at the store learns why nothing goes on.
    status = _status(store, document.run)
    assert (status.state, status.attempt) == ("failed", 1)
    assert [failure.task for failure in status.failures] == ["driver"]
    assert "no node offers a GPU" in status.failures[0].error


@pytest.mark.parametrize(
    ("version", "fault", "message"),
    [
        ("0.0.1", None, r"runs mbq-cluster 0\.0\.1, the run was submitted with .* same version"),
        (None, "no such folder", r"cannot use the store file:.*: no such folder; use a folder"),
    ],
    ids=["version", "fault"],
)
def test_one_node_that_is_unfit_fails_the_run(
    store: LocalStore,
    write: Any,
    tiny_document: Make,
    version: str | None,
    fault: str | None,
    message: str,
) -> None:
    document = write(tiny_document(**SMALL))
    good = Host(document.code_version, None)
    runner = FaultyRunner()
    bad = Host(version or document.code_version, fault)
    runner.on_every_node = lambda call: [good, bad]  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match=message):
        drive(store, document, runner, attempt=1)
    assert not runner.submitted
    assert _status(store, document.run).state == "failed"
    assert store.children("probes") == []


def test_sequential_propagation_calibrates_on_quantized_inputs(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(propagation="sequential"))
    assert document.run != finished_run.document.run
    drive(store, document, FaultyRunner(), attempt=1)
    ours = get_document(store, keys.manifest_key(document.run), Manifest)
    theirs = get_document(
        finished_run.store, keys.manifest_key(finished_run.document.run), Manifest
    )
    # The first block sees the same inputs either way, the later ones do not.
    assert ours.blocks[0] == theirs.blocks[0]
    assert ours.blocks[1] != theirs.blocks[1]
    assert ours.blocks[2] != theirs.blocks[2]


def test_bfloat16_and_sharded_sources_run_too(
    store: LocalStore, write: Any, tiny_document: Make, make_model: Callable[..., Path]
) -> None:
    from transformers import Qwen3Config

    folder = make_model(Qwen3Config, head_dim=32, tie_word_embeddings=True)
    document = write(tiny_document(model={"source": str(folder)}, dtype="bfloat16"))
    drive(store, document, FaultyRunner(), attempt=1)
    results = get_document(store, keys.results_key(document.run), Results)
    assert results.rows[-1].perplexity == pytest.approx(results.rows[0].perplexity, rel=0.05)


def test_metrics_tell_how_far_it_is(store: LocalStore, write: Any, tiny_document: Make) -> None:
    runner = FaultyRunner()
    drive(store, write(tiny_document(evaluation=None)), runner, attempt=1)
    assert runner.published["mbq_blocks_done"] == 3
    assert runner.published["mbq_bytes_stored"] > 0
    assert runner.published["mbq_block_seconds"] > 0
    assert runner.published["mbq_block_loss"] > 0


def test_thresholds_survive_a_crash_and_lost_ones_are_found_again(
    finished_run: Any, store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document())
    expected = _manifest_digest(finished_run.store, document.run)
    stopping = FaultyRunner()

    def stop_at(name: str) -> None:
        if name == "settle token":
            raise KeyboardInterrupt

    stopping.before = stop_at
    with pytest.raises(KeyboardInterrupt):
        drive(store, document, stopping, attempt=1)
    again = FaultyRunner()
    drive(store, document, again, attempt=2)
    assert again.submitted["sensitivity model"] == again.submitted["settle linear"] == 0
    assert (
        again.submitted["settle token"] == again.submitted["route model-routing.safetensors"] == 1
    )
    assert _manifest_digest(store, document.run) == expected
    # A block that was made anew has thresholds of its own.
    manifest = get_document(store, keys.manifest_key(document.run), Manifest)
    record = get_document(store, keys.routing_key(document.run, "norm"), RoutingRecord)
    assert record.blobs == manifest.blocks
    stale = record.model_copy(update={"blobs": ("0" * 64, *record.blobs[1:])})
    put_document(store, keys.routing_key(document.run, "norm"), stale)
    third = FaultyRunner()
    drive(store, document, third, attempt=3)
    assert third.submitted["settle norm"] == 1
    assert third.submitted["settle linear"] == third.submitted["calibrate 000"] == 0
    assert _manifest_digest(store, document.run) == expected


def test_asking_for_more_widths_measures_only_those(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    text = tiny_document()["evaluation"]
    document = write(tiny_document(routing={"method": "norm", "settle_tokens": 128, "steps": 5}))
    drive(store, document, FaultyRunner(), attempt=1)
    before = _manifest_digest(store, document.run)
    more = tiny_document(
        evaluation=text | {"average_bits": [2.5, 6.5], "rivals": ["linear"]},
        routing={"method": "norm", "settle_tokens": 128, "steps": 5},
    )
    asked = write(more)
    assert asked.run == document.run
    runner = FaultyRunner()
    drive(store, asked, runner, attempt=2)
    rivals = [f"evaluate linear-{bits}" for bits in (2.25, 2.5, 3, 3.5)]
    assert set(runner.submitted) == {
        "inspect",
        "settle linear",
        "evaluate routed-6.5",
        *rivals,
    }
    results = get_document(store, keys.results_key(document.run), Results)
    assert [row.variant for row in results.rows][-6:-4] == ["routed-2.5", "routed-6.5"]
    assert _manifest_digest(store, document.run) == before


def test_a_rival_that_fails_does_not_hold_the_checkpoint(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    text = tiny_document()["evaluation"] | {"rivals": ["linear"]}
    document = write(tiny_document(routing={"method": "norm", "steps": 5}, evaluation=text))
    runner = FaultyRunner({("settle linear", 1): NumericError("nan")})
    with pytest.raises(RunError, match="settle linear"):
        drive(store, document, runner, attempt=1)
    assert find_document(store, keys.manifest_key(document.run), Manifest) is not None


@pytest.mark.parametrize("method", ["linear", "norm", "token", "gates", "target"])
def test_every_method_makes_a_checkpoint(
    store: LocalStore, write: Any, tiny_document: Make, method: str
) -> None:
    routing = {"method": method, "steps": 10, "settle_tokens": 64}
    document = write(tiny_document(routing=routing, slices=3))
    drive(store, document, FaultyRunner(), attempt=1)
    results = get_document(store, keys.results_key(document.run), Results)
    assert results.method == method
    read = {row.variant: row.realised_bits for row in results.rows}
    assert read["routed-3"] == pytest.approx(3.0, abs=0.4)


def test_one_slice_is_a_checkpoint_without_routers(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(slices=1, optimisation={"widths": [2], "passes": 2}))
    drive(store, document, FaultyRunner(), attempt=1)
    results = get_document(store, keys.results_key(document.run), Results)
    assert results.method is None
    assert [row.variant for row in results.rows] == ["full", "rtn-2", "mbq-2"]


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
    assert _status(store, document.run).state == "failed"
    assert find_document(store, keys.manifest_key(document.run), Manifest) is None


def test_only_a_file_of_another_block_is_packed_again(
    finished_run: Any, finished_copy: LocalStore
) -> None:
    store, document = finished_copy, finished_run.document
    before = _manifest_digest(store, document.run)
    key = keys.shard_key(document.run, SLICE)
    record = get_document(store, key, ShardRecord)
    stale = record.model_copy(update={"blobs": ("0" * 64, *record.blobs[1:])})
    put_document(store, key, stale)
    store.delete(keys.manifest_key(document.run))
    runner = FaultyRunner()
    drive(store, document, runner, attempt=2)
    assert runner.submitted == {"inspect": 1, f"pack {SLICE}": 1}
    assert get_document(store, key, ShardRecord) == record
    assert _manifest_digest(store, document.run) == before


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
    assert _status(store, document.run).state == "done"


def test_the_manifest_is_put_when_all_that_it_names_is_there(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(**SMALL))
    folder = keys.checkpoint_prefix(document.run)
    put: list[str] = []
    there: list[str] = []

    def note(key: str) -> None:
        if key.startswith(folder):
            put.append(key.rpartition("/")[2])
            there[:] = store.children(folder)

    drive(WatchedStore(store.root, note), document, FaultyRunner(), attempt=1)
    assert put[-1] == "manifest.json"
    assert {INDEX_FILE, "config.json", "tokenizer.json"} <= set(put[:-1])
    manifest = get_document(store, keys.manifest_key(document.run), Manifest)
    assert set(there) == set(manifest.files)


def test_what_goes_with_a_tokenizer_arrives_byte_for_byte(
    store: LocalStore, write: Any, tiny_document: Make, model_copy: Path, tmp_path: Path
) -> None:
    # As nobody would write them anew.
    side = {
        "chat_template.jinja": b"{{ messages }}\r\n\t \xc3\xbc",
        "generation_config.json": b'{ "eos_token_id":1,\n\n"bos_token_id" : 0}',
        "special_tokens_map.json": b'{"eos_token":   "</s>"}\n\n',
    }
    for name, data in side.items():
        (model_copy / name).write_bytes(data)
    document = write(tiny_document(model={"source": str(model_copy)}, **SMALL))
    drive(store, document, FaultyRunner(), attempt=1)
    packed = LocalStore(store.path(keys.checkpoint_prefix(document.run)))
    pull(open_checkpoint(packed), tmp_path / "pulled", None, ignore)
    for name, data in side.items():
        assert packed.read(name) == data
        assert (tmp_path / "pulled" / name).read_bytes() == data


def test_frequencies_that_early_models_store_are_left_out(
    store: LocalStore, write: Any, tiny_document: Make, model_copy: Path
) -> None:
    path = model_copy / "model.safetensors"
    tensors = load_file(path)
    for block in range(3):
        name = f"model.layers.{block}.self_attn.rotary_emb.inv_freq"
        tensors[name] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, path, {"format": "pt"})
    document = write(tiny_document(model={"source": str(model_copy)}, **SMALL))
    drive(store, document, FaultyRunner(), attempt=1)
    index = json.loads(store.read(keys.checkpoint_key(document.run, INDEX_FILE)))
    assert "model.norm.weight" in index["weight_map"]
    assert not [name for name in index["weight_map"] if "inv_freq" in name]
