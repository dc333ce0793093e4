"""Nothing finished is lost, nothing is silently wrong, no debris: three real servers made to fail.

Faults come from a proxy before the server, or from killing the server, the writer or the reader.
What a fault may cost is time; or, when it does not pass, an error that says so.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from botocore.exceptions import ClientError

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.digests import PART_BYTES, CheckedObject, Digest, digest_of
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError, StoreError
from mbq.artifacts.garbage import find_garbage, remove_garbage
from mbq.artifacts.manifest import (
    BlockRecord,
    Manifest,
    find_document,
    get_document,
    put_blob,
    put_document,
)
from mbq.artifacts.packed import CONFIG_FILE, READERS, Report, make_index, open_checkpoint, verify
from mbq.artifacts.pull import pull
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import LocalStore, Store
from mbq.artifacts.tensors import Entry, encode
from tests.conftest import FinishedRun
from tests.support import servers
from tests.support.proxy import FAULTS, Exchange, Fault, Proxy
from tests.support.servers import BUCKET, Server

FOR_EVER = 10**6
# All that a call may raise about something that exists.
LOUD = (StoreError, CorruptError, InputError)
# A server that checks signatures refuses a request that lost its Range, and rightly so.
PASSING = tuple(fault for fault in FAULTS if fault != "ignore-range")
# Those that differ between servers: each answered, or was asked something else.
ANSWERED = ("reset-after", "reset-midway", "wrong-bytes", "wrong-request-bytes", "truncated")
BASE, LOWER, UPPER = (f"model-{name}-00001-of-00001.safetensors" for name in ("base", "0", "1"))

Linked = Callable[..., tuple[S3Store, Proxy]]


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
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _pack(tmp_path_factory.mktemp("packed"), {BASE: 0, LOWER: 2, UPPER: 0})


@pytest.fixture
def shared(linked: Linked, packed: Path) -> Linked:
    """The packed checkpoint on rclone, behind a proxy; not to be written to."""

    def share(**changes: Any) -> tuple[S3Store, Proxy]:
        store, proxy = linked("rclone", prefix=packed.parent.name, **changes)
        if store.stat("manifest.json") is None:
            _upload(packed, store)
        return store, proxy

    return share


def _noise(size: int) -> bytes:
    """Bytes of which no two parts are alike."""
    noise = os.urandom(1 << 20)
    pieces = (b"%16d" % start + noise[16:] for start in range(0, size, 1 << 20))
    return b"".join(pieces)[:size]


def _record(blob: Digest) -> BlockRecord:
    fields: dict[str, Any] = {"loss_before": {}, "loss_after": {}, "outlier_overlap": {}}
    return BlockRecord(block=0, blob=blob, hardware="cpu", attempt=1, seconds=1.0, **fields)


def _pack(folder: Path, parts: dict[str, int]) -> Path:
    """A checkpoint of two slices whose weight files have that many full parts and a bit."""
    local = LocalStore(folder)
    for name, full in parts.items():
        data = _noise(full * PART_BYTES + 50_000)
        local.put(name, encode([Entry(name, "U8", (len(data),))], [data]))
    config = {"quantization_config": {"quant_method": "mbq", "max_bits": 4}}
    local.put(CONFIG_FILE, [json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"])
    local.put(INDEX_FILE, [make_index(local, parts)])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        run="run",
        model_digest="0" * 64,
        max_bits=4,
        group_size=32,
        files={name: digest_of([local.read(name)]) for name in _names(folder)},
        slice_files=((LOWER,), (UPPER,)),
        blocks=(),
        hardware=(),
    )
    put_document(local, "manifest.json", manifest)
    return folder


def _names(folder: Path) -> list[str]:
    """The files of a folder, hidden ones as well."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _same(first: Path, second: Path) -> bool:
    names = _names(first)
    same = ((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    return names == _names(second) and all(same)


def _upload(folder: Path, store: Store) -> None:
    for name in _names(folder):
        store.put(name, [(folder / name).read_bytes()])


def _pull(store: Store, folder: Path, report: Report = lambda _: None) -> int:
    return pull(open_checkpoint(store), folder, None, report).fetched_bytes


def _size(store: Store, key: str) -> int | None:
    stat = store.stat(key)
    return stat.size_bytes if stat else None


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _outcome(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return error


def _parts(exchanges: Iterable[Exchange]) -> list[int]:
    """Numbers of the parts that a server took."""
    numbers = [e.path.partition("partNumber=")[2] for e in exchanges if e.status == 200]
    return sorted(int(number) for number in numbers if number)


def _when(proxy: Proxy, method: str, path: str, number: int, action: Callable[[], Any]) -> None:
    """Act once, before the numbered request of that kind is forwarded."""
    counter = count(1)

    def act(asked: str, where: str) -> None:
        if asked == method and path in where and next(counter) == number:
            action()

    proxy.on_request = act


def _collect(store: Store) -> None:
    """Remove all that nobody needs, however young."""
    remove_garbage(store, find_garbage(store, grace_seconds=-10.0))


def _small_actions(store: Store) -> dict[str, Callable[[], bool]]:
    """What users do with small objects, by the requests it takes; whether it came out right."""
    data = _noise(1000)
    digest, record = digest_of([data]), _record(digest_of([data]))
    for key in ("whole", "ranged", "stat", "delete", "kids/a", "kids/b/c", "all/a", "all/b/c"):
        store.put(key, [data])
    whole, ranged = (CheckedObject(store, key, digest) for key in ("whole", "ranged"))

    def put() -> bool:
        store.put("put", [data])
        return store.read("put") == data

    def blob() -> bool:
        put_blob(store, [data])
        return CheckedObject(store, keys.blob_key(digest.sha256), digest).read() == data

    def document() -> bool:
        put_document(store, "document", record)
        return get_document(store, "document", BlockRecord) == record

    def delete() -> bool:
        store.delete("delete")
        return store.stat("delete") is None

    return {
        "PUT /put": put,
        "HEAD PUT GET /blobs/": blob,
        "PUT GET /document": document,
        "GET /whole": lambda: whole.read() == data,
        "GET /ranged": lambda: ranged.read(100, 50) == data[100:150],
        "GET /absent": lambda: find_document(store, "absent", BlockRecord) is None,
        "HEAD /stat": lambda: _size(store, "stat") == len(data),
        "HEAD /no-stat": lambda: store.stat("no-stat") is None,
        "GET kids": lambda: store.children("kids") == ["a", "b"],
        "GET all": lambda: [s.key for s in store.walk("all")] == ["all/a", "all/b/c"],
        "DELETE /delete": delete,
    }


def _try_small(store: Store, proxy: Proxy, fault: Fault, times: int) -> dict[str, Any]:
    actions = _small_actions(store)
    for requests in actions:
        *methods, path = requests.split()
        for method in methods:
            proxy.inject(fault, times, method, path)
    if fault == "wrong-bytes":
        # Who lists looks twice (see the test of gc).
        del actions["GET kids"], actions["GET all"]
    with ThreadPoolExecutor(len(actions)) as pool:
        return dict(zip(actions, pool.map(_outcome, actions.values()), strict=True))


@pytest.mark.parametrize("server", servers.NAMES)
@pytest.mark.parametrize("fault", PASSING)
def test_small_objects_survive_what_passes(linked: Linked, server: str, fault: Fault) -> None:
    store, proxy = linked(server, stall_seconds=0.5)
    found = _try_small(store, proxy, fault, 1 if "stall" in fault else 2)
    assert found == dict.fromkeys(found, True)
    assert {e.fault for e in proxy.exchanges} == {None, fault}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_pass_is_an_error_and_never_another_answer(
    linked: Linked, fault: Fault
) -> None:
    store, proxy = linked("rclone", patience_seconds=0.3, stall_seconds=0.5)
    found = _try_small(store, proxy, fault, FOR_EVER)
    wrong = {k: v for k, v in found.items() if v is not True and not isinstance(v, LOUD)}
    assert wrong == {}


# The requests of a large put, by what their paths hold; of the parts the second is hit.
STEPS = (
    ("GET", "%2F{}", 0),
    ("POST", "/{}?uploads", 0),
    ("GET", "/{}?uploadId", 0),
    ("PUT", "/{}?", 1),
    ("POST", "/{}?uploadId", 0),
)


@pytest.mark.parametrize("server", servers.NAMES)
def test_large_objects_survive_what_passes_at_every_step(linked: Linked, server: str) -> None:
    store, proxy = linked(server)
    data = _noise(2 * PART_BYTES + 100)
    faults = PASSING if server == "rclone" else ANSWERED

    def put(fault: Fault) -> bool:
        store.put(fault, [data])
        return store.read(fault) == data

    for fault in faults:
        for method, path, after in STEPS:
            proxy.inject(fault, 1, method, path.format(fault), after)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda fault: _outcome(lambda: put(fault)), faults)
        assert dict(zip(faults, found, strict=True)) == dict.fromkeys(faults, True)
    assert len([e for e in proxy.exchanges if e.fault]) == len(STEPS) * len(faults)


@pytest.mark.parametrize("server", servers.NAMES)
@pytest.mark.parametrize("fault", ["reset-after", "truncated"])
def test_an_upload_whose_completion_went_unheard_is_complete(
    linked: Linked, server: str, fault: Fault
) -> None:
    store, proxy = linked(server, stall_seconds=30.0)
    data = _noise(2 * PART_BYTES + 100)
    # The second time it is the answer that there is no such upload.
    proxy.inject(fault, 2, "POST", "uploadId=")
    store.put("key", iter([data]))
    assert _parts(proxy.exchanges) == [1, 2, 3]
    assert store.read("key") == data
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("server", servers.NAMES)
@pytest.mark.parametrize("then", ["the same", "other bytes", "fewer bytes"])
def test_a_put_that_failed_leaves_the_old_object_and_is_taken_up(
    linked: Linked, server: str, then: str
) -> None:
    store, proxy = linked(server, stall_seconds=30.0)
    store.put("key", [b"old"])
    data = _noise(2 * PART_BYTES + 100)
    proxy.inject("error-500", FOR_EVER, "PUT", "partNumber=2")
    with pytest.raises(StoreError, match=r"cannot write .*InternalError"):
        replace(store, patience_seconds=0.5).put("key", [data])
    assert store.read("key") == b"old"
    (unfinished,) = store.unfinished()
    assert (unfinished.key, unfinished.size_bytes) == ("key", PART_BYTES + 100)
    proxy.clear()
    before = len(proxy.exchanges)
    if then != "the same":
        data = _noise((2 if then == "other bytes" else 1) * PART_BYTES + 100)[::-1]
    store.put("key", [data])
    assert store.read("key") == data
    if then == "the same":
        assert _parts(proxy.exchanges[before:]) == [2]
        assert list(store.unfinished()) == []
    _collect(store)
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("name", servers.NAMES)
def test_a_server_that_dies_in_a_large_put_and_in_a_pull(
    own_server: Callable[[str], Server], linked: Linked, packed: Path, tmp_path: Path, name: str
) -> None:
    server = own_server(name)
    store, proxy = linked(server, patience_seconds=120.0)
    restarts: list[Thread] = []

    def reboot() -> None:
        server.kill()
        restarts.append(Thread(target=server.restart))
        restarts[-1].start()

    data = (packed / LOWER).read_bytes()
    _when(proxy, "PUT", "partNumber=", 2, reboot)
    blob = put_blob(store, [data])
    assert CheckedObject(store, keys.blob_key(blob.sha256), blob).read() == data
    restarts[0].join()

    store.put(LOWER, [b"old"])
    _when(proxy, "PUT", "partNumber=", 2, reboot)
    if name == "rclone":
        # It forgets its uploads, and what cannot be read twice cannot be sent twice.
        with pytest.raises(StoreError, match="lost the upload; write it again"):
            store.put(LOWER, iter([data]))
        assert store.read(LOWER) == b"old"
    else:
        store.put(LOWER, iter([data]))
        assert store.read(LOWER) == data
    restarts[1].join()

    _upload(packed, store)
    assert list(store.unfinished()) == []
    _when(proxy, "GET", ".safetensors", 3, reboot)
    _pull(store, tmp_path / "pulled")
    restarts[2].join()
    assert _same(packed, tmp_path / "pulled")


def test_a_server_that_ignores_ranges(own_server: Callable[[str], Server], linked: Linked) -> None:
    # One that checks no signatures: the proxy takes a signed header away.
    server = own_server("rclone")
    server.kill()
    secret = ("--auth-key", f"{servers.ACCESS_KEY},{servers.SECRET_KEY}")
    command = [word for word in server.commands["rclone"] if word not in secret]
    server = replace(server, commands={"rclone": command})
    server.restart()
    store, proxy = linked(server)
    data = _noise(1000)
    store.put("key", [data])
    proxy.inject("ignore-range")
    assert store.read("key", 100, 50) == data[100:150]
    assert [e.fault for e in proxy.exchanges[-2:]] == ["ignore-range", None]
    proxy.inject("ignore-range", FOR_EVER)
    with pytest.raises(StoreError, match=r"cannot read .*/key: the store ignores ranges"):
        replace(store, patience_seconds=0.3).read("key", 100, 50)
    server.kill()


def test_conditions_that_are_taken_away_are_missed(linked: Linked) -> None:
    # So the tests above, in which ignore-conditions changes nothing, show that none are sent.
    store, proxy = linked("rclone")
    proxy.inject("ignore-conditions")
    with pytest.raises(ClientError, match=r"AccessDenied|SignatureDoesNotMatch"):
        store._client.put_object(Bucket=BUCKET, Key="key", Body=b"x", IfNoneMatch="*")


@pytest.mark.parametrize("server", servers.NAMES)
def test_gc_survives_damaged_listings_and_removes_nothing_that_is_named(
    linked: Linked, server: str
) -> None:
    store, proxy = linked(server)
    named = keys.blob_key(put_blob(store, [b"named"]).sha256)
    put_document(store, keys.block_key("run", 0), _record(digest_of([b"named"])))
    for step in range(20):
        # The middle byte moves through keys, times, sizes and tags.
        for folder in ("runs", "blobs"):
            store.put(f"{folder}/{'a' * (10 * step + 1)}", [b"x"])
            proxy.inject("wrong-bytes", 1, "GET", f"%2F{folder}%2F")
        _collect(store)
        assert store.read(named) == b"named"
        store.delete(f"runs/{'a' * (10 * step + 1)}")
    assert len([e for e in proxy.exchanges if e.fault]) == 40
    _collect(store)
    assert [stat.key for stat in store.walk("blobs")] == [named]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pull_survives_what_passes_and_goes_on_after_what_did_not(
    shared: Linked, packed: Path, tmp_path: Path, fault: Fault
) -> None:
    store, proxy = shared(stall_seconds=1.0 if "stall" in fault else 30.0)
    total = sum(digest.size_bytes for digest in open_checkpoint(store).files(4).values())
    proxy.inject(fault, FOR_EVER, "GET", UPPER)
    try:
        assert _pull(replace(store, patience_seconds=0.3), tmp_path) == total
    except LOUD as error:
        assert ".safetensors" in str(error)
        assert not (tmp_path / CONFIG_FILE).exists()
    proxy.clear()
    (tmp_path / LOWER).unlink(missing_ok=True)
    for name in ("manifest.json", CONFIG_FILE, LOWER, UPPER):
        if fault != "ignore-range":
            proxy.inject(fault, 1, "GET", name)
    assert _pull(store, tmp_path) < total
    assert _same(packed, tmp_path)
    assert verify(open_checkpoint(LocalStore(tmp_path)), lambda _: None) == []
    assert {e.fault for e in proxy.exchanges} == {None, fault}


@pytest.mark.parametrize("server", servers.NAMES)
def test_a_real_checkpoint_over_a_bad_line(
    linked: Linked, server: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    store, proxy = linked(server)
    _upload(finished_run.checkpoint, store)
    for fault in ("error-500", "reset-midway", "wrong-bytes", "truncated"):
        proxy.inject(fault, 2, "GET", ".safetensors")
    _pull(store, tmp_path)
    assert _same(finished_run.checkpoint, tmp_path)


PULL = """
import sys
from pathlib import Path
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.s3 import S3Store
pull(open_checkpoint(S3Store(*sys.argv[1:3], 20.0)), Path(sys.argv[3]), None, lambda _: None)
"""


def test_a_pull_that_is_killed_fetches_again_only_what_was_under_way(
    own_server: Callable[[str], Server], linked: Linked, tmp_path: Path
) -> None:
    server = own_server("rclone")
    server.kill()
    big = _pack(server.folder / "data" / BUCKET / "big", {BASE: 0, LOWER: 6, UPPER: 6})
    server.restart()
    pulled, missing, chance = tmp_path / "pulled", 15, random.Random(2)
    for moment in (chance.randrange(11, 14), chance.randrange(1, 3), 1):
        # A new proxy each time: requests of the dead arrive late.
        _, proxy = linked(server, prefix="big")
        process = subprocess.Popen([sys.executable, "-c", PULL, BUCKET, "big", str(pulled)])
        _when(proxy, "GET", ".safetensors", moment, process.kill)
        assert process.wait() < 0
        assert not (pulled / CONFIG_FILE).exists()
        missing -= max(0, moment - READERS)
    store, proxy = linked(server, prefix="big", stall_seconds=30.0)
    _pull(store, pulled)
    assert 0 < sum(".safetensors" in e.path for e in proxy.exchanges) <= missing
    assert _same(big, pulled)


def test_a_full_disk_is_an_error_and_the_next_pull_goes_on(
    shared: Linked, packed: Path, tmp_path: Path
) -> None:
    disk, folder, filler = tmp_path, tmp_path / "pulled", tmp_path / "filler"
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    store, proxy = shared()
    full = Event()

    def fill(leave: int) -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(free - leave))

    def fill_after_the_first_part(_: float) -> None:
        if not full.is_set():
            # Other parts may be arriving: whoever comes last finds the disk full.
            with suppress(OSError):
                fill(0)
            full.set()

    try:
        fill(PART_BYTES)
        with pytest.raises(InputError, match="make room"):
            _pull(store, folder)
        filler.unlink()
        proxy.on_request = lambda _, path: None if UPPER not in path else full.wait(30) and None
        with pytest.raises(StoreError, match="No space left on device"):
            _pull(store, folder, fill_after_the_first_part)
        assert not (folder / CONFIG_FILE).exists()
        filler.unlink()
        total = sum(digest.size_bytes for digest in open_checkpoint(store).files(4).values())
        assert 0 < _pull(store, folder) <= total - PART_BYTES
        assert _same(packed, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
def test_a_damaged_store_is_named_and_no_config_tells_of_what_is_not_there(
    linked: Linked, packed: Path, tmp_path: Path, damage: str
) -> None:
    store, _ = linked("rclone")
    _upload(packed, store)
    _pull(store, tmp_path / "mended")
    (tmp_path / "mended" / LOWER).write_bytes(b"")
    data = (packed / LOWER).read_bytes()
    if damage == "deleted":
        store.delete(LOWER)
    else:
        store.put(LOWER, [_flip(data, PART_BYTES) if damage == "flipped" else data[:-1]])
    for name in ("new", "mended"):
        with pytest.raises((CorruptError, NotFoundError), match=LOWER):
            _pull(store, tmp_path / name)
        assert not (tmp_path / name / CONFIG_FILE).exists()
    store.put(LOWER, [data])
    for name in ("new", "mended"):
        _pull(store, tmp_path / name)
        assert _same(packed, tmp_path / name)


def test_what_is_damaged_in_a_folder_is_named_and_only_that_is_mended(
    shared: Linked, packed: Path, tmp_path: Path
) -> None:
    store, proxy = shared()
    _pull(store, tmp_path)
    size = (packed / LOWER).stat().st_size
    damages: list[tuple[str, Callable[[bytes], bytes | None], int]] = [
        (LOWER, lambda data: _flip(data, PART_BYTES + 5), PART_BYTES),
        (LOWER, lambda data: data[: PART_BYTES + 5], size - PART_BYTES),
        (LOWER, lambda data: data + b"x", 0),
        (LOWER, lambda _: None, size),
        (INDEX_FILE, lambda data: _flip(data, 50), 0),
        (INDEX_FILE, lambda _: None, 0),
        (CONFIG_FILE, lambda _: None, 0),
        (CONFIG_FILE, lambda data: data[: len(data) // 2], 0),
        (CONFIG_FILE, lambda data: data.replace(b'"max_bits": 4', b'"max_bits": 8'), 0),
    ]
    failed = []
    for number, (name, change, fetched) in enumerate(damages):
        path = tmp_path / name
        data = change(path.read_bytes())
        path.unlink() if data is None else path.write_bytes(data)
        (line,) = verify(open_checkpoint(LocalStore(tmp_path)), lambda _: None)
        assert line.startswith(f"{name}: ")
        before = len(proxy.exchanges)
        outcome = _outcome(lambda: _pull(store, tmp_path))
        asked = sum(e.received_bytes for e in proxy.exchanges[before:] if LOWER in e.path)
        if (outcome, asked) != (fetched, fetched) or not _same(packed, tmp_path):
            failed.append((number, name, outcome, asked))
            path.write_bytes((packed / name).read_bytes())
    assert failed == []


def test_leftovers_of_a_killed_pull_replace_no_right_file_and_do_not_stay(
    shared: Linked, packed: Path, tmp_path: Path
) -> None:
    # Somebody copied into the folder what a killed pull did not bring.
    data = (packed / LOWER).read_bytes()
    (tmp_path / LOWER).write_bytes(data)
    (tmp_path / f".partial-{LOWER}").write_bytes(data[:PART_BYTES].ljust(len(data), b"\0"))
    # Others were killed while they wrote the manifest, or fetched more bits.
    (tmp_path / ".partial-0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".partial-model-2-00001-of-00001.safetensors").write_bytes(b"half")
    _pull(shared()[0], tmp_path)
    assert (tmp_path / LOWER).read_bytes() == data
    assert _same(packed, tmp_path)


def test_another_checkpoint_is_refused_and_spoils_nothing(
    shared: Linked, linked: Linked, packed: Path, tmp_path: Path
) -> None:
    _pull(shared()[0], tmp_path / "pulled")
    other, _ = linked("rclone")
    _upload(_pack(tmp_path / "other", {BASE: 0, LOWER: 0, UPPER: 0}), other)
    with pytest.raises(InputError, match="another checkpoint"):
        _pull(other, tmp_path / "pulled")
    assert _same(packed, tmp_path / "pulled")


def test_fifty_faults(
    start_server: Callable[[str], Server], linked: Linked, tmp_path: Path
) -> None:
    chance = random.Random(1)
    calm, proxy = linked("rclone", stall_seconds=30.0)
    store = replace(calm, patience_seconds=1.0, stall_seconds=0.5)
    tiny = _pack(tmp_path / "tiny", {BASE: 0, LOWER: 0, UPPER: 0})
    checkpoint = replace(store, prefix=f"{store.prefix}/tiny")
    _upload(tiny, replace(calm, prefix=checkpoint.prefix))
    # What each document may be: one thing, or one of several after a put that failed.
    possible: dict[str, list[BlockRecord | None]] = {}

    def write(size: int) -> None:
        record = _record(put_blob(store, [_noise(size)]))
        key = keys.block_key(f"run{chance.randrange(3)}", chance.randrange(3))
        possible[key] = [*possible.get(key, [None]), record]
        put_document(store, key, record)
        possible[key] = [record]

    def check(store: Store, key: str) -> None:
        found = find_document(store, key, BlockRecord)
        assert found in possible[key]
        possible[key] = [found]
        if found is not None:
            data = CheckedObject(store, keys.blob_key(found.blob.sha256), found.blob).read()
            assert digest_of([data]) == found.blob

    def check_some() -> None:
        for key in chance.sample(sorted(possible), min(3, len(possible))):
            check(store, key)

    def pull_tiny() -> None:
        folder = tmp_path / str(chance.randrange(4))
        _pull(checkpoint, folder)
        assert _same(tiny, folder)

    actions: list[Callable[[], None]] = [
        *[lambda: write(chance.randrange(3000))] * 3,
        *[check_some] * 2,
        *[pull_tiny] * 2,
        lambda: remove_garbage(store, find_garbage(store, grace_seconds=0.0)),
        lambda: write(2 * PART_BYTES + chance.randrange(3000)),
    ]
    hit = 0
    while hit < 50:
        before = len(proxy.exchanges)
        times = chance.choice([1, 1, 1, 1, 2, 2, 2, 2, FOR_EVER])
        method = chance.choice([None, None, "GET", "PUT"])
        proxy.inject(chance.choice(FAULTS), times, method, after=chance.randrange(3))
        with suppress(*LOUD):
            chance.choice(actions)()
        proxy.clear()
        hit += any(e.fault for e in proxy.exchanges[before:])

    for key in possible:
        check(calm, key)
    _collect(calm)
    records = [found for (found,) in possible.values() if found is not None]
    named = {keys.blob_key(record.blob.sha256) for record in records}
    assert len(named) > 3
    assert {stat.key for stat in calm.walk("blobs")} == named
    assert list(calm.walk("probes")) == list(calm.unfinished()) == []
    for key in possible:
        check(calm, key)
    # rclone's own: what it writes lies under hidden names until it is complete.
    on_disk = start_server("rclone").folder / "data" / BUCKET / store.prefix
    assert [name for name in _names(on_disk) if "/." in f"/{name}"] == []
