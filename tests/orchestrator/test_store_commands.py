"""`pull`, `verify` and `gc` as a user meets them."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mbq.artifacts import keys, s3_client
from mbq.artifacts.garbage import GRACE_SECONDS
from mbq.artifacts.runs import put_blob
from mbq.artifacts.store import LocalStore
from mbq.orchestrator.submit import prepare, read_spec
from tests.support.servers import Server


def _line(result: Result, code: int) -> str:
    """The one line of an error."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("mbq-cluster")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_pulls_and_verifies_by_any_name(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    run, store = finished_run.document.run, finished_run.store.uri
    names = [
        (run, "--store", store),
        (run[:6], "--store", store),
        (f"{store}/runs/{run}",),
        (f"{finished_run.store.root}/runs/{run}",),
        (f"{store}/runs/{run}/checkpoint",),
        (str(finished_run.checkpoint),),
    ]
    for number, (name, *options) in enumerate(names):
        folder = str(tmp_path / str(number))
        pulled = invoke("pull", name, folder, *options)
        assert pulled.exit_code == 0, pulled.output
        assert pulled.stdout == ""
        assert f"8 bits in {folder}: " in pulled.stderr
        assert invoke("verify", folder).stdout == f"{folder} is what its manifest says\n"
        assert invoke("verify", name, *options).exit_code == 0


def test_verify_names_every_fault(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished_run.checkpoint, tmp_path / "copy"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model-routing.safetensors").unlink()
    result = invoke("verify", str(folder))
    assert "2 of" in _line(result, 1)
    assert "tokenizer.json: it has 2 bytes" in result.stderr
    assert "model-routing.safetensors: it is missing" in result.stderr
    assert invoke("pull", str(finished_run.checkpoint), str(folder)).exit_code == 0
    assert invoke("verify", str(folder)).exit_code == 0


def test_what_cannot_be_pulled(
    invoke: Callable[..., Result], finished_run: Any, tiny_model: Path, tmp_path: Path
) -> None:
    source, folder = str(finished_run.checkpoint), str(tmp_path / "dir")
    for bits in ("3", "5"):
        assert "2, 4, 6, 8 bits" in _line(invoke("pull", source, folder, "--max-bits", bits), 2)
    assert "holds no manifest.json" in _line(invoke("pull", str(tiny_model), folder), 3)
    assert "there is no run" in _line(invoke("pull", "abcdef", folder), 3)
    assert "another model" in _line(invoke("pull", source, str(tiny_model)), 2)
    assert not Path(folder).exists()


def test_gc_says_what_and_how_much(invoke: Callable[..., Result], tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    dead = keys.blob_key(put_blob(store, [bytes(12_345)]).sha256)
    long_ago = time.time() - 2 * GRACE_SECONDS
    os.utime(store.path(dead), (long_ago, long_ago))
    young = keys.blob_key(put_blob(store, [b"young"]).sha256)
    dry = invoke("gc", store.uri, "--dry-run")
    assert dry.stdout.split()[:2] == ["12,345", dead]
    assert "12,345  bytes in 1 objects would be removed from" in dry.stdout
    assert store.stat(dead) is not None
    assert "12,345  bytes in 1 objects removed from" in invoke("gc", store.uri).stdout
    assert store.stat(dead) is None
    assert store.read(young) == b"young"


def test_runs_from_object_storage_are_the_same_runs(
    tiny_document: Callable[..., dict[str, Any]],
    start_server: Callable[[str], Server],
    connect: Callable[..., Any],
    tmp_path: Path,
) -> None:
    store = connect(start_server("rclone"))
    document = tiny_document()
    local = tmp_path / "local.json"
    local.write_text(json.dumps(document))
    for path in Path(document["model"]["source"]).iterdir():
        store.put(f"model/{path.name}", [path.read_bytes()])
    store.put("text.txt", [Path(document["calibration"]["files"][0]).read_bytes()])
    document["model"]["source"] = f"{store.uri}/model"
    for section in ("calibration", "evaluation"):
        document[section]["files"] = [f"{store.uri}/text.txt"]
    remote = tmp_path / "remote.json"
    remote.write_text(json.dumps(document))
    ours, theirs = (prepare(*read_spec(str(path), ())).document for path in (local, remote))
    assert ours.run == theirs.run
    assert ours.model_files == theirs.model_files
    assert (ours.calibration_tokens, ours.evaluation_tokens) == (
        theirs.calibration_tokens,
        theirs.evaluation_tokens,
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("model.source=s3://no-such-bucket-here/model", "no-such-bucket-here"),
        ("model.source=s3://mbq/nothing", "there is no config.json in s3://mbq/nothing"),
        ("calibration.files=[s3://mbq/no/text.txt]", "there is no s3://mbq/no/text.txt"),
        ("calibration.files=[s3://mbq]", "names no object"),
        ("store=s3://", "write s3://bucket/prefix"),
        ("store=s3://no-such-bucket-here", "no-such-bucket-here"),
    ],
)
def test_wrong_places_in_object_storage_are_one_line(
    invoke: Callable[..., Result],
    tiny_document: Callable[..., dict[str, Any]],
    start_server: Callable[[str], Server],
    connect: Callable[..., Any],
    tmp_path: Path,
    setting: str,
    words: str,
) -> None:
    connect(start_server("rclone"))
    spec = tmp_path / "spec.yaml"
    spec.write_text(json.dumps(tiny_document()))
    line = _line(invoke("submit", str(spec), "--set", setting), 2)
    assert words in line
    assert not (tmp_path / "home").exists()


def test_missing_credentials_and_silent_servers_are_one_line(
    invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    s3_client._make_client.cache_clear()
    assert "Unable to locate credentials" in _line(invoke("list", "--store", "s3://mbq/x"), 2)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    s3_client._make_client.cache_clear()
    result = invoke("list", "--store", "s3://mbq/x")
    assert "cannot list s3://mbq/x/runs" in _line(result, 1)
    assert "very-secret" not in result.output
