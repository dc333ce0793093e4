"""The runner of a real cluster: every call is one Ray task.

Ray's own retries are off: a retry is the caller's decision, visible and counted. A task returns two
objects, its value and a small mark, so that the caller learns that a value of gigabytes exists
without fetching it. Progress goes through one small actor; losing it loses nothing but progress.

GPU tasks get a fresh process each, which is the only sure way to get all of a GPU's memory back,
and to see the GPU that was assigned: a process that has used one keeps to it.
"""

import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import exceptions
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mbq.artifacts.errors import ClusterError, MbqError, RunError, first_line
from mbq.cluster.runner import Call, Handle, InputLost, TaskCrashed, TaskResources, fitting

_LOST = (
    exceptions.ObjectLostError,
    exceptions.OwnerDiedError,
    exceptions.ObjectReconstructionFailedError,
    exceptions.ReferenceCountingAssertionError,
)
_CRASHED = (
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.OutOfMemoryError,
    exceptions.LocalRayletDiedError,
    exceptions.TaskUnschedulableError,
    exceptions.RuntimeEnvSetupError,
)
_NODE_TIMEOUT_SECONDS = 120.0
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, eq=False)
class RayHandle:
    name: str
    value: Any
    mark: Any


class _ProgressBoard:
    """Finished fractions by call name."""

    def __init__(self) -> None:
        self._fractions: dict[str, float] = {}

    def report(self, name: str, fraction: float) -> None:
        self._fractions[name] = fraction

    def read(self) -> dict[str, float]:
        return self._fractions


def _run(call: Call, board: Any, *arguments: Any) -> tuple[Any, None]:
    """Body of every task. Arguments are passed beside the call so that Ray resolves handles."""

    def report(fraction: float) -> None:
        board.report.remote(call.name, fraction)

    try:
        return call.function(*arguments, report), None
    except (MbqError, OSError):
        raise
    except Exception as error:
        # Foreign exceptions may not survive the way back; the task's log keeps the whole of it.
        traceback.print_exc()
        raise RunError(f"{type(error).__name__}: {first_line(error)}") from None


class RayRunner:
    """Connects to the cluster that the process belongs to (a Ray job finds it by itself)."""

    def __init__(self) -> None:
        ray.init(ignore_reinit_error=True)
        # On the driver's node, so that it lives as long as the driver does.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board: Any = ray.remote(num_cpus=0)(_ProgressBoard)
        self._board = board.options(scheduling_strategy=here).remote()
        # Ray's default for tasks whose GPUs are known when they are declared, as these are not.
        self._gpu_task = ray.remote(max_retries=0, num_returns=2, max_calls=1)(_run)
        self._task = ray.remote(max_retries=0, num_returns=2)(_run)
        self._gauges: dict[str, Gauge] = {}
        self._read: Any = None
        self._progress: dict[str, float] = {}

    def slots(self, resources: TaskResources) -> int:
        return fitting((n["Resources"] for n in ray.nodes() if n["Alive"]), resources)

    def submit(self, call: Call, resources: TaskResources) -> RayHandle:
        options = {
            "name": call.name,
            "num_cpus": resources.cpus,
            "num_gpus": resources.gpus,
            "memory": resources.memory_bytes,
        }
        return self._submit(call, options)

    def on_every_node(self, call: Call) -> list[Any]:
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                options = {"name": call.name, "num_cpus": 0, "scheduling_strategy": where}
                asked[self._submit(call, options).value] = node["NodeManagerAddress"]
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=_NODE_TIMEOUT_SECONDS)
        if late:
            raise ClusterError(
                f"{call.name}: node {asked[late[0]]} did not answer within "
                f"{_NODE_TIMEOUT_SECONDS:.0f} s; look at it in the Ray dashboard"
            )
        answers = []
        for value, address in asked.items():
            try:
                answers.append(_get(value))
            except (TaskCrashed, InputLost) as error:
                raise ClusterError(
                    f"{call.name}: node {address} died ({_last_line(error)}); resume without it"
                ) from error
            except Exception as error:  # whatever its Python raises, or ray of what it cannot read
                raise ClusterError(
                    f"{call.name} failed on node {address}: {_last_line(error)}; install the same "
                    "version of mbq-cluster everywhere"
                ) from error
        return answers

    def wait(self, handles: Sequence[Handle], timeout_seconds: float) -> list[Handle]:
        marks = {handle.mark: handle for handle in handles if isinstance(handle, RayHandle)}
        finished, _ = ray.wait(
            list(marks), num_returns=1, timeout=timeout_seconds, fetch_local=False
        )
        return [marks[mark] for mark in finished]

    def result(self, handle: Handle) -> Any:
        assert isinstance(handle, RayHandle)
        return _get(handle.value)

    def outcome(self, handle: Handle) -> None:
        assert isinstance(handle, RayHandle)
        _get(handle.mark)

    def progress(self) -> Mapping[str, float]:
        """What the board said last; never waits for it."""
        try:
            if self._read is not None and ray.wait([self._read], timeout=0)[0]:
                self._progress = ray.get(self._read)
                self._read = None
            if self._read is None:
                self._read = self._board.read.remote()
        except exceptions.RayError:
            # Without the board a run goes on; only its display stands still.
            self._read = None
        return self._progress

    def publish(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        for name, value in metrics.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, tag_keys=tuple(tags))
            self._gauges[name].set(value, dict(tags))

    def _submit(self, call: Call, options: dict[str, Any]) -> RayHandle:
        arguments = [a.value if isinstance(a, RayHandle) else a for a in call.arguments]
        bare = Call(call.name, call.function, ())
        task = self._gpu_task if options.get("num_gpus") else self._task
        value, mark = task.options(**options).remote(bare, self._board, *arguments)
        return RayHandle(call.name, value, mark)


def _get(reference: Any) -> Any:
    """Fetch a result, and say in our own words what went wrong."""
    try:
        return ray.get(reference)
    except exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, _LOST):
            raise InputLost(str(cause)) from error
        raise cause from error
    except _LOST as error:
        raise InputLost(first_line(error)) from error
    except _CRASHED as error:
        raise TaskCrashed(first_line(error)) from error


def _last_line(error: BaseException) -> str:
    """What a traceback in a message ends with."""
    lines = _COLOURS.sub("", str(error)).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
