"""A pull over bad lines, from damaged stores, into damaged folders and full disks, and killed."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest

from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.config import CONFIG_FILE
from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError, StoreError
from mbq.artifacts.packed import READERS, open_checkpoint, verify
from mbq.artifacts.store import LocalStore
from tests.conftest import FinishedRun
from tests.support import servers
from tests.support.faulty import (
    BASE,
    FOR_EVER,
    LOUD,
    LOWER,
    UPPER,
    Linked,
    flip,
    outcome_of,
    pack,
    pull_all,
    same,
    upload,
    when,
)
from tests.support.proxy import FAULTS, Fault
from tests.support.servers import BUCKET, Server


@pytest.mark.parametrize("fault", FAULTS)
def test_a_pull_survives_what_passes_and_goes_on_after_what_did_not(
    shared: Linked, synthetic: Path, tmp_path: Path, fault: Fault
) -> None:
    store, proxy = shared(stall_seconds=1.0 if "stall" in fault else 30.0)
    total = sum(digest.size_bytes for digest in open_checkpoint(store).files(4).values())
    proxy.inject(fault, FOR_EVER, "GET", UPPER)
    try:
        assert pull_all(replace(store, patience_seconds=0.3), tmp_path) == total
    except LOUD as error:
        assert ".safetensors" in str(error)
        assert not (tmp_path / CONFIG_FILE).exists()
    proxy.clear()
    (tmp_path / LOWER).unlink(missing_ok=True)
    for name in ("manifest.json", CONFIG_FILE, LOWER, UPPER):
        if fault != "ignore-range":
            proxy.inject(fault, 1, "GET", name)
    assert pull_all(store, tmp_path) < total
    assert same(synthetic, tmp_path)
    assert verify(open_checkpoint(LocalStore(tmp_path)), lambda _: None) == []
    assert {e.fault for e in proxy.exchanges} == {None, fault}


@pytest.mark.parametrize("server", servers.NAMES)
def test_a_real_checkpoint_over_a_bad_line(
    linked: Linked, server: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    store, proxy = linked(server)
    upload(finished_run.checkpoint, store)
    for fault in ("error-500", "reset-midway", "wrong-bytes", "truncated"):
        proxy.inject(fault, 2, "GET", ".safetensors")
    pull_all(store, tmp_path)
    assert same(finished_run.checkpoint, tmp_path)


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
    big = pack(server.folder / "data" / BUCKET / "big", {BASE: 0, LOWER: 9, UPPER: 9})
    server.restart()
    pulled, missing, chance = tmp_path / "pulled", 21, random.Random(2)
    # Later than there are readers, so that something is kept; then at any time.
    for moment in (chance.randrange(10, 13), *(chance.randrange(1, 4) for _ in range(4))):
        # A new proxy each time: requests of the dead arrive late.
        _, proxy = linked(server, prefix="big")
        process = subprocess.Popen([sys.executable, "-c", PULL, BUCKET, "big", str(pulled)])
        when(proxy, "GET", ".safetensors", moment, process.kill)
        assert process.wait() < 0
        assert not (pulled / CONFIG_FILE).exists()
        missing -= max(0, moment - READERS)
    store, proxy = linked(server, prefix="big", stall_seconds=30.0)
    pull_all(store, pulled)
    assert 0 < sum(".safetensors" in e.path for e in proxy.exchanges) <= missing
    assert same(big, pulled)


def test_a_full_disk_is_an_error_and_the_next_pull_goes_on(
    shared: Linked, synthetic: Path, tmp_path: Path
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
            pull_all(store, folder)
        filler.unlink()
        proxy.on_request = lambda _, path: None if UPPER not in path else full.wait(30) and None
        with pytest.raises(StoreError, match="No space left on device"):
            pull_all(store, folder, fill_after_the_first_part)
        assert not (folder / CONFIG_FILE).exists()
        filler.unlink()
        total = sum(digest.size_bytes for digest in open_checkpoint(store).files(4).values())
        assert 0 < pull_all(store, folder) <= total - PART_BYTES
        assert same(synthetic, folder)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
def test_a_damaged_store_is_named_and_no_config_tells_of_what_is_not_there(
    linked: Linked, synthetic: Path, tmp_path: Path, damage: str
) -> None:
    store, _ = linked("rclone")
    upload(synthetic, store)
    pull_all(store, tmp_path / "mended")
    (tmp_path / "mended" / LOWER).write_bytes(b"")
    data = (synthetic / LOWER).read_bytes()
    if damage == "deleted":
        store.delete(LOWER)
    else:
        store.put(LOWER, [flip(data, PART_BYTES) if damage == "flipped" else data[:-1]])
    for name in ("new", "mended"):
        with pytest.raises((CorruptError, NotFoundError), match=LOWER):
            pull_all(store, tmp_path / name)
        assert not (tmp_path / name / CONFIG_FILE).exists()
    store.put(LOWER, [data])
    for name in ("new", "mended"):
        pull_all(store, tmp_path / name)
        assert same(synthetic, tmp_path / name)


def test_what_is_damaged_in_a_folder_is_named_and_only_that_is_mended(
    shared: Linked, synthetic: Path, tmp_path: Path
) -> None:
    store, proxy = shared()
    pull_all(store, tmp_path)
    size = (synthetic / LOWER).stat().st_size
    damages: list[tuple[str, Callable[[bytes], bytes | None], int]] = [
        (LOWER, lambda data: flip(data, PART_BYTES + 5), PART_BYTES),
        (LOWER, lambda data: data[: PART_BYTES + 5], size - PART_BYTES),
        (LOWER, lambda data: data + b"x", 0),
        (LOWER, lambda _: None, size),
        (INDEX_FILE, lambda data: flip(data, 50), 0),
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
        outcome = outcome_of(lambda: pull_all(store, tmp_path))
        asked = sum(e.received_bytes for e in proxy.exchanges[before:] if LOWER in e.path)
        if (outcome, asked) != (fetched, fetched) or not same(synthetic, tmp_path):
            failed.append((number, name, outcome, asked))
            path.write_bytes((synthetic / name).read_bytes())
    assert failed == []


def test_leftovers_of_a_killed_pull_replace_no_right_file_and_do_not_stay(
    shared: Linked, synthetic: Path, tmp_path: Path
) -> None:
    # Somebody copied into the folder what a killed pull did not bring.
    data = (synthetic / LOWER).read_bytes()
    (tmp_path / LOWER).write_bytes(data)
    (tmp_path / f".partial-{LOWER}").write_bytes(data[:PART_BYTES].ljust(len(data), b"\0"))
    # Others were killed while they wrote the manifest, or fetched more bits.
    (tmp_path / ".partial-0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".partial-model-2-00001-of-00001.safetensors").write_bytes(b"half")
    pull_all(shared()[0], tmp_path)
    assert (tmp_path / LOWER).read_bytes() == data
    assert same(synthetic, tmp_path)


def test_another_checkpoint_is_refused_and_spoils_nothing(
    shared: Linked, linked: Linked, synthetic: Path, tmp_path: Path
) -> None:
    pull_all(shared()[0], tmp_path / "pulled")
    other, _ = linked("rclone")
    upload(pack(tmp_path / "other", {BASE: 0, LOWER: 0, UPPER: 0}), other)
    with pytest.raises(InputError, match="another checkpoint"):
        pull_all(other, tmp_path / "pulled")
    assert same(synthetic, tmp_path / "pulled")
