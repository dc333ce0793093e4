"""Three real S3 servers that tests start, kill and restart: rclone, OpenStack Swift, Ceph.

They differ where stores may differ: rclone forgets unfinished uploads when it dies, Swift and Ceph
do not; only Ceph has honest conditional writes. What we promise must hold on all three.

A server is a few processes over one folder, each a child of the tests in a session of its own.
None outlives the tests: the kernel kills a child when the thread that started it ends, so one
thread that lives as long as the interpreter starts them all.
"""

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import SystemRandom
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

NAMES = ("rclone", "swift", "ceph")
BUCKET = "mbq"
ACCESS_KEY = "mbq"
SECRET_KEY = "mbq-test-secret"
READY_SECONDS = 120
STEP_SECONDS = 60
LOG_TAIL_CHARACTERS = 2000

SWIFT = Path(__file__).resolve().parents[2] / "build" / "swift" / "bin"
CEPH_PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin")

_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="servers")


@dataclass(frozen=True)
class Server:
    """One server: a command for each of its processes, in starting order, over one folder."""

    name: str
    folder: Path
    port: int
    commands: Mapping[str, Sequence[str | Path]]
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    durable: bool = True
    certificate: str | None = None
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs in its environment to use this server."""
        trusted = {"AWS_CA_BUNDLE": self.certificate} if self.certificate else {}
        return trusted | {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def kill(self) -> None:
        """SIGKILL every process and wait until all are gone."""
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    def restart(self) -> None:
        """Start what does not run, on the same data and port; return when a PUT works."""
        if not self.durable and not self._running:
            raise RuntimeError(f"{self.name} had its data in memory only: start it durable=True")
        for role in [role for role in self.commands if role not in self._running]:
            self.launch(role)
        self._wait_until_it_stores()

    def stop(self) -> None:
        """End for good. The data goes, the logs stay."""
        self.kill()
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def launch(self, role: str) -> None:
        """Start one process."""
        self._running[role] = _spawn(self.folder, role, self.commands[role])

    def _wait_until_it_stores(self) -> None:
        # A port that answers proves little: Ceph answers before it can store anything.
        client = self._client()
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                return _put_and_delete(client)
            except (BotoCoreError, ClientError) as error:
                dead = [role for role, child in self._running.items() if child.poll() is not None]
                if dead or time.monotonic() > deadline:
                    why = f"{dead} died" if dead else f"no PUT worked for {READY_SECONDS} s"
                    logs = _logs(self.folder)
                    raise RuntimeError(f"{self.name}: {why}: {error}\n{logs}") from error
            time.sleep(0.1)

    def _client(self) -> Any:
        config = Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1},
            connect_timeout=2,
            read_timeout=10,
            proxies={},
        )
        session = boto3.session.Session(self.access_key, self.secret_key, region_name="us-east-1")
        return session.client(
            "s3", endpoint_url=self.endpoint, verify=self.certificate, config=config
        )


def missing(name: str) -> str | None:
    """Why this server cannot run here, with the remedy; None if it can."""
    if shutil.which("setpriv") is None:
        return "no setpriv: install util-linux"
    if name == "rclone" and _rclone_program() is None:
        return "no rclone: reinstall the dev dependencies"
    if name == "swift" and not (SWIFT / "swift-proxy-server").exists():
        return "no swift: make servers"
    if name == "ceph" and any(shutil.which(program) is None for program in CEPH_PROGRAMS):
        return "no ceph: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"
    return None


def start(name: str, folder: Path, durable: bool = False) -> Server:
    """Start a server in a new folder. Ceph's data outlive kill() only if durable, which takes four
    seconds more; the others' always do."""
    if reason := missing(name):
        raise RuntimeError(reason)
    folder = folder.resolve()
    (folder / "data").mkdir(parents=True)
    server = {"rclone": _rclone, "swift": _swift, "ceph": _ceph}[name](folder, durable)
    try:
        if name == "ceph":
            _form_cluster(server)
        server.restart()
    except BaseException:
        server.stop()
        raise
    return server


def _put_and_delete(client: Any) -> None:
    try:
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
    except client.exceptions.NoSuchBucket:
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
    client.delete_object(Bucket=BUCKET, Key="ready")


def _logs(folder: Path) -> str:
    """The end of every log."""
    texts = {path: path.read_text(errors="replace") for path in sorted(folder.glob("*.log"))}
    return "\n".join(f"-- {path}\n{text[-LOG_TAIL_CHARACTERS:]}" for path, text in texts.items())


def _spawn(folder: Path, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
    """A process that dies with the tests, has nothing of their environment, and logs to a file."""
    with (folder / f"{name}.log").open("ab") as log:
        return _starter.submit(
            lambda: subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=folder,
                env={"PATH": os.environ["PATH"], "HOME": str(folder), "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ).result()


def _step(folder: Path, *command: str | Path) -> None:
    """One command of a setup. Ceph's wait for ever when the cluster is sick, so time is limited."""
    process = _spawn(folder, "setup", command)
    try:
        failure = process.wait(STEP_SECONDS) and f"status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        failure = f"no end within {STEP_SECONDS} s"
    if failure:
        raise RuntimeError(f"{' '.join(map(str, command))}: {failure}\n{_logs(folder)}")


def _free_ports(count: int) -> list[int]:
    """Ports below those the kernel gives to clients, so that a killed server gets its own again."""
    ports: list[int] = []
    while len(ports) < count:
        port = SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


def _rclone_program() -> str | None:
    beside = Path(sys.executable).with_name("rclone")
    return str(beside) if beside.exists() else shutil.which("rclone")


def start_certified(folder: Path, certificate: Path, key: Path) -> Server:
    """Start rclone in a new folder, speaking TLS with a certificate."""
    (folder / "data").mkdir(parents=True)
    plain = _rclone(folder, durable=True)
    command = [*plain.commands["rclone"], "--cert", certificate, "--key", key]
    server = replace(plain, commands={"rclone": command}, certificate=str(certificate))
    server.restart()
    return server


def _rclone(folder: Path, durable: bool) -> Server:
    (port,) = _free_ports(1)
    keys, address = f"{ACCESS_KEY},{SECRET_KEY}", f"127.0.0.1:{port}"
    serve = [_rclone_program() or "rclone", "serve", "s3", "--auth-key", keys, "--addr", address]
    return Server("rclone", folder, port, {"rclone": [*serve, folder / "data"]})


# One device, one replica, no memcache, no daemons: what is not written at once is never written.
# So every wait is long, as two busy cores are slow, and a slow answer is soon forgiven.
SWIFT_SERVER = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
workers = 0
swift_dir = {folder}
devices = {folder}/data
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = WARNING
conn_timeout = 30
node_timeout = 60
container_update_timeout = 60
error_suppression_interval = 0
[pipeline:main]
pipeline = {pipeline}-server
[app:{role}-server]
use = egg:swift#{role}
"""
SWIFT_PROXY = """\
account_autocreate = true
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_mbq_test = {secret} .admin
[filter:slo]
use = egg:swift#slo
"""
SWIFT_CONF = """\
[swift-hash]
swift_hash_path_prefix = mbq
swift_hash_path_suffix = mbq
"""
SWIFT_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for role, port in zip(("account", "container", "object"), sys.argv[1:]):
    ring = RingBuilder(part_power=6, replicas=1, min_part_hours=0)
    place = {"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1"}
    ring.add_dev({**place, "weight": 1})
    ring.rebalance()
    ring.get_ring().save(f"{role}.ring.gz")
"""


def _swift(folder: Path, durable: bool) -> Server:
    roles = ("account", "container", "object", "proxy")
    ports = _free_ports(len(roles))
    commands: dict[str, list[str | Path]] = {}
    for role, port in zip(roles, ports, strict=True):
        text = SWIFT_SERVER.format(
            role=role,
            port=port,
            folder=folder,
            user=pwd.getpwuid(os.getuid()).pw_name,
            pipeline="s3api tempauth slo proxy" if role == "proxy" else role,
        )
        if role == "proxy":
            text += SWIFT_PROXY.format(secret=SECRET_KEY)
        conf = folder / f"{role}.conf"
        conf.write_text(text, encoding="utf-8")
        commands[role] = [SWIFT / "python", SWIFT / f"swift-{role}-server", conf, "--verbose"]
    (folder / "swift.conf").write_text(SWIFT_CONF, encoding="utf-8")
    (folder / "data" / "d1").mkdir()
    _step(folder, SWIFT / "python", "-c", SWIFT_RINGS, *map(str, ports[:3]))
    return Server("swift", folder, ports[3], commands, access_key="mbq:test")


# No unix sockets: their paths may have 107 characters, and a test's folder has more.
# The monitor decides at once, clients look again soon, the dead are soon forgotten: the defaults,
# for large clusters, add 15 seconds to a start and 30 to the first new bucket after a kill.
CEPH_CONF = """\
[global]
fsid = {cluster}
ms bind msgr2 = false
public addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
admin socket =
mon data = {folder}/data/mon
mon data avail crit = 1
mon cluster log to file = false
paxos propose interval = 0.05
objecter tick interval = 0.2
osd data = {folder}/data/osd
osd objectstore = {objectstore}
osd client watch timeout = 5
osd pool default size = 1
osd pool default pg num = 8
memstore device bytes = 2147483648
bluestore block size = 4294967296
log file =
log to stderr = true
debug rocksdb = 0
[mon.a]
mon addr = v1:127.0.0.1:{mon_port}
[client.rgw]
rgw data = {folder}/data/rgw
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


def _ceph(folder: Path, durable: bool) -> Server:
    port, mon_port = _free_ports(2)
    text = CEPH_CONF.format(
        cluster=uuid.uuid4(),
        folder=folder,
        port=port,
        mon_port=mon_port,
        objectstore="bluestore" if durable else "memstore",
    )
    (folder / "ceph.conf").write_text(text, encoding="utf-8")
    conf = ("-c", "ceph.conf")
    commands = {
        "mon": ["ceph-mon", *conf, "-i", "a", "-f"],
        # A program that asks the monitor for configuration forgets the cluster's id for a moment;
        # what it commands then is refused, "wrong fsid". One daemon in five died of it.
        "osd": ["ceph-osd", *conf, "-i", "0", "-f", "--no-mon-config"],
        "rgw": ["radosgw", *conf, "-n", "client.rgw", "-f"],
    }
    for role in commands:
        (folder / "data" / role).mkdir()
    return Server("ceph", folder, port, commands, durable=durable)


def _form_cluster(server: Server) -> None:
    """A monitor, a storage daemon, which makes itself known to it, and a user."""
    conf = ("-c", "ceph.conf")
    keys = ("--access-key", server.access_key, "--secret", server.secret_key)
    _step(server.folder, "ceph-mon", *conf, "-i", "a", "--mkfs")
    server.launch("mon")
    _step(server.folder, "ceph-osd", *conf, "-i", "0", "--mkfs")
    server.launch("osd")
    user = ("--uid", "test", "--display-name", "test")
    _step(server.folder, "radosgw-admin", *conf, "user", "create", *user, *keys)
