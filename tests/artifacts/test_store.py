"""The contract of a store, on a real folder."""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from mbq.artifacts.errors import InputError, NotFoundError, StoreError
from mbq.artifacts.store import LocalStore, open_store, probe


def test_reads_back_what_was_put_whole_and_in_ranges(store: LocalStore) -> None:
    store.put("a/b", [b"hello ", b"", b"world"])
    assert store.read("a/b") == b"hello world"
    assert store.read("a/b", 6, 3) == b"wor"
    assert store.read("a/b", 9, 100) == b"ld"
    assert store.size("a/b") == 11


def test_put_replaces(store: LocalStore) -> None:
    store.put("key", [b"long old content"])
    store.put("key", [b"new"])
    assert store.read("key") == b"new"


def test_a_put_that_breaks_off_leaves_the_old_object_and_no_debris(store: LocalStore) -> None:
    store.put("a/key", [b"old"])

    def chunks() -> Iterator[bytes]:
        yield b"half of the n"
        raise RuntimeError("source died")

    with pytest.raises(RuntimeError, match="source died"):
        store.put("a/key", chunks())
    assert store.read("a/key") == b"old"
    assert os.listdir(store.root / "a") == ["key"]


def test_children_lists_one_level(store: LocalStore) -> None:
    for key in ("runs/b/spec.json", "runs/a/spec.json", "runs/a/blocks/0/record.json"):
        store.put(key, [b"x"])
    assert store.children("runs") == ["a", "b"]
    assert store.children("runs/a") == ["blocks", "spec.json"]
    assert store.children("nothing") == []


def test_deleting_twice_is_fine(store: LocalStore) -> None:
    store.put("a/b", [b"x"])
    store.put("a/c", [b"x"])
    store.delete("a/b")
    store.delete("a/b")
    assert store.children("a") == ["c"]
    assert store.size("a/b") is None


def test_absent_object(store: LocalStore) -> None:
    assert store.size("none") is None
    with pytest.raises(NotFoundError, match="has no none"):
        store.read("none")


@pytest.mark.parametrize(
    "key", ["", "/a", "a//b", "../a", "a/../b", ".hidden", "a/.b", "a\\b", "\0"]
)
def test_keys_cannot_leave_the_store(store: LocalStore, key: str) -> None:
    with pytest.raises(StoreError, match="is not a key"):
        store.put(key, [b"x"])
    with pytest.raises(StoreError, match="is not a key"):
        store.read(key)


def test_a_folder_that_cannot_be_written_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = LocalStore(tmp_path / "file" / "store")
    with pytest.raises(InputError, match="give a folder you may write to"):
        probe(store)


def test_probe_leaves_nothing(store: LocalStore) -> None:
    probe(store)
    assert os.listdir(store.root) == []


def test_opens_paths_and_file_uris(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a b"), (tmp_path / "a b").as_uri()):
        assert open_store(uri) == LocalStore(tmp_path / "a b")


@pytest.mark.parametrize("uri", ["gs://bucket/x", "ftp://host/x", "file://elsewhere/x"])
def test_refuses_unknown_schemes(uri: str) -> None:
    with pytest.raises(InputError, match="unknown scheme"):
        open_store(uri)


def test_travels_to_tasks(store: LocalStore) -> None:
    assert pickle.loads(pickle.dumps(store)) == store
