"""What travels to tasks and back, and how many of them nodes hold."""

import pickle

import pytest

from mbq.artifacts import errors
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import Call, InputLost, TaskCrashed, TaskResources, fitting
from mbq.workers import tasks


@pytest.mark.parametrize(
    "value",
    [
        tasks.RunRef("file:///store", "0123456789ab", "cpu"),
        Call("calibrate", tasks.calibrate, (1, "two")),
        LocalStore,
        tasks.capture,
        tasks.pack,
        tasks.evaluate,
        tasks.inspect,
    ],
)
def test_everything_a_task_needs_travels(value: object) -> None:
    assert pickle.loads(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    "kind",
    [*errors.MbqError.__subclasses__(), errors.MbqError, TaskCrashed, InputLost],
)
def test_errors_travel_back(kind: type[errors.MbqError]) -> None:
    back = pickle.loads(pickle.dumps(kind("what, rule, remedy")))
    assert type(back) is kind
    assert str(back) == "what, rule, remedy"


@pytest.mark.parametrize(
    ("wanted", "slots"),
    [
        (TaskResources(cpus=2), 4 + 1),
        (TaskResources(cpus=2, gpus=1), 2),
        (TaskResources(cpus=1, gpus=0, memory_bytes=6), 3),
        (TaskResources(cpus=9), 0),
    ],
)
def test_tasks_do_not_share_what_nodes_cannot_give_twice(wanted: TaskResources, slots: int) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0, "memory": 13.0}, {"CPU": 3.0, "memory": 6.0}, {}]
    assert fitting(nodes, wanted) == slots
