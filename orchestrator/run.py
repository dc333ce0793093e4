"""The driver of one run: walk the plan, skip what the store has, record what happens.

    python -m mbq.orchestrator.run STORE RUN ATTEMPT

It is the entrypoint of a Ray job and holds nothing that is not in the store: killed at any moment,
the next attempt reads the records that exist and goes on. Two drivers of one run write the same
bytes; the older one stops as soon as it sees the newer one's status.

A task whose process or node died, or whose store failed, is tried three times; what raises for
another reason would raise again and is not. A failed task stops what depends on it, nothing else,
and the run fails at its end with all of them listed.
"""

import contextlib
import secrets
import signal
import sys
import time
from collections.abc import Iterator

from mbq.artifacts import keys
from mbq.artifacts.documents import Failure, RunDocument, Running, Status
from mbq.artifacts.errors import ClusterError, MbqError, RunError, StoreError
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import find_document, put_document
from mbq.artifacts.store import PROBES, WORKING_SECONDS, Store, open_store, probe
from mbq.cluster.runner import Call, Handle, InputLost, Runner, TaskCrashed
from mbq.orchestrator.driver import Driver, begin, call_of, moves_bytes
from mbq.orchestrator.plan import Task, ready, releasable, remaining_flops
from mbq.orchestrator.publish import publish, write_results
from mbq.workers import tasks

ATTEMPTS = 3
_TICK_SECONDS = 1.0
# The first time a task failed; twice that the second time.
_RETRY_SECONDS = 5.0


class Superseded(MbqError):
    """A newer attempt drives this run."""


class Stopped(MbqError):
    """The run was asked to stop."""


def drive(
    store: Store,
    document: RunDocument,
    runner: Runner,
    attempt: int,
    retry_seconds: float = _RETRY_SECONDS,
) -> None:
    """Bring a run to its end.

    Raises:
        RunError: tasks failed; the message lists them and says how to go on.
        ClusterError: the cluster cannot run the plan.
        Stopped, Superseded: somebody else decided.
    """
    driver: Driver | None = None
    try:
        driver = begin(store, document, runner, attempt)
        with _stop_on_sigterm(driver):
            _check_cluster(driver)
            _loop(driver, retry_seconds)
        if driver.failed:
            raise RunError(_failure_text(driver))
        _say(driver, "done")
    except Superseded:
        raise
    except Exception as error:
        state = "stopped" if isinstance(error, Stopped) else "failed"
        failure = Failure(task="driver", attempt=attempt, error=_reason(error), final=True)
        if driver is not None and state == "failed" and not isinstance(error, RunError):
            driver.failures.append(failure)
        # The error at hand matters more than one of writing it down.
        with contextlib.suppress(MbqError):
            if driver is not None:
                _say(driver, state)
            else:
                _say_unbegun(store, document.run, failure)
        raise


def _check_cluster(driver: Driver) -> None:
    """Every node must run our code and use the store, the driver's own to begin with.

    Raises:
        ClusterError: names the node's fault.
    """
    probe(driver.store)
    key = f"{PROBES}/{secrets.token_hex(8)}"
    driver.store.put(key, [b"mbq"])
    call = Call("inspect", tasks.inspect, (driver.ref, key))
    try:
        hosts = driver.runner.on_every_node(call)
    finally:
        driver.store.delete(key)
    for host in hosts:
        if host.fault is not None:
            raise ClusterError(
                f"a node cannot use the store {driver.store.uri}: {host.fault}; use a folder that "
                "every node mounts, or give every node credentials for the bucket (a local Ray has "
                "the environment it was started in: `mbq-cluster head stop`, then again)"
            )
        found = host.code_version, host.format_version
        document = driver.document
        if found != (document.code_version, document.format_version):
            raise ClusterError(
                f"a node runs mbq-cluster {found[0]} (format {found[1]}), the run was submitted "
                f"with {document.code_version} (format {document.format_version}); install the "
                "same version everywhere"
            )


def _loop(driver: Driver, retry_seconds: float) -> None:
    plan = driver.plan
    said = 0.0
    while True:
        if driver.stopping:
            raise Stopped(f"run {driver.document.run} was stopped; resume continues it")
        # Packed files may outlive a damaged block: a checkpoint needs both.
        if driver.manifest_sha256 is None and driver.done >= plan.checkpoint:
            publish(driver)
        _submit(driver)
        if driver.running:
            for handle in driver.runner.wait(list(driver.running), _TICK_SECONDS):
                _collect(driver, handle, retry_seconds)
        elif driver.waiting:
            time.sleep(max(0.0, min(driver.waiting.values()) - time.monotonic()))
        else:
            break
        for block in releasable(plan, driver.progress):
            del driver.held[block]
        if time.monotonic() - said >= _TICK_SECONDS:
            try:
                _say(driver, "running")
            except Superseded:
                raise
            except MbqError as error:
                # Status is for eyes; work goes on, and the next second tries again.
                print(f"cannot write the status: {error}", flush=True)
            said = time.monotonic()
    if driver.manifest_sha256 and driver.done >= {*plan.evaluations}:
        write_results(driver)


def _submit(driver: Driver) -> None:
    now = time.monotonic()
    driver.waiting = {task: due for task, due in driver.waiting.items() if due > now}
    for task in ready(driver.plan, driver.progress, driver.workers):
        # Packing waits for nobody's GPU, and nobody for packing.
        alike = sum(moves_bytes(other) == moves_bytes(task) for other in driver.running.values())
        if alike < driver.workers:
            call, resources = call_of(driver, task)
            driver.running[driver.runner.submit(call, resources)] = task


def _collect(driver: Driver, handle: Handle, retry_seconds: float) -> None:
    """Take over a finished task's result, or decide whether it is tried again."""
    task = driver.running.pop(handle)
    try:
        if task.kind == "capture":
            # Hidden states stay where they are; only the handle is kept.
            driver.runner.outcome(handle)
            driver.held[task.block] = handle
        elif task.kind == "calibrate":
            driver.records[task.block] = driver.runner.result(handle)
        elif task.kind == "settle":
            driver.settled[task.target] = driver.runner.result(handle)
        elif task.kind in ("pack", "route"):
            driver.shards[task.target] = driver.runner.result(handle)
        elif task.kind in ("sensitivity", "validate", "sample"):
            driver.runner.outcome(handle)
        else:
            driver.losses[task.target] = driver.runner.result(handle)
        driver.done.add(task)
    except InputLost as error:
        # The chain of hidden states broke: start it again for the blocks that still need it.
        driver.held.clear()
        driver.done -= set(driver.plan.captures)
        _note_failure(driver, task, error, retry_seconds)
    except (TaskCrashed, StoreError, OSError) as error:
        _note_failure(driver, task, error, retry_seconds)
    except Exception as error:
        # Whatever a task raises fails that task only; the others go on and the run reports all.
        _note_failure(driver, task, error, None)


def _note_failure(
    driver: Driver, task: Task, error: BaseException, retry_seconds: float | None
) -> None:
    """Count a failure and plan the next attempt; with None there is no next."""
    driver.failure_counts[task] += 1
    attempt = driver.failure_counts[task]
    final = retry_seconds is None or attempt >= ATTEMPTS
    if retry_seconds is None or final:
        driver.failed.add(task)
    else:
        driver.waiting[task] = time.monotonic() + attempt * retry_seconds
    reason = _reason(error)
    driver.failures.append(Failure(task=task.name, attempt=attempt, error=reason, final=final))
    verdict = "giving up" if final else "trying again"
    print(f"{task.name}, attempt {attempt}: {reason}; {verdict}", flush=True)


def _say(driver: Driver, state: str) -> None:
    """Write the status, unless a newer attempt has taken over."""
    _give_way(driver.store, driver.document.run, driver.attempt)
    reported = driver.runner.progress()
    fractions = {task: reported.get(handle.name, 0.0) for handle, task in driver.running.items()}
    now = time.time()
    remaining = remaining_flops(driver.plan, driver.done, fractions)
    total = sum(task.flops for task in driver.plan.tasks)
    if driver.pace_from is None and any(fractions.values()):
        driver.pace_from = now, remaining
    status = Status.model_validate(
        {
            "run": driver.document.run,
            "attempt": driver.attempt,
            "state": state,
            "blocks_done": len(driver.records),
            "blocks_total": len(driver.plan.calibrations),
            "fraction": 1.0 - remaining / total,
            "seconds_left": _seconds_left(driver, now, remaining),
            "running": [Running(task=t.name, fraction=f) for t, f in fractions.items()],
            "failures": driver.failures,
            "started_at": driver.started_at,
            "updated_at": now,
        }
    )
    put_document(driver.store, keys.status_key(driver.document.run), status)
    _publish_metrics(driver)


def _give_way(store: Store, run: str, attempt: int) -> Status | None:
    """What was said last. Raises Superseded if a newer attempt said it."""
    latest = find_document(store, keys.status_key(run), Status)
    if latest is not None and latest.attempt > attempt:
        raise Superseded(f"attempt {latest.attempt} drives run {run} now")
    return latest


def _seconds_left(driver: Driver, now: float, remaining: float) -> float | None:
    """Time to go at the pace so far; None while there is none to speak of."""
    if driver.pace_from is None:
        return None
    since, at_first = driver.pace_from
    finished = at_first - remaining
    return (now - since) * remaining / finished if finished > 0 else None


def _say_unbegun(store: Store, run: str, failure: Failure) -> None:
    """The status of an attempt that could not begin; what is done is what was."""
    before = _give_way(store, run, failure.attempt)
    now = time.time()
    status = Status(
        run=run,
        attempt=failure.attempt,
        state="failed",
        blocks_done=before.blocks_done if before else 0,
        blocks_total=before.blocks_total if before else 0,
        fraction=before.fraction if before else 0.0,
        seconds_left=None,
        running=(),
        failures=(failure,),
        started_at=now,
        updated_at=now,
    )
    put_document(store, keys.status_key(run), status)


def _publish_metrics(driver: Driver) -> None:
    records = list(driver.records.values())
    metrics = {
        "mbq_blocks_done": float(len(records)),
        "mbq_bytes_stored": float(
            sum(record.blob.size_bytes for record in records)
            + sum(shard.file.size_bytes for shard in driver.shards.values())
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


def _reason(error: BaseException) -> str:
    own = isinstance(error, ClusterError | RunError)
    return str(error) if own else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _stop_on_sigterm(driver: Driver) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        driver.stopping = True

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(store_uri: str, run: str, attempt: int) -> int:
    """Entrypoint of the Ray job; returns the exit code."""
    from mbq.cluster.ray_runner import RayRunner

    store = open_store(store_uri, WORKING_SECONDS)
    try:
        drive(store, find_run(store, run), RayRunner(), attempt)
    except MbqError as error:
        print(f"mbq-cluster: {error}", flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
