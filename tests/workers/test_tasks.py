"""Tasks on a real store: what each width is calibrated on, and with which patience."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq.artifacts import keys
from mbq.artifacts.documents import RunDocument
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.store import LocalStore, Store, open_store
from mbq.kernels.widths import widths_up_to
from mbq.workers import opened as opening
from mbq.workers import tasks
from mbq.workers.calibrate import calibrate_block
from mbq.workers.capture import FULL, to_array
from mbq.workers.determinism import attention, seed_of
from mbq.workers.opened import Opened, RunRef
from mbq.workers.pack import encode_block
from mbq.workers.route import fit_routers
from mbq.workers.sensitivity import measure_sensitivity

Make = Callable[..., dict[str, Any]]


def _nothing(fraction: float) -> None:
    pass


@pytest.mark.parametrize("propagation", ["sequential", "full_precision"])
def test_widths_learn_from_their_own_hidden_states_what_full_precision_makes_of_its(
    propagation: str,
    tmp_path: Path,
    tiny_document: Make,
    write_run: Callable[[LocalStore, dict[str, Any]], RunDocument],
) -> None:
    store = LocalStore(tmp_path / "store")
    # Of 6 sequences of 16 tokens routers see 4.
    routing = {"steps": 20, "width": 4, "settle_tokens": 128, "tokens": 64}
    run = write_run(store, tiny_document(propagation=propagation, routing=routing)).run
    ref = RunRef(store.uri, run, "cpu")
    opened = Opened(ref)
    spec = opened.spec
    full = torch.randn(6, 16, 64)
    widths = spec.streams or widths_up_to(spec.max_bits)
    # Streams as different as no run's are: whoever takes the wrong one makes other bytes.
    inputs = {bits: full + torch.randn_like(full) if spec.streams else full for bits in widths}
    hidden = {FULL: to_array(full)}
    if spec.streams:
        hidden |= {str(bits): to_array(x) for bits, x in inputs.items()}
    sensitivity = tasks.sensitivity(ref, _nothing).sensitivity
    record = tasks.calibrate(ref, 1, 1, hidden, _nothing)

    seed = seed_of(spec.calibration.seed, 1)
    with attention():
        expected = calibrate_block(
            opened.model.runner(1, spec.microbatch),
            inputs,
            full,
            spec.optimisation,
            spec.group_size,
            opened.routers.values(),
            seed,
            _nothing,
        )
        ids = opened.tokens(opened.document.calibration_tokens)
        samples = ids[: spec.routing.sensitivity_samples]
        by_channel = measure_sensitivity(opened.model, samples, spec.microbatch, _nothing)
        importance = {}
        for name in expected.linears:
            linear = opened.linear(1, name).name
            importance[name] = by_channel[linear] / sensitivity[linear]
        routers = fit_routers(
            opened.model.runner(1, spec.microbatch),
            opened.routers,
            expected.linears,
            importance,
            full[:4],
            spec.routing,
            spec.max_bits,
            seed,
        )
    found = store.read(keys.blob_key(record.blob.sha256))
    assert found == b"".join(encode_block(expected.linears, routers))
    assert record.loss_after == expected.loss_after


def test_damaged_sensitivities_are_found_before_anything_is_trained(
    tmp_path: Path,
    tiny_document: Make,
    write_run: Callable[[LocalStore, dict[str, Any]], RunDocument],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = LocalStore(tmp_path / "store")
    ref = RunRef(
        store.uri, write_run(store, tiny_document(propagation="full_precision")).run, "cpu"
    )
    key = keys.blob_key(tasks.sensitivity(ref, _nothing).blob.sha256)
    store.put(key, [bytes(len(store.read(key)))])
    monkeypatch.setattr(tasks, "calibrate_block", None)
    with pytest.raises(CorruptError):
        tasks.calibrate(ref, 0, 1, {FULL: to_array(torch.randn(6, 16, 64))}, _nothing)


def test_work_waits_minutes_for_a_store(finished_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(uri: str, patience_seconds: float = 0.0) -> Store:
        asked.append(patience_seconds)
        return open_store(uri, patience_seconds)

    monkeypatch.setattr(opening, "open_store", note)
    Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    assert asked == [300.0]
