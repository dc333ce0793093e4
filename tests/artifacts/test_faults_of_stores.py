"""Nothing finished is lost, nothing is silently wrong, no debris: stores on servers made to fail.

Faults come from a proxy before the server, or from killing the server. What a fault may cost is
time; or, when it does not pass, an error that says so.
"""

import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from botocore.exceptions import ClientError

from mbq.artifacts import keys
from mbq.artifacts.digests import PART_BYTES, CheckedObject, digest_of
from mbq.artifacts.documents import BlockRecord
from mbq.artifacts.errors import StoreError
from mbq.artifacts.garbage import find_garbage, remove_garbage
from mbq.artifacts.runs import put_blob
from mbq.artifacts.sealed import find_document, get_document, put_document
from mbq.artifacts.store import Store
from tests.support import servers
from tests.support.faulty import (
    BASE,
    FOR_EVER,
    LOUD,
    LOWER,
    UPPER,
    Linked,
    file_names,
    make_record,
    noise,
    outcome_of,
    pack,
    pull_all,
    same,
    upload,
    when,
)
from tests.support.proxy import FAULTS, Exchange, Fault, Proxy
from tests.support.servers import BUCKET, Server

# A server that checks signatures refuses a request that lost its Range, and rightly so.
PASSING = tuple(fault for fault in FAULTS if fault != "ignore-range")
# Those that differ between servers: each answered, or was asked something else.
ANSWERED = ("reset-after", "reset-midway", "wrong-bytes", "wrong-request-bytes", "truncated")


def _size(store: Store, key: str) -> int | None:
    stat = store.stat(key)
    return stat.size_bytes if stat else None


def _parts(exchanges: Iterable[Exchange]) -> list[int]:
    """Numbers of the parts that a server took."""
    numbers = [e.path.partition("partNumber=")[2] for e in exchanges if e.status == 200]
    return sorted(int(number) for number in numbers if number)


def _collect(store: Store) -> None:
    """Remove all that nobody needs, however young."""
    # Where there is nothing of a run, gc would not look.
    store.put("runs/run/note", [b"kept"])
    remove_garbage(store, find_garbage(store, grace_seconds=-10.0))


def _small_actions(store: Store) -> dict[str, Callable[[], bool]]:
    """What users do with small objects, by the requests it takes; whether it came out right."""
    data = noise(1000)
    digest, record = digest_of([data]), make_record(digest_of([data]))
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
        return dict(zip(actions, pool.map(outcome_of, actions.values()), strict=True))


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
    data = noise(2 * PART_BYTES + 100)
    faults = PASSING if server == "rclone" else ANSWERED

    def put(fault: Fault) -> bool:
        store.put(fault, [data])
        return store.read(fault) == data

    for fault in faults:
        for method, path, after in STEPS:
            proxy.inject(fault, 1, method, path.format(fault), after)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda fault: outcome_of(lambda: put(fault)), faults)
        assert dict(zip(faults, found, strict=True)) == dict.fromkeys(faults, True)
    assert len([e for e in proxy.exchanges if e.fault]) == len(STEPS) * len(faults)


@pytest.mark.parametrize("server", servers.NAMES)
@pytest.mark.parametrize("fault", ["reset-after", "truncated"])
def test_an_upload_whose_completion_went_unheard_is_complete(
    linked: Linked, server: str, fault: Fault
) -> None:
    store, proxy = linked(server, stall_seconds=30.0)
    data = noise(2 * PART_BYTES + 100)
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
    data = noise(2 * PART_BYTES + 100)
    proxy.inject("error-500", FOR_EVER, "PUT", "partNumber=2")
    with pytest.raises(StoreError, match=r"cannot write .*InternalError"):
        replace(store, patience_seconds=0.5).put("key", [data])
    assert store.read("key") == b"old"
    (unfinished,) = store.unfinished()
    assert (unfinished.key, unfinished.size_bytes) == ("key", PART_BYTES + 100)
    proxy.clear()
    before = len(proxy.exchanges)
    if then != "the same":
        data = noise((2 if then == "other bytes" else 1) * PART_BYTES + 100)[::-1]
    store.put("key", [data])
    assert store.read("key") == data
    if then == "the same":
        assert _parts(proxy.exchanges[before:]) == [2]
        assert list(store.unfinished()) == []
    _collect(store)
    assert list(store.unfinished()) == []


@pytest.mark.parametrize("name", servers.NAMES)
def test_a_server_that_dies_in_a_large_put_and_in_a_pull(
    own_server: Callable[[str], Server], linked: Linked, synthetic: Path, tmp_path: Path, name: str
) -> None:
    server = own_server(name)
    store, proxy = linked(server, patience_seconds=120.0)
    restarts: list[Thread] = []

    def reboot() -> None:
        server.kill()
        restarts.append(Thread(target=server.restart))
        restarts[-1].start()

    data = (synthetic / LOWER).read_bytes()
    when(proxy, "PUT", "partNumber=", 2, reboot)
    blob = put_blob(store, [data])
    assert CheckedObject(store, keys.blob_key(blob.sha256), blob).read() == data
    restarts[0].join()

    store.put(LOWER, [b"old"])
    when(proxy, "PUT", "partNumber=", 2, reboot)
    if name == "rclone":
        # It forgets its uploads, and what cannot be read twice cannot be sent twice.
        with pytest.raises(StoreError, match="lost the upload; write it again"):
            store.put(LOWER, iter([data]))
        assert store.read(LOWER) == b"old"
    else:
        store.put(LOWER, iter([data]))
        assert store.read(LOWER) == data
    restarts[1].join()

    upload(synthetic, store)
    assert list(store.unfinished()) == []
    when(proxy, "GET", ".safetensors", 3, reboot)
    pull_all(store, tmp_path / "pulled")
    restarts[2].join()
    assert same(synthetic, tmp_path / "pulled")


def test_a_server_that_ignores_ranges(own_server: Callable[[str], Server], linked: Linked) -> None:
    # One that checks no signatures: the proxy takes a signed header away.
    server = own_server("rclone")
    server.kill()
    secret = ("--auth-key", f"{servers.ACCESS_KEY},{servers.SECRET_KEY}")
    command = [word for word in server.commands["rclone"] if word not in secret]
    server = replace(server, commands={"rclone": command})
    server.restart()
    store, proxy = linked(server)
    data = noise(1000)
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
    put_document(store, keys.block_key("run", 0), make_record(digest_of([b"named"])))
    for step in range(20):
        # The middle byte moves through keys, times, sizes and tags.
        put_blob(store, [f"unnamed {step}".encode()])
        shifting = [f"{folder}/{'a' * (10 * step + 1)}" for folder in ("runs", "blobs")]
        for key in shifting:
            store.put(key, [b"x"])
            proxy.inject("wrong-bytes", 1, "GET", f"%2F{key.partition('/')[0]}%2F")
        _collect(store)
        assert store.read(named) == b"named"
        for key in shifting:
            store.delete(key)
    assert len([e for e in proxy.exchanges if e.fault]) == 40
    _collect(store)
    assert [stat.key for stat in store.walk("blobs")] == [named]


def test_fifty_faults(
    start_server: Callable[[str], Server], linked: Linked, tmp_path: Path
) -> None:
    chance = random.Random(1)
    calm, proxy = linked("rclone", stall_seconds=30.0)
    store = replace(calm, patience_seconds=1.0, stall_seconds=0.5)
    # Where there is nothing of a run, gc would not look.
    calm.put("runs/run/note", [b"kept"])
    tiny = pack(tmp_path / "tiny", {BASE: 0, LOWER: 0, UPPER: 0})
    checkpoint = replace(store, prefix=f"{store.prefix}/tiny")
    upload(tiny, replace(calm, prefix=checkpoint.prefix))
    # What each document may be: one thing, or one of several after a put that failed.
    possible: dict[str, list[BlockRecord | None]] = {}

    def write(size: int) -> None:
        record = make_record(put_blob(store, [noise(size)]))
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
        pull_all(checkpoint, folder)
        assert same(tiny, folder)

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
    assert [name for name in file_names(on_disk) if "/." in f"/{name}"] == []
