"""The command line as a user meets it, without any cluster."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from click.testing import Result

from mbq.artifacts import keys
from mbq.artifacts.documents import Status
from mbq.artifacts.sealed import put_document
from mbq.artifacts.store import LocalStore
from mbq.orchestrator import submit as submitting
from mbq.orchestrator.cli import main
from tests.support.commands import fails

Make = Callable[..., dict[str, Any]]
ROOT = Path(__file__).parents[2]


def _put_status(store: LocalStore, run: str, state: Literal["running", "failed"]) -> None:
    now = time.time()
    status = Status(
        run=run,
        attempt=1,
        state=state,
        blocks_done=1,
        blocks_total=3,
        fraction=0.5,
        seconds_left=None,
        running=(),
        failures=(),
        started_at=now,
        updated_at=now,
    )
    put_document(store, keys.status_key(run), status)


def test_presets_name_models_on_the_hub(invoke: Callable[..., Result]) -> None:
    # Tests run offline: the model cannot be looked up, and the message says where to go.
    fails(invoke("check", "llama2-13b"), 2, "meta-llama/Llama-2-13b-hf", "local folder")


def test_check_says_what_a_run_takes_and_writes_nothing(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    tmp_path: Path,
) -> None:
    path = spec(tiny_document())
    text = invoke("check", path)
    assert text.exit_code == 0
    assert "3 blocks, 92,160 weights to quantize" in text.stdout
    found = json.loads(invoke("check", path, "--json").stdout)
    assert found["calibration_tokens"] == 12 * 32
    assert found["run"] in text.stdout
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_runs_are_found_by_prefix_and_uri(invoke: Callable[..., Result], finished_run: Any) -> None:
    store, run = finished_run.store, finished_run.document.run
    uris = (f"{store.uri}/runs/{run}", f"{store.root}/runs/{run}/")
    found = [json.loads(invoke("status", uri, "--json").stdout) for uri in uris]
    by_prefix = invoke("status", run[:4], "--store", str(store.root), "--json")
    found.append(json.loads(by_prefix.stdout))
    assert [f["run"] for f in found] == [run] * 3
    assert found[0]["state"] == "done"
    assert len(found[0]["results"]["rows"]) == 15
    environment = invoke("status", run, MBQ_STORE=str(store.root))
    assert "perplexity ±" in environment.stdout
    assert str(finished_run.checkpoint) in environment.stdout


def test_list_shows_every_run(invoke: Callable[..., Result], finished_run: Any) -> None:
    result = invoke("list", "--store", str(finished_run.store.root))
    assert finished_run.document.run in result.stdout
    assert "3/3" in result.stdout
    assert invoke("list", "--json").stdout == "[]\n"


def test_list_tells_an_empty_store_from_none(invoke: Callable[..., Result], tmp_path: Path) -> None:
    store = tmp_path / "store"
    fails(invoke("list", "--store", str(store)), 3, f"there is no folder {store}")
    fails(invoke("list", "--json", MBQ_STORE=str(store)), 3, f"there is no folder {store}")
    store.mkdir()
    assert invoke("list", "--store", str(store), "--json").stdout == "[]\n"
    file = store / "file"
    file.write_text("")
    fails(invoke("list", "--store", str(file)), 2, f"{file} is not a folder")


def test_runs_that_are_not_there_or_not_unique(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    for command in ("status", "watch", "logs", "stop", "resume"):
        fails(invoke(command, "0123"), 3, "there is no run 0123", "mbq-cluster list")
    fails(invoke("status", "/somewhere/else/abc"), 2, "<store>/runs/<id>")
    store = LocalStore(tmp_path / "store")
    for run in ("aa0000000000", "aa1111111111"):
        store.put(f"runs/{run}/spec.json", [b"{}"])
    fails(invoke("status", "aa", "--store", str(store.root)), 2, "is the start of 2 runs")
    fails(invoke("status", "aa0", "--store", str(store.root)), 1, "is not as it was written")
    store.put("runs/aa0000000000/spec.json", [b'{"format_version": 1, "code_version": "0.1.0"}'])
    fails(invoke("status", "aa0", "--store", str(store.root)), 1, "has format 1", "0.1.0")
    # One run that cannot be read does not hide the others.
    listed = invoke("list", "--store", str(store.root), "--json")
    assert (listed.exit_code, json.loads(listed.stdout)) == (0, [])
    assert len(listed.stderr.strip().splitlines()) == 2


def test_commands_that_need_a_head_say_that_there_is_none(
    invoke: Callable[..., Result], finished_run: Any
) -> None:
    store = str(finished_run.store.root)
    run = finished_run.document.run
    fails(invoke("head", "status"), 3, "no local Ray is running")
    fails(invoke("head", "stop"), 3, "no local Ray is running")
    fails(invoke("logs", run, "--store", store), 3, "no cluster")
    fails(invoke("stop", run, "--store", store), 3, "is done: there is nothing to stop")


def test_finished_work_needs_no_cluster(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    finished_run: Any,
    tmp_path: Path,
) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    for command in (("submit", spec(tiny_document())), ("resume", run)):
        result = invoke(*command, "--store", store)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{run}\n"
        assert result.stderr == f"run {run} is already finished\n"
    assert os.listdir(tmp_path) == ["spec.yaml"]


def test_watch_of_a_finished_run_prints_its_table(
    invoke: Callable[..., Result], finished_run: Any
) -> None:
    result = invoke("watch", finished_run.document.run, "--store", str(finished_run.store.root))
    assert result.exit_code == 0
    assert "ROUND TO NEAREST" in result.stdout


def test_a_report_goes_where_it_is_told(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    run, store = finished_run.document.run, ("--store", str(finished_run.store.root))
    path = tmp_path / "report of mine.html"
    assert invoke("report", run[:6], "--out", str(path), *store).stdout == f"{path}\n"
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and run in page
    with contextlib.chdir(tmp_path):
        assert invoke("report", run[:6], *store).stdout == f"{run}.html\n"
    assert (tmp_path / f"{run}.html").read_text(encoding="utf-8") == page
    nowhere = str(tmp_path / "no" / "folder.html")
    fails(invoke("report", run, "--out", nowhere, *store), 2, "--out", nowhere)


def test_watching_finished_work_prints_its_table_beside_the_id(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    finished_run: Any,
) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    for command in (("submit", spec(tiny_document())), ("resume", run)):
        result = invoke(*command, "--store", store, "--watch")
        assert result.exit_code == 0, result.output
        # Scripts read the id.
        assert result.stdout == f"{run}\n"
        assert "ROUND TO NEAREST" in result.stderr
        assert f"checkpoint: {finished_run.checkpoint}" in result.stderr


def test_a_run_goes_on_when_nobody_watches(
    invoke: Callable[..., Result],
    write_run: Callable[..., Any],
    tiny_document: Make,
    store: LocalStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = write_run(store, tiny_document()).run
    _put_status(store, run, "running")

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    # Between two looks at the store.
    monkeypatch.setattr(time, "sleep", interrupt)
    # What it says can be typed as it stands, with the store where no command would look for it.
    for result, typed in (
        (invoke("watch", run, "--store", store.uri), f"{store.uri}/runs/{run}"),
        (invoke("watch", run, MBQ_STORE=str(store.root)), run),
        (
            invoke("watch", run, "--store", store.uri, MBQ_STORE="foo://x"),
            f"{store.uri}/runs/{run}",
        ),
    ):
        fails(
            result, 1, f"run {run} goes on", f"`mbq-cluster watch {typed}`",
            f"`mbq-cluster stop {typed}`",
        )  # fmt: skip


def test_watch_prints_json_alone(invoke: Callable[..., Result], finished_run: Any) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    result = invoke("watch", run, "--store", store, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["run"], found["state"], found["detail"]) == (run, "done", "")
    assert len(found["results"]["rows"]) == 15
    assert found["status"]["blocks_done"] == 3


def test_an_unfinished_run_has_nothing_to_fetch(
    invoke: Callable[..., Result],
    write_run: Callable[..., Any],
    tiny_document: Make,
    store: LocalStore,
    tmp_path: Path,
) -> None:
    run = write_run(store, tiny_document()).run
    folder = tmp_path / "pulled"
    for command in (("pull", run, str(folder)), ("bench", run), ("verify", run), ("report", run)):
        result = invoke(*command, "--store", store.uri)
        fails(result, 3, f"run {run} has no checkpoint yet", f"watch {store.uri}/runs/{run}`")
    _put_status(store, run, "failed")
    for command in (("pull", run, str(folder)), ("bench", run), ("verify", run), ("report", run)):
        result = invoke(*command, "--store", store.uri)
        fails(
            result,
            3,
            f"run {run} is failed and has no checkpoint",
            f"mbq-cluster resume {store.uri}/runs/{run}`",
        )
    assert not folder.exists()


def test_the_demo_preset_finds_its_model(invoke: Callable[..., Result], tmp_path: Path) -> None:
    # From any folder: its paths are relative to its own file.
    with contextlib.chdir(tmp_path):
        result = invoke("check", "demo", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["model"] == "demo"
    assert found["calibration_tokens"] == 64 * 256
    # Six blocks: q and o; k and v of half the heads; gate, up and down.
    assert found["quantized_weights"] == 6 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 768 * 256)


def test_which_store_wins(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """--store, then MBQ_STORE, then the spec's, then the default."""
    used: list[str] = []
    monkeypatch.setattr(submitting, "submit", lambda prepared, store, *_: used.append(store.uri))
    option, variable, own = ((tmp_path / name).as_uri() for name in ("option", "variable", "own"))
    bare, with_store = tiny_document(), tiny_document(store=own)
    said = [
        invoke("submit", spec(with_store), "--store", option, MBQ_STORE=variable).stderr,
        invoke("submit", spec(with_store), MBQ_STORE=variable).stderr,
        invoke("submit", spec(with_store)).stderr,
        invoke("submit", spec(bare), MBQ_STORE=variable).stderr,
        invoke("submit", spec(bare)).stderr,
    ]
    default = (tmp_path / "home" / "store").as_uri()
    assert used == [option, variable, own, variable, default]
    # Where commands that know no spec would not look, it says so.
    assert [f"{own}/runs/" in text for text in said] == [False, False, True, False, False]


def test_check_takes_the_store_that_submit_would(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    tmp_path: Path,
) -> None:
    path = spec(tiny_document(store="gs://bucket/runs"))
    fails(invoke("check", path), 2, "gs://bucket/runs")
    assert invoke("check", path, MBQ_STORE=str(tmp_path)).exit_code == 0
    fails(invoke("check", path, "--store", "gs://other", MBQ_STORE=str(tmp_path)), 2, "gs://other")


def test_check_tries_store_and_cluster_and_makes_nothing(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    tmp_path: Path,
) -> None:
    path, file, folder = spec(tiny_document()), tmp_path / "file", tmp_path / "later"
    file.touch()
    fails(invoke("check", path, "--store", str(file)), 2, str(file), "not a folder")
    nobody = ("--address", "http://127.0.0.1:1")
    fails(invoke("check", path, *nobody), 2, "cannot reach http://127.0.0.1:1")
    assert invoke("check", path, "--store", str(folder)).exit_code == 0
    assert not folder.exists()


def test_other_commands_take_the_option_before_the_variable(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    found = invoke("status", run, "--store", store, "--json", MBQ_STORE=str(tmp_path / "other"))
    assert json.loads(found.stdout)["run"] == run
    fails(invoke("status", run, "--store", str(tmp_path / "other"), MBQ_STORE=store), 3, run)


@pytest.mark.parametrize("command", [("list",), ("status", "0123"), ("check", "demo")])
def test_the_address_of_the_environment_is_checked_too(
    invoke: Callable[..., Result], command: tuple[str, ...]
) -> None:
    fails(invoke(*command, MBQ_ADDRESS="ray://x"), 2, "ray://x", "http://host:8265")


def test_help_waits_for_no_heavy_import_and_lists_every_command() -> None:
    script = """
import sys
from mbq.orchestrator.cli import main
from tests.support.commands import fails
main(["--help"], standalone_mode=False)
print([name for name in ("torch", "ray", "transformers", "numpy", "boto3") if name in sys.modules])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    commands = (
        "bench",
        "check",
        "eval",
        "gc",
        "list",
        "logs",
        "pull",
        "report",
        "resume",
        "submit",
    )
    assert all(f"  {command} " in done.stdout for command in commands)


def test_the_options_are_these(invoke: Callable[..., Result]) -> None:
    """Growing the command line is a decision: knobs of a run belong into the spec."""
    options = {
        name: sorted(p.opts[0] for p in command.params if p.param_type_name == "option")
        for name, command in main.commands.items()
    }
    shared = ["--address", "--store"]
    text = ["--average-bits", "--bits", "--dataset", "--file"]
    assert options == {
        "bench": ["--json", "--store"],
        "check": ["--address", "--json", "--set", "--store"],
        "eval": [*text, "--json", "--sequence-length", "--store", "--tokens"],
        "gc": ["--dry-run"],
        "head": [],
        "list": ["--address", "--json", "--store"],
        "logs": shared,
        "pull": ["--max-bits", "--store"],
        "report": ["--out", "--store"],
        "resume": [*shared, "--watch"],
        "status": ["--address", "--json", "--store"],
        "stop": shared,
        "submit": ["--address", "--set", "--store", "--watch"],
        "verify": ["--store"],
        "watch": ["--address", "--json", "--store"],
    }


def test_an_interrupted_demo_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("MBQ_HOME", str(tmp_path))
    # The demo waits for its commands nearly all of the time.
    monkeypatch.setattr(subprocess, "Popen", interrupt)
    with pytest.raises(SystemExit, match="interrupted; start it again"):
        runpy.run_path(str(ROOT / "examples" / "demo" / "run.py"), run_name="__main__")
