"""Run picklable functions somewhere: the protocol, and a runner that runs them right here.

A call is a function, its arguments and a name. An argument may be the handle of an earlier call: it
is replaced by that call's result without passing through the caller. Every function gets one more
argument, `report`, to say which fraction of its work is done.

Knows nothing of what the functions do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mbq.artifacts.errors import MbqError


class TaskCrashed(MbqError):
    """The process or node that ran a task died; running the task again may work."""


class InputLost(MbqError):
    """A handle's result died with the node that held it; it must be made again."""


@dataclass(frozen=True)
class TaskResources:
    """What one task takes: processors, GPUs (0 or 1) and, if known, bytes of host memory."""

    cpus: int
    gpus: int = 0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Call:
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Handle(Protocol):
    """Stands for a submitted call."""

    @property
    def name(self) -> str: ...


class Runner(Protocol):
    def slots(self, resources: TaskResources) -> int:
        """How many such tasks can run at once; 0 when none ever can."""

    def submit(self, call: Call, resources: TaskResources) -> Handle: ...

    def on_every_node(self, call: Call) -> list[Any]:
        """Results of one call from each node."""

    def wait(self, handles: Sequence[Handle], timeout_seconds: float) -> list[Handle]:
        """Those of the handles that have finished; may be empty."""

    def result(self, handle: Handle) -> Any:
        """The call's result, or what it raised, or TaskCrashed or InputLost."""

    def outcome(self, handle: Handle) -> None:
        """Like `result`, but leaves the value where it is."""

    def progress(self) -> Mapping[str, float]:
        """Finished fraction of every call that reported one, by name."""

    def publish(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Show numbers to whoever watches the cluster."""


@dataclass(frozen=True, eq=False)
class LocalHandle:
    name: str
    value: Any
    error: BaseException | None


class LocalRunner:
    """Runs every call at once, in this process; what a call raises is kept for `result`."""

    def __init__(self) -> None:
        self.published: dict[str, float] = {}
        self._progress: dict[str, float] = {}

    def slots(self, resources: TaskResources) -> int:
        return 0 if resources.gpus else 1

    def submit(self, call: Call, resources: TaskResources) -> LocalHandle:
        arguments = [a.value if isinstance(a, LocalHandle) else a for a in call.arguments]

        def report(fraction: float) -> None:
            self._progress[call.name] = fraction

        try:
            return LocalHandle(call.name, call.function(*arguments, report), None)
        except Exception as error:
            return LocalHandle(call.name, None, error)

    def on_every_node(self, call: Call) -> list[Any]:
        return [self.result(self.submit(call, TaskResources(cpus=0)))]

    def wait(self, handles: Sequence[Handle], timeout_seconds: float) -> list[Handle]:
        return list(handles)

    def result(self, handle: Handle) -> Any:
        assert isinstance(handle, LocalHandle)
        if handle.error is not None:
            raise handle.error
        return handle.value

    def outcome(self, handle: Handle) -> None:
        self.result(handle)

    def progress(self) -> Mapping[str, float]:
        return dict(self._progress)

    def publish(self, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        self.published |= metrics
