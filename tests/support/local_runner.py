"""A runner that runs every call at once, in this process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbq.cluster.runner import Call, Handle, TaskResources


@dataclass(frozen=True, eq=False)
class LocalHandle:
    name: str
    value: Any
    error: BaseException | None


class LocalRunner:
    """What a call raises is kept for `result`."""

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
