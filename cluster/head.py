"""A Ray head of our own on this machine, for when no cluster is given.

It runs detached (`ray start --head --block` in a session of its own), so it outlives the command
that started it. Token authentication is on: Ray's ports listen on every interface, whatever the
dashboard's host. `head.json` in the state folder says how to reach it; the token lies beside it,
readable by its owner only.

`ray stop` is never used: it stops every Ray of the machine. The head is stopped by the pid we
recorded, after checking that this pid still is the process we started.
"""

import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mbq.artifacts.errors import ClusterError, InputError

# A head is written down before it answers: whoever starts it may be killed meanwhile.
_STARTING = "starting.json"
_RUNNING = "head.json"
_START_SECONDS = 90.0
_STOP_SECONDS = 40.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Head:
    """A head we started.

    Attributes:
        address: of the Jobs API and the dashboard.
        pid: of `ray start --block`; also the id of its process group.
        started: the process's start time in clock ticks, to tell it from a later pid's.
        session_folder: where this Ray keeps its sockets and logs.
    """

    address: str
    pid: int
    started: str
    session_folder: str
    token_file: str


def find_head(state_folder: Path) -> Head | None:
    """The head that is running, if any."""
    head = _read(state_folder / _RUNNING)
    return head if head is not None and _start_time(head.pid) == head.started else None


def start_head(state_folder: Path) -> Head:
    """Start a head, or return the running one. Takes about ten seconds.

    Raises:
        ClusterError: it did not come up; the message names its log.
        InputError: the folder cannot be written.
    """
    try:
        state_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(state_folder / "lock"):
            return find_head(state_folder) or _start(state_folder)
    except OSError as error:
        raise InputError(
            f"cannot write {state_folder} ({error.strerror or error}); set MBQ_HOME to a folder "
            "that you may write in"
        ) from error


def stop_head(state_folder: Path, head: Head) -> None:
    """Stop the head and everything that runs on it."""
    # Of a head that is gone the group may be left; another process of its number is a stranger.
    if _start_time(head.pid) in (head.started, ""):
        with contextlib.suppress(ProcessLookupError):
            os.kill(head.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while _start_time(head.pid) == head.started and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        _kill_group(head.pid)
    for name in (_RUNNING, _STARTING):
        (state_folder / name).unlink(missing_ok=True)
    shutil.rmtree(head.session_folder, ignore_errors=True)


def client_environment(head: Head) -> dict[str, str]:
    """What a process must have in its environment BEFORE it imports ray to talk to this head."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": head.token_file} | _no_proxy()


def _read(path: Path) -> Head | None:
    """A head that was started, dead or alive."""
    try:
        return Head(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _start(state_folder: Path) -> Head:
    _end_what_is_left(state_folder)
    token = state_folder / "token"
    token.unlink(missing_ok=True)
    with open(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    # Unix socket paths end at 108 bytes, so the session lies directly under the temporary folder.
    session_folder = tempfile.mkdtemp(prefix="mbq-")
    port = _free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts"),
        *("start", "--head", "--block", "--port=0", "--disable-usage-stats"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
        # Any: were it chosen here and taken meanwhile, the head would come up and accept no job.
        "--dashboard-agent-listen-port=0",
        *("--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={session_folder}"),
    ]
    log = state_folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            # Drivers inherit it, and Python would import modules from there.
            cwd=state_folder,
            env=_environment(token),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    head = Head(address, process.pid, _start_time(process.pid), session_folder, str(token))
    starting = state_folder / _STARTING
    try:
        starting.write_text(json.dumps(asdict(head)), encoding="utf-8")
        _await_jobs_api(head, process, log)
        starting.replace(state_folder / _RUNNING)
    except BaseException:
        # Also when interrupted: a head that nobody knows of would run for ever.
        _kill_group(process.pid)
        shutil.rmtree(session_folder, ignore_errors=True)
        raise
    return head


def _environment(token: Path) -> dict[str, str]:
    inherited: Mapping[str, str] = os.environ
    environment = {name: value for name, value in inherited.items() if name != "RAY_ADDRESS"}
    return (
        environment
        | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # A stopped driver gets this long to write its last status.
            "RAY_JOB_STOP_WAIT_TIME_S": "20",
            # A driver whose head was killed ends after this long, and is then resumed.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        }
        | _no_proxy()
    )


def _no_proxy() -> dict[str, str]:
    """This machine is asked directly: a proxy could not reach it, and would be told the token."""
    before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    names = [name.strip() for name in before.split(",")] if before else []
    # A star, which stands for all, counts only where it stands alone.
    if not {"*", "127.0.0.1"} & {*names}:
        names.append("127.0.0.1")
    return {"no_proxy": ",".join(names), "NO_PROXY": ",".join(names)}


def _end_what_is_left(state_folder: Path) -> None:
    """Of a head that was killed, or of one whose starter was killed before it answered."""
    for name in (_RUNNING, _STARTING):
        left = _read(state_folder / name)
        if left is not None:
            stop_head(state_folder, left)


def _await_jobs_api(head: Head, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Wait until the dashboard answers; for its agent, which starts jobs, `Jobs.submit` waits."""
    token = Path(head.token_file).read_text(encoding="utf-8")
    request = urllib.request.Request(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    directly = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with directly.open(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(_POLL_SECONDS)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise ClusterError(
        f"the local Ray did not start: {lines[-1] if lines else 'it printed nothing'}; see {log}"
    )


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot; empty when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _free_port() -> int:
    """A free port above those of Ray's workers, 10002-19999, and below those of connections."""
    while True:
        port = random.randrange(20_000, 32_768)
        with socket.socket() as candidate:
            if candidate.connect_ex(("127.0.0.1", port)) != 0:
                return port


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
