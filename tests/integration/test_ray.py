"""Real runs on a real local Ray, killed in every way a cluster dies.

Each run lives in a store of its own; all of them are the same work, so all manifests must be equal
to that of the run nobody disturbed.
"""

import hashlib
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbq.artifacts import keys, s3_client
from mbq.artifacts.documents import Status
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.sealed import get_document
from mbq.artifacts.store import LocalStore, Store, open_store
from mbq.cluster.head import find_head
from tests.support.servers import BUCKET, NAMES, Server

_PATIENCE_SECONDS = 180.0
BLOCKS = 5
_PROGRAM = str(Path(sys.executable).with_name("mbq-cluster"))


@dataclass(frozen=True)
class User:
    """Somebody with a shell, a spec and a folder for heads."""

    home: Path
    spec: Path

    @property
    def head(self) -> Path:
        """The state of its local Ray."""
        return self.home / "head" / platform.node()

    def run(self, *arguments: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"MBQ_HOME": str(self.home)}
        command = [_PROGRAM, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}"
        return done

    def submit(self, store: Store, *arguments: str) -> str:
        done = self.run("submit", str(self.spec), "--store", store.uri, *arguments)
        run = done.stdout.strip()
        assert len(run) == 12, done.stdout
        return run

    def status(self, store: Store, run: str) -> dict[str, Any]:
        done = self.run("status", run, "--store", store.uri, "--json")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def finish(self, store: Store, run: str) -> str:
        """Watch a run to its end; the digest of its manifest."""
        self.run("watch", run, "--store", store.uri)
        return hashlib.sha256(store.read(keys.manifest_key(run))).hexdigest()


@pytest.fixture(scope="module")
def user(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_document: Callable[..., dict[str, Any]],
    make_model: Callable[..., Path],
) -> Iterator[User]:
    home = Path(tempfile.mkdtemp(prefix="mbq-test-"))
    # Long enough to be killed in the middle.
    document = tiny_document(
        model={"source": str(make_model(num_hidden_layers=BLOCKS))},
        optimisation={"passes": 20, "batch_size": 4},
    )
    spec = tmp_path_factory.mktemp("spec") / "tiny.yaml"
    spec.write_text(yaml.safe_dump(document))
    user = User(home, spec)
    yield user
    user.run("head", "stop")
    assert not (user.head / "head.json").exists()
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def undisturbed(user: User, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Manifest digest of a run with one worker that nobody disturbed."""
    store = LocalStore(tmp_path_factory.mktemp("undisturbed"))
    run = user.submit(store, "--set", "resources.workers=1")
    return user.finish(store, run)


def _until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{condition} did not come true in {_PATIENCE_SECONDS} s")


def _records(store: Store, run: str) -> dict[int, bytes]:
    found = {}
    for block in range(BLOCKS):
        if store.stat(keys.block_key(run, block)) is not None:
            found[block] = store.read(keys.block_key(run, block))
    return found


def _processes(*words: str, session: int | None = None) -> list[int]:
    """Pids of processes whose command line holds all the words, of one session if it is given."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            pid = int(entry.name)
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                ours = session is None or os.getsid(pid) == session
            except OSError:
                continue
            if ours and all(word in line for word in words):
                found.append(pid)
    return found


def _in_the_middle(store: Store, run: str) -> dict[int, bytes]:
    """Wait until some blocks are finished and others are not."""
    records: dict[int, bytes] = _until(lambda: _records(store, run))
    assert len(records) < BLOCKS, "the run was too fast to be disturbed"
    return records


def test_submits_from_nothing_and_shows_what_it_did(
    user: User, undisturbed: str, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store)
    again = user.run("submit", str(user.spec), "--store", store.uri)
    assert again.stdout.strip() == run
    # Or finished: the run takes as long as the command.
    assert f"run {run} is already " in again.stderr
    assert user.finish(store, run) == undisturbed
    found = user.status(store, run)
    assert found["state"] == "done"
    assert "inspect" not in user.run("logs", run, "--store", store.uri).stdout
    assert "already finished" in user.run("resume", run, "--store", store.uri).stderr
    assert store.stat(keys.spec_key(run))
    assert len(_records(store, run)) == BLOCKS


def test_a_killed_worker_costs_one_attempt(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store)
    head = find_head(user.head)
    assert head is not None
    # Tasks live in their Ray's session: those of another are let be.
    pids = _until(lambda: _processes("ray::tiny: calibrate", session=head.pid))
    os.kill(pids[0], signal.SIGKILL)
    assert user.finish(store, run) == undisturbed
    failures = user.status(store, run)["status"]["failures"]
    assert [f["task"].split()[0] for f in failures] == ["calibrate"]
    assert failures[0]["error"].startswith("TaskCrashed")
    assert not failures[0]["final"]


def test_a_killed_driver_is_resumed(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store)
    _in_the_middle(store, run)
    attempt = get_document(store, keys.status_key(run), Status).attempt
    for pid in _processes("mbq.orchestrator.run", store.uri):
        os.kill(pid, signal.SIGKILL)
    _until(lambda: user.status(store, run)["state"] == "interrupted")
    finished = _records(store, run)
    assert user.run("resume", run, "--store", store.uri).stdout.strip() == run
    assert user.finish(store, run) == undisturbed
    assert user.status(store, run)["status"]["attempt"] == attempt + 1
    # Not calibrated again: a record says when and how long.
    assert {block: _records(store, run)[block] for block in finished} == finished


def test_a_stopped_run_is_resumed(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store)
    finished = _in_the_middle(store, run)
    user.run("stop", run, "--store", store.uri)
    assert user.status(store, run)["state"] == "stopped"
    user.run("watch", run, "--store", store.uri, code=1)
    user.run("resume", run, "--store", store.uri)
    assert user.finish(store, run) == undisturbed
    assert {block: _records(store, run)[block] for block in finished} == finished


def test_a_killed_head_is_replaced(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store)
    _in_the_middle(store, run)
    head = json.loads((user.head / "head.json").read_text())
    os.killpg(head["pid"], signal.SIGKILL)
    _until(lambda: not _processes("ray::tiny: calibrate"))
    finished = _records(store, run)
    resumed = user.run("resume", run, "--store", store.uri)
    assert "starting a local Ray" in resumed.stderr
    assert user.finish(store, run) == undisturbed
    assert {block: _records(store, run)[block] for block in finished} == finished


def _use(server: Server, store: S3Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Credentials as processes on a node find them; returns where the tiny model's files are."""
    credentials = folder / "credentials"
    credentials.write_text(
        f"[mbq]\naws_access_key_id={server.access_key}\naws_secret_access_key={server.secret_key}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "mbq")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    s3_client._make_client.cache_clear()
    return f"s3://{BUCKET}/{store.prefix}-inputs"


@pytest.mark.parametrize("name", NAMES)
def test_everything_in_object_storage_gives_the_same_bytes(
    user: User,
    undisturbed: str,
    tmp_path: Path,
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    server = start_server(name)
    store = connect(server)
    uri = _use(server, store, tmp_path, monkeypatch)
    inputs = open_store(uri)
    spec = yaml.safe_load(user.spec.read_text())
    text = spec["calibration"]["files"][0]
    for path in (*Path(spec["model"]["source"]).iterdir(), Path(text)):
        inputs.put(path.name, [path.read_bytes()])
    files = f"[{uri}/{Path(text).name}]"
    settings = [f"model.source={uri}", f"calibration.files={files}", f"evaluation.files={files}"]
    run = user.submit(store, *(word for setting in settings for word in ("--set", setting)))
    _in_the_middle(store, run)
    for pid in _processes("mbq.orchestrator.run", store.uri):
        os.kill(pid, signal.SIGKILL)
    _until(lambda: user.status(store, run)["state"] == "interrupted")
    finished = _records(store, run)
    user.run("resume", run, "--store", store.uri)
    assert user.finish(store, run) == undisturbed
    assert {block: _records(store, run)[block] for block in finished} == finished

    folder = str(tmp_path / "pulled")
    user.run("pull", run, folder, "--max-bits", "4", "--store", store.uri)
    user.run("pull", f"{store.uri}/runs/{run}", folder)
    for target in (folder, f"{store.uri}/runs/{run}/checkpoint"):
        assert "is what its manifest says" in user.run("verify", target).stdout
    table = json.loads(user.run("eval", run, "--store", store.uri, "--bits", "4", "--json").stdout)
    rows = user.status(store, run)["results"]["rows"]
    (packed,) = (row["perplexity"] for row in rows if row["variant"] == "mbq-4")
    assert table[0]["perplexity"] == pytest.approx(packed, rel=1e-4)
    assert "0 objects" in user.run("gc", store.uri).stdout
    assert sum(1 for _ in store.walk("runs")) > BLOCKS
    assert not [v for k, v in os.environ.items() if server.secret_key in v]
    printed = user.run("logs", run, "--store", store.uri).stdout
    assert server.secret_key not in printed + store.read(keys.spec_key(run)).decode()


def test_a_node_without_credentials_says_so_before_any_work(
    user: User,
    undisturbed: str,
    start_server: Callable[[str], Server],
    connect: Callable[..., S3Store],
) -> None:
    # They are in the environment of this shell only; the local Ray was started without them.
    store = connect(start_server("rclone"))
    run = user.submit(store)
    failed = user.run("watch", run, "--store", store.uri, code=1)
    assert "head stop" in failed.stderr or "credentials" in failed.stderr
    assert _records(store, run) == {}


def test_the_head_lets_nobody_in_without_its_token(user: User, undisturbed: str) -> None:
    found = json.loads(user.run("head", "status", "--json").stdout)
    assert user.run("head", "start").stdout.strip() == found["address"]
    assert stat.S_IMODE(os.stat(found["token_file"]).st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{found['address']}/api/jobs/", timeout=10)


def test_a_proxy_is_not_asked_for_this_machine(
    user: User, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens there; a proxy that does would be told the token.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    user.run("head", "stop")
    user.run("head", "start")
    assert user.run("list").stderr == ""


def test_prometheus_sees_how_far_a_run_is(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    # Metrics leave a process every ten seconds.
    run = user.submit(store, "--set", "optimisation.passes=60")
    head = find_head(user.head)
    assert head is not None
    discovery = Path(head.session_folder) / "prom_metrics_service_discovery.json"
    label = f'run="{run}"'

    def exported() -> set[str]:
        """Names of the run's metrics at all of the cluster's endpoints."""
        names = set()
        for service in json.loads(discovery.read_text()):
            for target in service["targets"]:
                with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                    lines = answer.read().decode().splitlines()
                names |= {line.split("{")[0] for line in lines if label in line}
        return names

    quantities = ("blocks_done", "block_seconds", "block_loss", "bytes_stored")
    _until(lambda: exported() >= {f"ray_mbq_{quantity}" for quantity in quantities})
    user.run("stop", run, "--store", store.uri)


def test_a_task_that_fails_is_named(user: User, undisturbed: str, tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    run = user.submit(store, "--set", "optimisation.gain_rate=1e30")
    failed = user.run("watch", run, "--store", store.uri, code=1)
    assert "calibrate 000" in failed.stderr
    assert "lower the learning rates" in failed.stderr
    assert "resume" in user.run("logs", run, "--store", store.uri).stdout


def test_a_cluster_that_cannot_hold_the_plan_says_so(
    user: User, undisturbed: str, tmp_path: Path
) -> None:
    store = LocalStore(tmp_path)
    much = ("--set", "resources.memory_gib=100000")
    refused = user.run("submit", str(user.spec), "--store", store.uri, *much, code=2)
    assert "no node offers" in refused.stderr
    assert store.children(keys.RUNS) == []


GPU_TASKS = """
import os, ray
from mbq.cluster.ray_runner import RayRunner
from mbq.cluster.runner import Call, TaskResources

def process(report):
    return os.getpid(), ray.get_gpu_ids()

ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
runner = RayRunner()
for resources in (TaskResources(cpus=1, gpus=1), TaskResources(cpus=1)):
    handles = [runner.submit(Call(f"task {n}", process, ()), resources) for n in range(4)]
    results = [runner.result(handle) for handle in handles]
    print(len({pid for pid, _ in results}), {len(gpus) for _, gpus in results})
"""


def test_every_gpu_task_has_a_process_of_its_own() -> None:
    # Which GPU a process sees, and what it keeps of its memory, ends with the process only.
    ended = subprocess.run(
        [sys.executable, "-c", GPU_TASKS], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    on_gpus, on_cpus = ended.stdout.split("\n")[:2]
    assert on_gpus == "4 {1}"
    assert on_cpus in ("1 {0}", "2 {0}", "3 {0}")
