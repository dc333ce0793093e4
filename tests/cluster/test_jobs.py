"""Which cluster is asked, and for how long; without any Ray."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mbq.artifacts.errors import InputError
from mbq.cluster import jobs
from mbq.cluster.jobs import Jobs


class _Dashboard(HTTPServer):
    """Answers everything with 404 and remembers that it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Dashboard)
        self.server.asked += 1
        self.send_error(404)

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
