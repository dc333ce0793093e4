"""Which cluster is asked, and for how long; without any Ray."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from mbq.artifacts.errors import ClusterError, InputError
from mbq.cluster import jobs
from mbq.cluster.jobs import Jobs


class _Dashboard(HTTPServer):
    """Answers what it is told to, the rest with 404, and remembers that it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.answers: dict[str, Any] = {}
        self.refusals: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Dashboard)
        self.server.asked += 1
        if self.path not in self.server.answers:
            self.send_error(404)
            return
        answer = json.dumps(self.server.answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_POST(self) -> None:
        assert isinstance(self.server, _Dashboard)
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        refusals = self.server.refusals
        refused = bool(refusals)
        name = json.loads(sent)["submission_id"]
        given = {"submission_id": name, "job_id": name}
        answer = refusals.pop(0).encode() if refused else json.dumps(given).encode()
        self.send_response(500 if refused else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboards() -> Iterator[list[_Dashboard]]:
    servers = [_Dashboard(), _Dashboard()]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield servers
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_the_address_given_is_the_one_asked(
    dashboards: list[_Dashboard], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    given, other = dashboards
    monkeypatch.setenv(variable, other.address)
    with pytest.raises(InputError, match=f"cannot reach {given.address}"):
        Jobs(given.address)
    assert given.asked > 0
    assert other.asked == 0


def test_a_dashboard_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(InputError, match="check --address"):
            Jobs(address)
        with pytest.raises(InputError, match="mbq-cluster head stop"):
            Jobs(address, {})


def _job(submission: str, status: str, store: str) -> dict[str, Any]:
    return {
        "type": "SUBMISSION",
        "submission_id": submission,
        "status": status,
        "entrypoint": "python",
        "metadata": {"run": "0123456789ab", "store": store},
    }


def test_each_of_two_stores_has_its_own_attempts_at_a_run(dashboards: list[_Dashboard]) -> None:
    dashboard, _ = dashboards
    run = "0123456789ab"
    dashboard.answers = {
        "/api/version": {"ray_version": "2.50.0"},
        "/api/jobs/": [
            _job(f"mbq-{run}-a10", "RUNNING", "file:///ours"),
            _job(f"mbq-{run}-a11", "FAILED", "file:///theirs"),
            _job(f"mbq-{run}-a9", "FAILED", "file:///ours"),
            _job("mbq-ba9876543210-a12", "RUNNING", "file:///ours"),
            _job("somebody-else", "RUNNING", "file:///ours"),
        ],
    }
    cluster = Jobs(dashboard.address)
    ours, theirs = (cluster.latest(run, f"file:///{store}") for store in ("ours", "theirs"))
    assert ours is not None and theirs is not None
    assert (ours.attempt, ours.alive) == (10, True)
    assert (theirs.attempt, theirs.alive) == (11, False)
    assert cluster.latest(run, "file:///another") is None
    # An attempt's number is that of its job, and so taken in every store.
    assert cluster.attempts(run) == 11


def test_a_cluster_that_has_just_come_up_is_asked_again(
    dashboards: list[_Dashboard], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.0)
    dashboard, _ = dashboards
    dashboard.answers = {"/api/version": {"ray_version": "2.50.0"}}
    cluster = Jobs(dashboard.address)
    dashboard.refusals = ["No available agent to submit job, please try again later."] * 2
    cluster.submit("0123456789ab", 1, ["true"], {}, {})
    assert not dashboard.refusals
    dashboard.refusals = ["there is a job of that name"] * 2
    with pytest.raises(ClusterError, match=r"refused the job: .*there is a job of that name"):
        cluster.submit("0123456789ab", 2, ["true"], {}, {})
    assert len(dashboard.refusals) == 1
