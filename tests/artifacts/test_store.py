"""One contract for all stores: a folder, and a prefix on each of three real S3 servers."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import InputError, NotFoundError, StoreError
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.store import LocalStore, Store, open_object, open_store, probe


def _bytes(count: int) -> bytes:
    return os.urandom(1 << 16) * (count >> 16) + os.urandom(count % (1 << 16))


def test_reads_back_what_was_put_whole_and_in_ranges(any_store: Store) -> None:
    any_store.put("a/b", [b"hello ", b"", b"world"])
    assert any_store.read("a/b") == b"hello world"
    assert any_store.read("a/b", 6, 3) == b"wor"
    assert any_store.read("a/b", 9, 100) == b"ld"
    assert any_store.read("a/b", 4) == b"o world"
    assert any_store.read("a/b", 3, 0) == b""
    assert any_store.read("a/b", 11, 5) == b""
    assert any_store.read("a/b", 99) == b""
    stat = any_store.stat("a/b")
    assert stat is not None and (stat.key, stat.size_bytes) == ("a/b", 11)


def test_an_empty_object(any_store: Store) -> None:
    any_store.put("empty", [])
    assert any_store.read("empty") == b""
    stat = any_store.stat("empty")
    assert stat is not None and stat.size_bytes == 0


@pytest.mark.parametrize("size", [PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES + 12345])
def test_objects_of_several_parts(any_store: Store, size: int) -> None:
    data = _bytes(size)
    # Chunks that have nothing to do with parts.
    any_store.put("large", (data[i : i + 5_000_001] for i in range(0, size, 5_000_001)))
    assert any_store.read("large") == data
    assert any_store.read("large", PART_BYTES - 7, 14) == data[PART_BYTES - 7 : PART_BYTES + 7]
    assert list(any_store.unfinished()) == []


def test_put_replaces(any_store: Store) -> None:
    any_store.put("key", [b"long old content"])
    any_store.put("key", [b"new"])
    assert any_store.read("key") == b"new"


@pytest.mark.parametrize("size", [10, 3 * PART_BYTES])
def test_a_put_that_breaks_off_leaves_the_old_object_and_no_debris(
    any_store: Store, size: int
) -> None:
    any_store.put("a/key", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield bytes(size)
        raise RuntimeError("source died")

    with pytest.raises(RuntimeError, match="source died"):
        any_store.put("a/key", chunks())
    assert any_store.read("a/key") == b"old"
    assert any_store.children("a") == ["key"]
    assert list(any_store.unfinished()) == []


def test_readers_see_the_old_object_or_the_new_one(any_store: Store) -> None:
    contents = {bytes([letter]) * 100_000 for letter in b"abcd"}
    any_store.put("key", [b"a" * 100_000])

    def write() -> None:
        for content in sorted(contents) * 5:
            any_store.put("key", [content[:50_000], content[50_000:]])

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        while not writing.done():
            assert any_store.read("key") in contents
        writing.result()


def test_children_lists_one_level_and_walk_everything(any_store: Store) -> None:
    keys = ["runs/a/blocks/0/record.json", "runs/a/spec.json", "runs/b c/ü.json", "runs/é+%20&"]
    for key in (*keys, "runsaway"):
        any_store.put(key, [key.encode()])
    assert any_store.children("runs") == ["a", "b c", "é+%20&"]
    assert any_store.children("runs/a") == ["blocks", "spec.json"]
    assert any_store.children("nothing") == []
    found = {stat.key: stat.size_bytes for stat in any_store.walk("runs")}
    assert found == {key: len(key.encode()) for key in keys}


def test_listings_of_more_than_a_page(s3_store: S3Store) -> None:
    names = [f"{number:04d}" for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: s3_store.put(f"many/{name}", [b"x"]), names))
    assert s3_store.children("many") == names
    assert [stat.key for stat in s3_store.walk("many")] == [f"many/{name}" for name in names]


def test_modified_follows_the_writes(any_store: Store) -> None:
    any_store.put("first", [b"x"])
    any_store.put("second", [b"x"])
    first, second = any_store.stat("first"), any_store.stat("second")
    assert first is not None and second is not None
    # The servers' clock is this machine's.
    assert abs(first.modified - time.time()) < 60
    assert abs(second.modified - time.time()) < 60


def test_deleting_twice_is_fine(any_store: Store) -> None:
    any_store.put("a/b", [b"x"])
    any_store.put("a/c", [b"x"])
    any_store.delete("a/b")
    any_store.delete("a/b")
    assert any_store.children("a") == ["c"]
    assert any_store.stat("a/b") is None


def test_absent_object(any_store: Store) -> None:
    assert any_store.stat("none") is None
    with pytest.raises(NotFoundError, match="has no none"):
        any_store.read("none")


@pytest.mark.parametrize(
    "key", ["", "/a", "a//b", "../a", "a/../b", ".hidden", "a/.b", "a\\b", "\0"]
)
def test_keys_cannot_leave_the_store(any_store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="is not a key"):
        any_store.put(key, [b"x"])
    with pytest.raises(StoreError, match="is not a key"):
        any_store.read(key)


def test_probe_leaves_nothing(any_store: Store) -> None:
    probe(any_store)
    assert any_store.children("probes") == []


def test_a_store_that_lists_nothing_is_refused(tmp_path: Path) -> None:
    class Unlisted(LocalStore):
        def children(self, prefix: str) -> list[str]:
            return []

    with pytest.raises(InputError, match="does not list what it was given"):
        probe(Unlisted(tmp_path / "store"))


def test_travels_to_tasks(any_store: Store) -> None:
    assert pickle.loads(pickle.dumps(any_store)) == any_store


def test_a_uri_finds_the_same_store(any_store: Store) -> None:
    any_store.put("a/b", [b"x"])
    assert open_store(any_store.uri).read("a/b") == b"x"
    store, key = open_object(f"{any_store.uri}/a/b")
    assert store.read(key) == b"x"


def test_a_folder_that_cannot_be_written_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = LocalStore(tmp_path / "file" / "store")
    with pytest.raises(InputError, match="you may write"):
        probe(store)


@pytest.mark.parametrize("uri", ["/corpus.txt", "file:///corpus.txt"])
def test_an_object_at_the_root_is_not_one_of_the_working_folder(uri: str) -> None:
    store, key = open_object(uri)
    assert (store, key) == (LocalStore(Path("/")), "corpus.txt")


def test_the_home_of_nobody() -> None:
    with pytest.raises(InputError, match="~nobody-here/x is the home of nobody"):
        open_store("~nobody-here/x")


def test_opens_paths_and_file_uris(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        assert open_store(uri) == LocalStore(tmp_path / "a b")


@pytest.mark.parametrize("uri", ["s3://[b/x", "file://[x", "file:///data/run#1", "file:///a?b"])
def test_refuses_what_is_no_uri(uri: str) -> None:
    with pytest.raises(InputError, match="write "):
        open_store(uri)


@pytest.mark.parametrize("uri", ["gs://bucket/x", "ftp://host/x", "file://elsewhere/x"])
def test_refuses_unknown_schemes(uri: str) -> None:
    with pytest.raises(InputError, match="unknown scheme"):
        open_store(uri)


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://b/../x", "s3://b/a//b", "s3://b/x?y"])
def test_refuses_uris_that_name_no_prefix(uri: str) -> None:
    with pytest.raises(InputError, match="write s3://bucket/prefix"):
        open_store(uri)


def test_a_prefix_sees_nothing_beside_itself(
    start_server: Callable[..., object], connect: Callable[..., Store]
) -> None:
    server = start_server("rclone")
    outer, inner = connect(server, prefix="here"), connect(server, prefix="here/in")
    outer.put("input", [b"x"])
    outer.put("in/side", [b"y"])
    assert inner.children("side") == []
    assert [stat.key for stat in inner.walk("side")] == []
    assert inner.read("side") == b"y"
    assert outer.children("in") == ["side"]
