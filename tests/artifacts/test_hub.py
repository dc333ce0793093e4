"""Models of the Hub, against a small server that speaks the Hub's protocol on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """Serves one folder as `team/tiny`; `team/gated` needs a licence; nothing else exists."""

    folder: Path

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        parts = unquote(self.path).split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[2:4] == ["team", "tiny"]:
            names = [{"rfilename": path.name} for path in self.folder.iterdir()]
            document = {"id": "team/tiny", "sha": COMMIT, "siblings": names}
            self._send(200, json.dumps(document).encode(), body)
        elif "gated" in parts:
            self._send(403, b"", body, {"X-Error-Code": "GatedRepo"})
        elif parts[:3] == ["team", "tiny", "resolve"] and parts[3] == COMMIT:
            path = self.folder / parts[4]
            if path.is_file():
                self._send(200, path.read_bytes(), body, {"X-Repo-Commit": COMMIT})
            else:
                self._send(404, b"", body, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _send(
        self, code: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        wanted = self.headers.get("Range", "")
        if code == 200 and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, code = data[int(first) : int(last) + 1 if last else None], 206
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{len(data)}-{hash(data) & 0xFFFFFFFF:x}"')
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def hub(tiny_model: Path) -> Iterator[str]:
    handler = type("Hub", (_Hub,), {"folder": tiny_model})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def _python(hub: str, home: Path, script: str, **environment: str) -> Any:
    """Run a script in a process of its own: the Hub's client reads its address when imported."""
    hub_environment = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", "import json\n" + script],
        env=os.environ | hub_environment | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_DESCRIBE = """
from mbq.artifacts.source import open_source
source = open_source({model!r}, "main")
found = {{name: [e.dtype, list(e.shape)] for name, e in source.tensors.items()}}
complete = sorted(source.weight_map) == sorted(found)
print(json.dumps([source.revision, source.digest, complete, found]))
"""

_REFUSE = """
from mbq.artifacts.errors import MbqError
from mbq.artifacts.source import open_source
try:
    open_source({model!r}, "main").tensors
except MbqError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def test_a_repository_is_what_its_commit_is(hub: str, tiny_model: Path, tmp_path: Path) -> None:
    revision, digest, complete, found = _python(hub, tmp_path, _DESCRIBE.format(model="team/tiny"))
    local = _python(hub, tmp_path, _DESCRIBE.format(model=str(tiny_model)))
    assert revision == COMMIT
    assert digest == f"team/tiny@{COMMIT}"
    assert complete
    assert found == local[3]


def test_blocks_are_read_from_the_hub(hub: str, tiny_model: Path, tmp_path: Path) -> None:
    script = """
import torch
from mbq.artifacts.source import Source, open_source
from mbq.workers.model import open_model
sums = []
for source in (open_source("team/tiny", "main"), Source({folder!r})):
    model = open_model(source, torch.float32, torch.device("cpu"))
    sums.append([p.double().sum().item() for p in model.block(1).parameters()])
    assert source.read("chat_template.jinja") is None
print(json.dumps(sums))
"""
    ours, local = _python(hub, tmp_path, script.format(folder=str(tiny_model)))
    assert ours == local


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("team/gated", ("is gated", "accept its licence", "hf auth login")),
        ("team/other", ("the Hub has no team/other", "check both names")),
    ],
)
def test_refusals_are_explained(
    hub: str, tmp_path: Path, model: str, words: tuple[str, ...]
) -> None:
    kind, message = _python(hub, tmp_path, _REFUSE.format(model=model))
    assert kind == "InputError"
    assert all(word in message for word in words), message


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    kind, message = _python("http://127.0.0.1:9", tmp_path, _REFUSE.format(model="team/tiny"))
    assert kind == "InputError"
    assert "check the network" in message


def test_a_failing_network_is_not_a_missing_file(hub: str, tmp_path: Path) -> None:
    script = """
from mbq.artifacts.errors import StoreError
from mbq.artifacts.source import Source
try:
    Source("team/tiny", "{commit}").read("tokenizer.json")
except StoreError as error:
    print(json.dumps(str(error)))
"""
    # Offline, the client says so at once instead of trying again and again.
    message = _python(hub, tmp_path, script.format(commit=COMMIT), HF_HUB_OFFLINE="1")
    assert "cannot reach the Hub" in message
