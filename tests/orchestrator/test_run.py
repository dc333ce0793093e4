"""What a driver makes of a run, and makes again of one that was cut off."""

import hashlib
import json
import signal
from collections.abc import Callable
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
    SensitivityRecord,
    ShardRecord,
)
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.sealed import get_document, put_document
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import TaskResources
from mbq.orchestrator.driver import begin, call_of
from mbq.orchestrator.run import Stopped
from tests.support.driving import (
    SMALL,
    FaultyRunner,
    Make,
    WatchedStore,
    WideRunner,
    drive,
    manifest_digest,
    status_of,
)
from tests.support.hostile import SLICE, ignore
from tests.support.local_runner import LocalRunner


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
    assert status_of(store, run).state == "done"
    assert status_of(store, run).fraction == 1.0


def test_results_compare_every_width_with_rounding(finished_run: Any) -> None:
    run = finished_run.document.run
    results = get_document(finished_run.store, keys.results_key(run), Results)
    names = ["full", *(f"rtn-{b}" for b in (2, 3, 4, 6, 8)), *(f"mbq-{b}" for b in (2, 3, 4, 6, 8))]
    names += [f"routed-{b}" for b in (2.25, 2.5, 2.75, 3.5)]
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
    assert manifest_digest(store, run) == manifest_digest(finished_run.store, run)


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
    assert status_of(store, document.run).state == "stopped"
    drive(store, document, FaultyRunner(), attempt=2)
    assert status_of(store, document.run).state == "done"


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
    expected = manifest_digest(finished_run.store, document.run)
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
    assert manifest_digest(store, document.run) == expected
    # A block that was made anew has thresholds of its own.
    manifest = get_document(store, keys.manifest_key(document.run), Manifest)
    record = get_document(store, keys.routing_key(document.run, "norm"), RoutingRecord)
    assert record.blobs == manifest.blocks
    stale = record.model_copy(update={"blobs": ("0" * 64, *record.blobs[1:])})
    put_document(store, keys.routing_key(document.run, "norm"), stale)
    # Sensitivities whose blob is gone are measured again, and nothing that was made of them.
    measured = get_document(store, keys.sensitivity_key(document.run), SensitivityRecord)
    store.delete(keys.blob_key(measured.blob.sha256))
    third = FaultyRunner()
    drive(store, document, third, attempt=3)
    assert third.submitted["sensitivity model"] == 1
    assert third.submitted["settle norm"] == 1
    assert third.submitted["settle linear"] == third.submitted["calibrate 000"] == 0
    assert manifest_digest(store, document.run) == expected


def test_asking_for_more_widths_measures_only_those(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    text = tiny_document()["evaluation"]
    document = write(tiny_document(routing={"method": "norm", "settle_tokens": 128, "steps": 5}))
    drive(store, document, FaultyRunner(), attempt=1)
    before = manifest_digest(store, document.run)
    more = tiny_document(
        evaluation=text | {"average_bits": [2.5, 6.5], "rivals": ["linear"]},
        routing={"method": "norm", "settle_tokens": 128, "steps": 5},
    )
    asked = write(more)
    assert asked.run == document.run
    runner = FaultyRunner()
    drive(store, asked, runner, attempt=2)
    rivals = [f"evaluate linear-{bits}" for bits in (2.25, 2.5, 2.75, 3.5)]
    assert set(runner.submitted) == {
        "inspect",
        "settle linear",
        "evaluate routed-6.5",
        *rivals,
    }
    results = get_document(store, keys.results_key(document.run), Results)
    assert [row.variant for row in results.rows][-6:-4] == ["routed-2.5", "routed-6.5"]
    assert manifest_digest(store, document.run) == before


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
    assert read["routed-2.75"] == pytest.approx(2.75, abs=0.4)


def test_one_slice_is_a_checkpoint_without_routers(
    store: LocalStore, write: Any, tiny_document: Make
) -> None:
    document = write(tiny_document(slices=1, optimisation={"widths": [2], "passes": 2}))
    drive(store, document, FaultyRunner(), attempt=1)
    results = get_document(store, keys.results_key(document.run), Results)
    assert results.method is None
    assert [row.variant for row in results.rows] == ["full", "rtn-2", "mbq-2"]


def test_only_a_file_of_another_block_is_packed_again(
    finished_run: Any, finished_copy: LocalStore
) -> None:
    store, document = finished_copy, finished_run.document
    before = manifest_digest(store, document.run)
    key = keys.shard_key(document.run, SLICE)
    record = get_document(store, key, ShardRecord)
    stale = record.model_copy(update={"blobs": ("0" * 64, *record.blobs[1:])})
    put_document(store, key, stale)
    store.delete(keys.manifest_key(document.run))
    runner = FaultyRunner()
    drive(store, document, runner, attempt=2)
    assert runner.submitted == {"inspect": 1, f"pack {SLICE}": 1}
    assert get_document(store, key, ShardRecord) == record
    assert manifest_digest(store, document.run) == before


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


def test_tasks_that_move_bytes_take_no_gpu(finished_run: Any) -> None:
    driver = begin(finished_run.store, finished_run.document, LocalRunner(), 2)
    driver.resources = TaskResources(cpus=1, gpus=1)
    for task in driver.plan.tasks:
        if task.kind in ("capture", "calibrate"):
            # They want what other tasks made.
            continue
        call, resources = call_of(driver, task)
        expected = (0, "cpu") if task.kind in ("pack", "route") else (1, "cuda")
        assert (resources.gpus, call.arguments[0].device) == expected
