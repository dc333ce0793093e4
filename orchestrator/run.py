"""The driver of one run: walk the plan, skip what the store has, record what happens.

    python -m mbq.orchestrator.run STORE RUN ATTEMPT

It is the entrypoint of a Ray job and holds nothing that is not in the store: killed at any moment,
the next attempt reads the records that exist and goes on. Two drivers of one run write the same
bytes; the older one stops as soon as it sees the newer one's status.

A task whose process or node died, or whose store failed, is tried three times; what raises for
another reason would raise again and is not. A failed task stops what depends on it, nothing else,
and the run fails at its end with all of them listed.
"""

import collections
import contextlib
import secrets
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import INDEX_FILE, config_document, index_document, slice_files
from mbq.artifacts.errors import ClusterError, MbqError, RunError, StoreError
from mbq.artifacts.manifest import (
    BlockRecord,
    Failure,
    FileRecord,
    Manifest,
    Results,
    RunDocument,
    Running,
    Status,
    VariantLosses,
    block_records,
    find_document,
    find_run,
    put_document,
)
from mbq.artifacts.source import TOKENIZER_FILES
from mbq.artifacts.spec import FORMAT_VERSION, SLICE_BITS
from mbq.artifacts.store import Store, open_store
from mbq.artifacts.tensors import digest_of
from mbq.cluster.runner import Call, Handle, InputLost, Runner, TaskCrashed, TaskResources
from mbq.orchestrator.plan import (
    Plan,
    Progress,
    Task,
    build_plan,
    ready,
    releasable,
    remaining_flops,
    task_memory_bytes,
)
from mbq.workers import tasks
from mbq.workers.evaluate import table

ATTEMPTS = 3
_TICK_SECONDS = 1.0


class Superseded(MbqError):
    """A newer attempt drives this run."""


class Stopped(MbqError):
    """The run was asked to stop."""


@dataclass
class Driver:
    """A run in progress. All of it can be rebuilt from the store."""

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
    failed: set[Task] = field(default_factory=set)
    attempts: collections.Counter[Task] = field(default_factory=collections.Counter)
    failures: list[Failure] = field(default_factory=list)
    records: dict[int, BlockRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    losses: dict[str, VariantLosses] = field(default_factory=dict)
    published: bool = False
    stopping: bool = False
    started_at: float = field(default_factory=time.time)
    flops_at_start: float = 0.0

    @property
    def job(self) -> tasks.Job:
        return tasks.Job(
            self.store.uri, self.document.run, "cuda" if self.resources.gpus else "cpu"
        )

    @property
    def progress(self) -> Progress:
        busy = set(self.running.values()) | self.failed
        return Progress(self.done, set(self.held), busy, self.published)


def drive(store: Store, document: RunDocument, runner: Runner, attempt: int) -> None:
    """Bring a run to its end.

    Raises:
        RunError: tasks failed; the message lists them and says how to go on.
        ClusterError: the cluster cannot run the plan.
        Stopped, Superseded: somebody else decided.
    """
    driver = _start(store, document, runner, attempt)
    with _stop_on_sigterm(driver):
        try:
            _check_cluster(driver)
            _loop(driver)
        except Superseded:
            raise
        except Stopped:
            _say(driver, "stopped")
            raise
        except MbqError as error:
            driver.failures.append(
                Failure(task="driver", attempt=attempt, error=str(error), final=True)
            )
            _say(driver, "failed")
            raise
        if driver.failed:
            _say(driver, "failed")
            raise RunError(_failure_text(driver))
        _say(driver, "done")


def _start(store: Store, document: RunDocument, runner: Runner, attempt: int) -> Driver:
    """A driver that knows what the store already has."""
    plan = build_plan(document)
    resources, workers = _choose_resources(document, runner, plan)
    driver = Driver(store, document, runner, attempt, plan, resources, workers)
    driver.records = block_records(store, document.run, len(plan.calibrations))
    driver.done |= {plan.calibrations[block] for block in driver.records}
    for task in plan.packs:
        record = find_document(store, keys.shard_key(document.run, task.target), FileRecord)
        size = store.size(keys.checkpoint_key(document.run, task.target))
        if record is not None and record.size_bytes == size:
            driver.files[task.target] = record
            driver.done.add(task)
    for task in plan.evaluations:
        losses = find_document(store, _evaluation_key(document, task.target), VariantLosses)
        if losses is not None:
            driver.losses[task.target] = losses
            driver.done.add(task)
    driver.flops_at_start = remaining_flops(plan, driver.done, {})
    return driver


def _choose_resources(
    document: RunDocument, runner: Runner, plan: Plan
) -> tuple[TaskResources, int]:
    """What one task takes, and how many run at once."""
    spec = document.spec
    hidden_size = document.source.config["hidden_size"]
    asked = spec.resources.memory_gib
    memory = int(asked * 1024**3) if asked else task_memory_bytes(plan, spec, hidden_size)
    on_cpu = TaskResources(cpus=spec.threads, memory_bytes=memory)
    # On a GPU the block lives in the GPU's memory; the host holds its hidden states.
    on_gpu = TaskResources(cpus=spec.threads, gpus=1)
    chosen = {"cpu": [on_cpu], "cuda": [on_gpu], "auto": [on_gpu, on_cpu]}[spec.resources.device]
    for resources in chosen:
        slots = runner.slots(resources)
        if slots:
            return resources, min(slots, spec.resources.workers or slots)
    what = "GPU" if spec.resources.device == "cuda" else f"{memory / 1024**3:.1f} GiB"
    raise ClusterError(
        f"no node offers {spec.threads} CPUs and a {what} for one task; lower threads or "
        "microbatch, set resources.memory_gib, or add nodes"
    )


def _check_cluster(driver: Driver) -> None:
    """Every node must run our code and see the store.

    Raises:
        ClusterError: names the node's fault.
    """
    key = f"probe/{driver.document.run}-{secrets.token_hex(8)}"
    driver.store.put(key, [b"mbq"])
    call = Call("inspect", tasks.inspect, (driver.job, key))
    try:
        hosts = driver.runner.on_every_node(call)
    finally:
        driver.store.delete(key)
    for host in hosts:
        if not host.sees_store:
            raise ClusterError(
                f"a node does not see the store {driver.store.uri}; use a folder that every node "
                "mounts"
            )
        if host.code_version != driver.document.code_version:
            raise ClusterError(
                f"a node runs mbq-cluster {host.code_version}, the run was submitted with "
                f"{driver.document.code_version}; install the same version everywhere"
            )


def _loop(driver: Driver) -> None:
    said = 0.0
    plan = driver.plan
    while True:
        if driver.stopping:
            raise Stopped(f"run {driver.document.run} was stopped; resume continues it")
        # Packed files may outlive a damaged block: a checkpoint needs both.
        if not driver.published and driver.done >= {*plan.calibrations, *plan.packs}:
            _publish(driver)
        _submit(driver)
        if not driver.running:
            break
        for handle in driver.runner.wait(list(driver.running), _TICK_SECONDS):
            _collect(driver, handle)
        for block in releasable(plan, driver.progress):
            del driver.held[block]
        if time.monotonic() - said >= _TICK_SECONDS:
            _say(driver, "running")
            said = time.monotonic()
    if driver.published and len(driver.losses) == len(plan.evaluations):
        _write_results(driver)


def _submit(driver: Driver) -> None:
    for task in ready(driver.plan, driver.progress, driver.workers):
        if len(driver.running) >= driver.workers:
            return
        # Starting one task may have used up the room that another was waiting for.
        if task in ready(driver.plan, driver.progress, driver.workers):
            driver.attempts[task] += 1
            driver.running[driver.runner.submit(_call(driver, task), driver.resources)] = task


def _call(driver: Driver, task: Task) -> Call:
    name = f"{driver.document.name}: {task.name}"
    job, attempt = driver.job, driver.attempts[task]
    if task.kind == "capture":
        before = driver.held[task.block - 1] if task.block else None
        return Call(name, tasks.capture, (job, task.block, before))
    if task.kind == "calibrate":
        hidden = driver.held[task.block]
        return Call(name, tasks.calibrate, (job, task.block, attempt, hidden))
    if task.kind == "pack":
        return Call(name, tasks.pack, (job, task.target))
    return Call(name, tasks.evaluate, (job, task.target))


def _collect(driver: Driver, handle: Handle) -> None:
    """Take over a finished task's result, or decide whether it is tried again."""
    task = driver.running.pop(handle)
    try:
        if task.kind == "capture":
            # Hidden states stay where they are; only the handle is kept.
            driver.runner.outcome(handle)
            driver.held[task.block] = handle
        elif task.kind == "calibrate":
            driver.records[task.block] = driver.runner.result(handle)
        elif task.kind == "pack":
            driver.files[task.target] = driver.runner.result(handle)
        else:
            driver.losses[task.target] = driver.runner.result(handle)
        driver.done.add(task)
    except InputLost as error:
        # The chain of hidden states broke: start it again for the blocks that still need it.
        driver.held.clear()
        driver.done -= set(driver.plan.captures)
        _note_failure(driver, task, error, again=True)
    except (TaskCrashed, StoreError, OSError) as error:
        _note_failure(driver, task, error, again=True)
    except Exception as error:
        # Whatever a task raises fails that task only; the others go on and the run reports all.
        _note_failure(driver, task, error, again=False)


def _note_failure(driver: Driver, task: Task, error: BaseException, again: bool) -> None:
    attempt = driver.attempts[task]
    final = not again or attempt >= ATTEMPTS
    if final:
        driver.failed.add(task)
    reason = f"{type(error).__name__}: {error}"
    driver.failures.append(Failure(task=task.name, attempt=attempt, error=reason, final=final))
    verdict = "giving up" if final else "trying again"
    print(f"{task.name}, attempt {attempt}: {reason}; {verdict}", flush=True)


def _publish(driver: Driver) -> None:
    """Write the checkpoint's small files and, last, its manifest."""
    store, document, plan = driver.store, driver.document, driver.plan
    source, spec = document.source, document.spec
    small = {
        INDEX_FILE: index_document(plan.shards),
        "config.json": config_document(source, spec.slices, spec.group_size, plan.linears),
    }
    for name in TOKENIZER_FILES:
        path = source.path(name)
        if path is not None:
            small[name] = path.read_bytes()
    files = dict(driver.files)
    for name, data in small.items():
        store.put(keys.checkpoint_key(document.run, name), [data])
        files[name] = FileRecord.of(digest_of([data]))
    blocks = [driver.records[block] for block in range(len(plan.calibrations))]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        run=document.run,
        model_digest=document.model_digest,
        max_bits=SLICE_BITS * spec.slices,
        group_size=spec.group_size,
        files=dict(sorted(files.items())),
        slice_files=slice_files(plan.shards, spec.slices),
        blocks=tuple(record.blob.sha256 for record in blocks),
        hardware=tuple(record.hardware for record in blocks),
    )
    put_document(store, keys.manifest_key(document.run), manifest)
    driver.published = True


def _write_results(driver: Driver) -> None:
    document, plan = driver.document, driver.plan
    if document.spec.evaluation is None:
        return
    sizes: dict[int | None, int] = collections.Counter()
    for shard in plan.shards:
        sizes[shard.slice] += driver.files[shard.file].size_bytes
    losses = {task.target: driver.losses[task.target].losses for task in plan.evaluations}
    length = document.spec.evaluation.sequence_length
    results = Results(
        run=document.run,
        tokens=len(next(iter(losses.values()))) * length,
        sequence_length=length,
        rows=tuple(table(losses)),
        slice_bytes=tuple(sizes[e] for e in range(document.spec.slices)),
        base_bytes=sizes[None],
    )
    put_document(driver.store, keys.results_key(document.run), results)


def _say(driver: Driver, state: str) -> None:
    """Write the status, unless a newer attempt has taken over."""
    key = keys.status_key(driver.document.run)
    latest = find_document(driver.store, key, Status)
    if latest is not None and latest.attempt > driver.attempt:
        raise Superseded(f"attempt {latest.attempt} drives run {driver.document.run} now")
    reported = driver.runner.progress()
    fractions = {task: reported.get(handle.name, 0.0) for handle, task in driver.running.items()}
    now = time.time()
    remaining = remaining_flops(driver.plan, driver.done, fractions)
    total = sum(task.flops for task in driver.plan.tasks)
    finished = driver.flops_at_start - remaining
    elapsed = now - driver.started_at
    status = Status.model_validate(
        {
            "run": driver.document.run,
            "attempt": driver.attempt,
            "state": state,
            "blocks_done": len(driver.records),
            "blocks_total": len(driver.plan.calibrations),
            "fraction": 1.0 - remaining / total,
            "seconds_left": elapsed * remaining / finished if finished > 0 else None,
            "running": [Running(task=t.name, fraction=f) for t, f in fractions.items()],
            "failures": driver.failures,
            "started_at": driver.started_at,
            "updated_at": now,
        }
    )
    put_document(driver.store, key, status)
    _publish_metrics(driver)


def _publish_metrics(driver: Driver) -> None:
    records = list(driver.records.values())
    metrics = {
        "mbq_blocks_done": float(len(records)),
        "mbq_bytes_stored": float(
            sum(record.blob.size_bytes for record in records)
            + sum(file.size_bytes for file in driver.files.values())
        ),
    }
    if records:
        metrics["mbq_block_seconds"] = sum(r.seconds for r in records) / len(records)
        losses = [record.loss_after[min(record.loss_after)] for record in records]
        metrics["mbq_block_loss"] = sum(losses) / len(losses)
    driver.runner.publish(metrics, {"run": driver.document.run, "model": driver.document.name})


def _failure_text(driver: Driver) -> str:
    final = [failure for failure in driver.failures if failure.final]
    lines = "; ".join(f"{f.task} (attempt {f.attempt}): {f.error}" for f in final)
    return (
        f"run {driver.document.run} failed: {lines}. What was finished is kept; "
        f"`mbq-cluster resume {driver.document.run}` tries the rest again"
    )


@contextlib.contextmanager
def _stop_on_sigterm(driver: Driver) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        driver.stopping = True

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _evaluation_key(document: RunDocument, variant: str) -> str:
    blob = document.evaluation_tokens
    return keys.evaluation_key(document.run, blob.sha256 if blob else "none", variant)


def main(store_uri: str, run: str, attempt: int) -> int:
    """Entrypoint of the Ray job; returns the exit code."""
    from mbq.cluster.ray_runner import RayRunner

    store = open_store(store_uri)
    try:
        drive(store, find_run(store, run), RayRunner(), attempt)
    except MbqError as error:
        print(f"mbq-cluster: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
