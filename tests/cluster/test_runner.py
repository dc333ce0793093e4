"""The runner that runs everything here, and what travels to tasks."""

import pickle

import pytest

from mbq.artifacts import errors
from mbq.artifacts.store import LocalStore
from mbq.cluster.runner import Call, InputLost, LocalRunner, TaskCrashed, TaskResources
from mbq.workers import tasks

ONE = TaskResources(cpus=1)


def _add(a: int, b: int, report: object) -> int:
    return a + b


def _fail(report: object) -> None:
    raise errors.StoreError("the disk is full")


def _half(report: object) -> None:
    report(0.5)  # type: ignore[operator]


def test_handles_stand_for_results() -> None:
    runner = LocalRunner()
    first = runner.submit(Call("first", _add, (1, 2)), ONE)
    second = runner.submit(Call("second", _add, (first, 10)), ONE)
    assert runner.wait([first, second], 0.0) == [first, second]
    assert runner.result(second) == 13


def test_errors_wait_for_whoever_asks() -> None:
    runner = LocalRunner()
    handle = runner.submit(Call("fail", _fail, ()), ONE)
    with pytest.raises(errors.StoreError, match="the disk is full"):
        runner.result(handle)
    with pytest.raises(errors.StoreError):
        runner.outcome(handle)


def test_progress_is_by_name() -> None:
    runner = LocalRunner()
    runner.submit(Call("half", _half, ()), ONE)
    assert runner.progress() == {"half": 0.5}


def test_offers_no_gpu() -> None:
    assert LocalRunner().slots(TaskResources(cpus=1, gpus=1)) == 0


@pytest.mark.parametrize(
    "value",
    [
        tasks.Job("file:///store", "0123456789ab", "cpu"),
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
