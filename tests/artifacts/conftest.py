"""Stores behind a proxy that makes faults, servers that a test may kill, checkpoints to damage."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts.s3 import S3Store
from mbq.artifacts.store import LocalStore
from tests.support import servers
from tests.support.faulty import BASE, LOWER, UPPER, Linked, pack, upload
from tests.support.proxy import Proxy
from tests.support.servers import Server


@pytest.fixture
def linked(start_server: Callable[[str], Server], connect: Callable[..., S3Store]) -> Iterator[Any]:
    """A store behind a proxy; an empty one, unless it is given a prefix."""
    with ExitStack() as stack:

        def link(server: str | Server, prefix: str = "", **changes: Any) -> tuple[S3Store, Proxy]:
            server = start_server(server) if isinstance(server, str) else server
            proxy = stack.enter_context(Proxy(server.endpoint))
            return replace(connect(server, proxy, prefix), **changes), proxy

        yield link


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """A server that a test may kill."""
    with ExitStack() as stack:

        def start(name: str) -> Server:
            if reason := servers.missing(name):
                pytest.skip(reason)
            server = servers.start(name, tmp_path / f"{name}-server", durable=True)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("packed"), {BASE: 0, LOWER: 2, UPPER: 0})


@pytest.fixture
def shared(linked: Linked, synthetic: Path) -> Linked:
    """The packed checkpoint on rclone, behind a proxy; not to be written to."""

    def share(**changes: Any) -> tuple[S3Store, Proxy]:
        store, proxy = linked("rclone", prefix=synthetic.parent.name, **changes)
        if store.stat("manifest.json") is None:
            upload(synthetic, store)
        return store, proxy

    return share


@pytest.fixture
def packed(finished_run: Any, tmp_path: Path) -> LocalStore:
    """A copy of the packed checkpoint, in a folder with nothing else in it."""
    return LocalStore(Path(shutil.copytree(finished_run.checkpoint, tmp_path / "in" / "packed")))


@pytest.fixture(scope="module")
def shelf(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """The same for all examples of a property; whoever damages a file puts it back."""
    folder = tmp_path_factory.mktemp("shelf") / "packed"
    return LocalStore(Path(shutil.copytree(finished_run.checkpoint, folder)))
