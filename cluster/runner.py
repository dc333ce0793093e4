"""Run picklable functions somewhere: the protocol. `ray_runner.py` runs them on Ray.

A call is a function, its arguments and a name. An argument may be the handle of an earlier call: it
is replaced by that call's result without passing through the caller. Every function gets one more
argument, `report`, to say which fraction of its work is done.

Knows nothing of what the functions do.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def fitting(offered: Iterable[Mapping[str, float]], wanted: TaskResources) -> int:
    """How many such tasks run at once on nodes that offer so much, in Ray's names."""
    slots = 0
    for node in offered:
        fits = [int(node.get("CPU", 0) // wanted.cpus)] if wanted.cpus else []
        if wanted.gpus:
            fits.append(int(node.get("GPU", 0) // wanted.gpus))
        if wanted.memory_bytes:
            fits.append(int(node.get("memory", 0) // wanted.memory_bytes))
        slots += min(fits, default=0)
    return slots


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
