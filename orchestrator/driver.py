"""A run in progress: what is done, what runs, what failed; and how it begins from a store.

All of it can be rebuilt: `begin` reads the records that exist, and nothing here is needed to go on
after a crash.
"""

import collections
import dataclasses
import time
from dataclasses import dataclass, field

from mbq.artifacts import keys
from mbq.artifacts.documents import (
    BlockRecord,
    Failure,
    RoutingRecord,
    RunDocument,
    SensitivityRecord,
    ShardRecord,
    TokenBits,
    ValidationRecord,
    VariantLosses,
)
from mbq.artifacts.runs import block_records, is_stored
from mbq.artifacts.sealed import find_document
from mbq.artifacts.store import Store
from mbq.cluster.runner import Call, Handle, Runner, TaskResources
from mbq.orchestrator.comparison import default_averages
from mbq.orchestrator.plan import Plan, Progress, Task, build_plan
from mbq.orchestrator.resources import choose_resources
from mbq.workers import tasks
from mbq.workers.opened import RunRef
from mbq.workers.settle import choose
from mbq.workers.variants import of_source

# Packing only moves bytes: it takes no GPU from calibration.
BYTES_ONLY = TaskResources(cpus=1)


@dataclass
class Driver:
    """One attempt at a run.

    Attributes:
        held: handles of the hidden states that enter a block, by block.
        waiting: failed tasks and when (monotonic seconds) they are tried again.
        pace_from: when the first progress was seen (seconds since the epoch) and the arithmetic
            that remained then; before it, processes were starting.
    """

    store: Store
    document: RunDocument
    runner: Runner
    attempt: int
    plan: Plan
    resources: TaskResources
    workers: int
    done: set[Task] = field(default_factory=set)
    held: dict[int, Handle] = field(default_factory=dict)
    running: dict[Handle, Task] = field(default_factory=dict)
    waiting: dict[Task, float] = field(default_factory=dict)
    failed: set[Task] = field(default_factory=set)
    failure_counts: collections.Counter[Task] = field(default_factory=collections.Counter)
    failures: list[Failure] = field(default_factory=list)
    records: dict[int, BlockRecord] = field(default_factory=dict)
    settled: dict[str, RoutingRecord] = field(default_factory=dict)
    shards: dict[str, ShardRecord] = field(default_factory=dict)
    losses: dict[str, VariantLosses] = field(default_factory=dict)
    manifest_sha256: str | None = None
    stopping: bool = False
    started_at: float = field(default_factory=time.time)
    pace_from: tuple[float, float] | None = None

    @property
    def ref(self) -> RunRef:
        return RunRef(self.store.uri, self.document.run, "cuda" if self.resources.gpus else "cpu")

    @property
    def routing(self) -> RoutingRecord | None:
        """How the checkpoint shares bits: known once every candidate is settled."""
        records = [self.settled[m] for m in self.plan.candidates if m in self.settled]
        if not records or len(records) < len(self.plan.candidates):
            return None
        return choose(records)

    @property
    def progress(self) -> Progress:
        return Progress(
            done=self.done,
            held=set(self.held),
            busy={*self.running.values(), *self.waiting},
            failed=self.failed,
            published=self.manifest_sha256 is not None,
        )


def begin(store: Store, document: RunDocument, runner: Runner, attempt: int) -> Driver:
    """A driver that knows what the store already has.

    Raises:
        ClusterError: no node can hold one task.
    """
    plan = build_plan(document)
    resources, workers = choose_resources(document, runner.slots, plan)
    driver = Driver(store, document, runner, attempt, plan, resources, workers)
    driver.records = block_records(store, document.run, len(plan.calibrations))
    driver.done |= {plan.calibrations[block] for block in driver.records}
    _adopt_routing(driver)
    _adopt_files(driver)
    adopt_measurements(driver)
    return driver


def _adopt_routing(driver: Driver) -> None:
    """Take over sensitivities, and thresholds that were settled on the blocks there are."""
    store, run, plan = driver.store, driver.document.run, driver.plan
    measured = find_document(store, keys.sensitivity_key(run), SensitivityRecord)
    if measured is None:
        return
    if is_stored(store, measured.blob):
        driver.done |= {*plan.sensitivities}
    blobs = tuple(record.blob.sha256 for _, record in sorted(driver.records.items()))
    made_of = measured.blob.sha256, blobs
    for task in plan.settles:
        record = find_document(store, keys.routing_key(run, task.target), RoutingRecord)
        if record is not None and (record.sensitivity, record.blobs) == made_of:
            driver.settled[task.target] = record
            driver.done.add(task)


def _adopt_files(driver: Driver) -> None:
    """Take over files of the checkpoint; one that outlived what it was made from is made again."""
    store, run, plan = driver.store, driver.document.run, driver.plan
    blocks = {shard.file: shard.blocks for shard in plan.shards}
    for task in (*plan.packs, *plan.routes):
        record = find_document(store, keys.shard_key(run, task.target), ShardRecord)
        stat = store.stat(keys.checkpoint_key(run, task.target))
        if record is None or stat is None or record.file.size_bytes != stat.size_bytes:
            continue
        made_of = blocks.get(task.target, range(len(plan.calibrations)))
        blobs = [r.blob.sha256 for b in made_of if (r := driver.records.get(b)) is not None]
        method = driver.routing.method if driver.routing and task.kind == "route" else None
        if list(record.blobs) == blobs and record.method == method:
            driver.shards[task.target] = record
            driver.done.add(task)


def adopt_measurements(driver: Driver) -> None:
    """Take over what was measured; on a packed checkpoint only if it is this one."""
    text = driver.document.evaluation_tokens
    for task in driver.plan.evaluations if text else ():
        assert text is not None
        key = keys.evaluation_key(driver.document.run, text.sha256, task.target)
        losses = find_document(driver.store, key, VariantLosses)
        if losses is None:
            continue
        if of_source(task.target) or losses.manifest_sha256 == driver.manifest_sha256 is not None:
            driver.losses[task.target] = losses
            driver.done.add(task)
    for task in driver.plan.validations:
        key = keys.validation_key(driver.document.run, task.target)
        record = find_document(driver.store, key, ValidationRecord)
        if record is not None and record.manifest_sha256 == driver.manifest_sha256:
            driver.done.add(task)
    sample = find_document(driver.store, keys.sample_key(driver.document.run), TokenBits)
    averages = {f"{bits:g}" for bits in default_averages(driver.document.spec)}
    if sample and sample.manifest_sha256 == driver.manifest_sha256 and set(sample.bits) == averages:
        driver.done |= {*driver.plan.samples}


def moves_bytes(task: Task) -> bool:
    """Whether a task only moves bytes."""
    return task.kind in ("pack", "route")


def call_of(driver: Driver, task: Task) -> tuple[Call, TaskResources]:
    """How a task of the plan is run."""
    name = f"{driver.document.name}: {task.name}"
    ref, resources = driver.ref, driver.resources
    if moves_bytes(task):
        # It may run where no GPU is, and must not use one that is another task's.
        ref, resources = dataclasses.replace(ref, device="cpu"), BYTES_ONLY
    if task.kind == "capture":
        before = driver.held[task.block - 1] if task.block else None
        return Call(name, tasks.capture, (ref, task.block, before)), resources
    if task.kind == "calibrate":
        attempt = driver.failure_counts[task] + 1
        hidden = driver.held[task.block]
        return Call(name, tasks.calibrate, (ref, task.block, attempt, hidden)), resources
    if task.kind == "sensitivity":
        return Call(name, tasks.sensitivity, (ref,)), resources
    if task.kind == "settle":
        return Call(name, tasks.settle, (ref, task.target)), resources
    if task.kind == "pack":
        return Call(name, tasks.pack, (ref, task.target)), resources
    if task.kind == "route":
        assert driver.routing is not None
        return Call(name, tasks.route, (ref, driver.routing.method)), resources
    if task.kind == "validate":
        return Call(name, tasks.validate, (ref, task.target)), resources
    if task.kind == "sample":
        averages = default_averages(driver.document.spec)
        arguments = (ref, driver.document.sample_tokens, averages)
        return Call(name, tasks.sample, arguments), resources
    text = driver.document.evaluation_tokens
    return Call(name, tasks.evaluate, (ref, task.target, text)), resources
