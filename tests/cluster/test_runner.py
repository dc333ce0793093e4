"""What travels to tasks and back."""

import pickle

import pytest

from mbq.artifacts import errors
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import Call, InputLost, TaskCrashed
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
