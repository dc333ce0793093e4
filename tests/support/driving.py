"""Drivers that run everything here, some of it failing on purpose, and what they leave."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mbq.artifacts import keys
from mbq.artifacts.documents import RunDocument, Status
from mbq.artifacts.sealed import get_document
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import Call, Handle, TaskResources
from mbq.orchestrator.run import drive as drive_patiently
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


def manifest_digest(store: LocalStore, run: str) -> str:
    return hashlib.sha256(store.read(keys.manifest_key(run))).hexdigest()


def status_of(store: LocalStore, run: str) -> Status:
    return get_document(store, keys.status_key(run), Status)
