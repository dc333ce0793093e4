"""What gc finds and removes, on a store of each kind: all that is dead, nothing that is alive."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts import keys
from mbq.artifacts.digests import PART_BYTES, Digest
from mbq.artifacts.documents import BlockRecord
from mbq.artifacts.errors import CorruptError, NotFoundError, StoreError
from mbq.artifacts.garbage import GRACE_SECONDS, find_garbage, remove_garbage
from mbq.artifacts.multipart import UploadLost
from mbq.artifacts.runs import put_blob
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.sealed import put_document
from mbq.artifacts.store import LocalStore, Store

# Everything is older than this: the clocks of servers tick in seconds.
_AT_ONCE = -5.0


def _name(store: Store, blob: Digest, run: str = "run") -> None:
    record = BlockRecord(
        block=0,
        blob=blob,
        hardware="test",
        loss_before={},
        loss_after={},
        outlier_overlap={},
        attempt=1,
        seconds=1.0,
    )
    put_document(store, keys.block_key(run, 0), record)


def _abandon(store: Store, key: str = "blobs/sha256/ab/x") -> int:
    """Leave behind what a killed writer leaves; returns its size."""
    if isinstance(store, LocalStore):
        partial = store.path(key).parent / ".partial-0123456789abcdef"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(bytes(1000))
        return 1000
    assert isinstance(store, S3Store)
    upload = store._begin_upload(key)
    arguments = {"Bucket": store.bucket, "Key": f"{store.prefix}/{key}"}
    store._client.upload_part(**arguments, UploadId=upload, PartNumber=1, Body=bytes(PART_BYTES))
    return PART_BYTES


def test_removes_what_nobody_names_and_nothing_else(any_store: Store) -> None:
    kept = put_blob(any_store, [b"named"])
    dropped = put_blob(any_store, [b"not ", b"named"])
    _name(any_store, kept)
    any_store.put("probes/0123456789abcdef", [b"mbq"])
    for theirs in ("something/else", "blobs/of/others", "probes/left"):
        any_store.put(theirs, [b"of another program"])
    partial = _abandon(any_store)
    garbage = find_garbage(any_store, _AT_ONCE)
    assert {stat.key for stat in garbage.objects} == {
        keys.blob_key(dropped.sha256),
        "probes/0123456789abcdef",
    }
    assert [found.key.rpartition("/")[0] for found in garbage.unfinished] == ["blobs/sha256/ab"]
    assert garbage.size_bytes == len(b"not named") + len(b"mbq") + partial
    remove_garbage(any_store, garbage)
    assert any_store.read(keys.blob_key(kept.sha256)) == b"named"
    assert any_store.read("something/else") == b"of another program"
    assert any_store.stat(keys.blob_key(dropped.sha256)) is None
    assert list(any_store.unfinished()) == []
    left = find_garbage(any_store, _AT_ONCE)
    assert (left.objects, left.unfinished) == ((), ())


def test_what_other_programs_began_is_theirs(any_store: Store) -> None:
    _name(any_store, put_blob(any_store, [b"of its own"]))
    _abandon(any_store, "backups/today")
    garbage = find_garbage(any_store, _AT_ONCE)
    assert (garbage.objects, garbage.unfinished) == ((), ())
    (theirs,) = any_store.unfinished()
    any_store.discard(theirs)


def test_a_link_of_another_program_that_leads_nowhere_is_no_matter(store: LocalStore) -> None:
    _name(store, put_blob(store, [b"of its own"]))
    (store.root / "theirs").symlink_to("gone")
    assert find_garbage(store, _AT_ONCE).objects == ()


def test_the_young_stay(any_store: Store) -> None:
    put_blob(any_store, [b"somebody may be about to name this"])
    _abandon(any_store)
    garbage = find_garbage(any_store, GRACE_SECONDS)
    assert (garbage.objects, garbage.unfinished) == ((), ())


def test_what_is_named_within_a_day_stays(store: LocalStore) -> None:
    # Literal hours: how long the documents promise to wait does not follow a constant.
    hours = {"23": 23.0, "25": 25.0}
    blobs = {name: put_blob(store, [name.encode()]) for name in hours}
    paths = {name: store.path(keys.blob_key(blob.sha256)) for name, blob in blobs.items()}
    for name in hours:
        paths[f"partial {name}"] = paths[name].with_name(f".partial-{name}")
        paths[f"partial {name}"].write_bytes(b"x")
    for name, path in paths.items():
        written = time.time() - hours[name[-2:]] * 3600
        os.utime(path, (written, written))
    garbage = find_garbage(store)
    assert [stat.key for stat in garbage.objects] == [keys.blob_key(blobs["25"].sha256)]
    assert [found.handle for found in garbage.unfinished] == [str(paths["partial 25"])]
    remove_garbage(store, garbage)
    assert [name for name, path in paths.items() if path.exists()] == ["23", "partial 23"]


def test_never_outside_the_prefix(s3_store: S3Store) -> None:
    beside = S3Store(s3_store.bucket, f"{s3_store.prefix}-beside", 20.0)
    blob = put_blob(beside, [b"of a neighbour"])
    _abandon(beside)
    _name(s3_store, put_blob(s3_store, [b"of its own"]))
    garbage = find_garbage(s3_store, _AT_ONCE)
    assert (garbage.objects, garbage.unfinished) == ((), ())
    (upload,) = beside.unfinished()
    beside.discard(upload)
    beside.discard(upload)
    assert beside.read(keys.blob_key(blob.sha256)) == b"of a neighbour"


def test_a_document_that_cannot_be_trusted_stops_it(any_store: Store) -> None:
    blob = put_blob(any_store, [b"named"])
    _name(any_store, blob)
    key = keys.block_key("run", 0)
    any_store.put(key, [any_store.read(key).replace(blob.sha256.encode(), b"0" * 64)])
    with pytest.raises(CorruptError, match="is not as it was written"):
        find_garbage(any_store, _AT_ONCE)
    assert any_store.read(keys.blob_key(blob.sha256)) == b"named"


def test_a_run_behind_a_link_is_seen(store: LocalStore, tmp_path: Path) -> None:
    kept = put_blob(store, [b"named"])
    _name(store, kept)
    elsewhere = tmp_path / "another disk"
    (store.root / "runs/run").rename(elsewhere)
    (store.root / "runs/run").symlink_to(elsewhere)
    assert find_garbage(store, _AT_ONCE).objects == ()
    elsewhere.rename(tmp_path / "not mounted")
    with pytest.raises(StoreError, match="cannot list"):
        find_garbage(store, _AT_ONCE)


def test_where_nothing_is_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="holds no runs and no blobs"):
        find_garbage(LocalStore(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()


def test_what_was_written_again_meanwhile_stays(store: LocalStore) -> None:
    blob = put_blob(store, [b"old work"])
    path = store.path(keys.blob_key(blob.sha256))
    yesterday = time.time() - 2 * GRACE_SECONDS
    os.utime(path, (yesterday, yesterday))
    garbage = find_garbage(store)
    assert len(garbage.objects) == 1
    # The same work comes up again before the removal: an old blob is written again.
    assert put_blob(store, [b"old ", b"work"]) == blob
    _name(store, blob)
    remove_garbage(store, garbage)
    assert path.read_bytes() == b"old work"


def test_every_blob_of_a_run_is_named(finished_run: Any, tmp_path: Path) -> None:
    garbage = find_garbage(finished_run.store, _AT_ONCE)
    assert garbage.objects == ()
    assert len(list(finished_run.store.walk(keys.BLOBS))) >= 3


def test_discarding_an_upload_in_progress_costs_its_writer_a_repetition(
    s3_store: S3Store,
) -> None:
    data = [bytes([n]) * PART_BYTES for n in range(7)]

    def chunks() -> Any:
        for number, chunk in enumerate(data):
            if number == 6:
                for upload in s3_store.unfinished():
                    s3_store.discard(upload)
            yield chunk

    with pytest.raises(UploadLost):
        s3_store.put("key", chunks())
    assert s3_store.stat("key") is None
    s3_store.put("key", data)
    assert s3_store.read("key") == b"".join(data)
