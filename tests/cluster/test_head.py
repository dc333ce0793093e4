"""Which process is taken for the head that we started; without any Ray."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mbq.artifacts.errors import ClusterError
from mbq.cluster import head as heads
from mbq.cluster.head import Head, find_head, stop_head


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that says back what it hears, in a group of its own like a head."""
    pipe = subprocess.PIPE
    with subprocess.Popen(["cat"], stdin=pipe, stdout=pipe, start_new_session=True) as process:
        yield process
        process.kill()


@pytest.fixture
def head(tmp_path: Path, process: "subprocess.Popen[bytes]") -> Head:
    """A head of the process's number that started right after the machine."""
    session = tmp_path / "session"
    session.mkdir()
    return Head("http://127.0.0.1:1", process.pid, "1", str(session), str(tmp_path / "token"))


def _write(folder: Path, head: Head) -> None:
    (folder / "head.json").write_text(json.dumps(asdict(head)), encoding="utf-8")


def test_a_process_that_started_at_another_time_is_no_head(tmp_path: Path, head: Head) -> None:
    _write(tmp_path, head)
    assert find_head(tmp_path) is None
    alive = replace(head, started=heads._start_time(head.pid))
    _write(tmp_path, alive)
    assert find_head(tmp_path) == alive


def test_a_head_whose_starter_was_killed_is_ended_by_the_next(
    tmp_path: Path, head: Head, process: "subprocess.Popen[bytes]"
) -> None:
    alive = replace(head, started=heads._start_time(head.pid))
    (tmp_path / "starting.json").write_text(json.dumps(asdict(alive)), encoding="utf-8")
    # It may not answer yet: nobody is sent to it.
    assert find_head(tmp_path) is None
    heads._end_what_is_left(tmp_path)
    assert process.wait(timeout=10)
    assert os.listdir(tmp_path) == []


def test_a_head_is_written_down_before_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[Head | None] = []

    def give_up(*arguments: object) -> None:
        known.append(heads._read(tmp_path / "starting.json"))
        raise ClusterError("it does not answer")

    monkeypatch.setattr(heads, "_await_jobs_api", give_up)
    with pytest.raises(ClusterError):
        heads.start_head(tmp_path)
    (head,) = known
    assert head is not None
    assert not Path(head.session_folder).exists()
    assert find_head(tmp_path) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "127.0.0.1"),
        ("a.example, .b", "a.example,.b,127.0.0.1"),
        ("x,127.0.0.1", "x,127.0.0.1"),
        ("*", "*"),
    ],
)
def test_a_proxy_is_not_asked_for_this_machine(
    head: Head, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setenv("NO_PROXY", before)
    monkeypatch.delenv("no_proxy", raising=False)
    environment = heads.client_environment(head)
    assert environment["no_proxy"] == environment["NO_PROXY"] == after


def test_stopping_a_head_that_is_gone_hurts_nobody(
    tmp_path: Path, head: Head, process: "subprocess.Popen[bytes]"
) -> None:
    _write(tmp_path, head)
    stop_head(tmp_path, head)
    assert process.communicate(b"alive") == (b"alive", None)
    assert process.returncode == 0
    assert not (tmp_path / "head.json").exists()
    assert not Path(head.session_folder).exists()
