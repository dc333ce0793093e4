"""Bring a packed checkpoint, whole or cut to fewer bits, from a store to a folder.

    manifest first -> missing parts, several at a time, each checked -> index and config last

A file being fetched lies beside its place under a hidden name, at full size; what of it is right is
found by its digests, not by a journal. So a pull that was killed fetches only the parts that are
not there, one that is repeated fetches nothing, a damaged file is mended part by part, and a folder
of 4 bits becomes one of 8 by the files it lacks. Until the end there is no config.json that names
what is not there.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.config import CONFIG_FILE, config_bits, cut_config
from mbq.artifacts.digests import Digest, is_part, read_part
from mbq.artifacts.documents import Manifest
from mbq.artifacts.errors import CorruptError, InputError, StoreError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import (
    READERS,
    PackedCheckpoint,
    Piece,
    Report,
    foreign_files,
    make_index,
    pieces_of,
)
from mbq.artifacts.sealed import find_document, put_document
from mbq.artifacts.store import PARTIAL, LocalStore, Store, sync_folder


@dataclass(frozen=True)
class Pulled:
    """What a pull did.

    Attributes:
        fetched_bytes, kept_bytes: of the files that the width needs.
    """

    max_bits: int
    fetched_bytes: int
    kept_bytes: int


def pull(
    checkpoint: PackedCheckpoint, folder: Path, max_bits: int | None, report: Report
) -> Pulled:
    """Make a folder hold the checkpoint at `max_bits`, by default all that are there.

    Raises:
        InputError: the width does not exist or is not there, or the folder holds something else or
            cannot be written.
        CorruptError: the store holds other bytes than its manifest says.
        StoreError: the store or the disk failed; the next pull goes on from here.
    """
    source = checkpoint.store
    if isinstance(source, LocalStore) and source.root.resolve() == folder.resolve():
        raise InputError(f"{folder} is where the checkpoint lies; pull into another folder")
    original, held = checkpoint.config()
    max_bits = held if max_bits is None else max_bits
    files = checkpoint.files(max_bits)
    if max_bits > held:
        raise InputError(
            f"--max-bits {max_bits}: {source.uri} holds {held} bits of its checkpoint; pull from "
            "one that was not cut"
        )
    with _errors(folder), _locked(folder):
        _check_folder(checkpoint, original, folder, max_bits)
        local = LocalStore(folder)
        if foreign := foreign_files(local, checkpoint.manifest):
            raise InputError(
                f"{folder} holds {' and '.join(foreign)}, which transformers would load instead of "
                "the checkpoint; remove that, or pull into another folder"
            )
        with ThreadPoolExecutor(READERS) as pool:
            # Before anything is laid out: a manifest may promise whatever it likes.
            _check_room(
                folder, sum(max(0, d.size_bytes - _held(folder, n)) for n, d in files.items())
            )
            found = pool.map(lambda item: _prepare(folder, *item), files.items())
            missing = [piece for pieces in found for piece in pieces]
            total = sum(digest.size_bytes for digest in files.values())
            fetched = sum(piece.size_bytes for piece in missing)
            put_document(local, MANIFEST_FILE, checkpoint.manifest)
            done = total - fetched
            for piece in pool.map(lambda p: _fetch(checkpoint.store, folder, p), missing):
                done += piece.size_bytes
                report(done / total)
        for name in files:
            _give_name(folder, name)
        # Of pulls that were killed, and of more bits than these.
        for leftover in folder.glob(f"{PARTIAL}*"):
            leftover.unlink()
        local.put(INDEX_FILE, [make_index(local, files)])
        local.put(CONFIG_FILE, [cut_config(original, max_bits)])
    return Pulled(max_bits, fetched, total - fetched)


def _check_folder(
    checkpoint: PackedCheckpoint, original: bytes, folder: Path, max_bits: int
) -> None:
    """Refuse a folder that a pull would spoil; what is damaged there is mended."""
    try:
        known = find_document(LocalStore(folder), MANIFEST_FILE, Manifest)
    except CorruptError:
        known = None
    if known is not None and known != checkpoint.manifest:
        raise InputError(
            f"{folder} holds another checkpoint, or another packing of run "
            f"{checkpoint.manifest.run}; pull into another folder"
        )
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    try:
        config = path.read_bytes()
        held = config_bits(config)
        ours = cut_config(config, checkpoint.manifest.max_bits) == original
    except CorruptError:
        held, ours = 0, False
    if known is None and not ours:
        raise InputError(f"{folder} holds another model; pull into another folder")
    # A damaged config may claim what is not there.
    complete = held in checkpoint.ceilings and all(
        (folder / name).is_file() for name in checkpoint.files(held)
    )
    if held > max_bits and complete:
        raise InputError(
            f"{folder} holds this checkpoint at {held} bits already; pull {max_bits} bits into "
            "another folder"
        )


def _prepare(folder: Path, name: str, digest: Digest) -> list[Piece]:
    """The parts of a file that are not there, or not right; they have a place to go to."""
    path, partial = folder / name, _partial(folder, name)
    pieces = pieces_of(name, digest)
    if path.is_file():
        if path.stat().st_size == digest.size_bytes and not _wrong(path, pieces):
            partial.unlink(missing_ok=True)
            return []
        # The config tells of what is there, and that is no longer so.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        path.replace(partial)
    # What is linked to lies elsewhere, and is not ours to write.
    if partial.is_symlink() or (partial.exists() and partial.stat().st_nlink > 1):
        partial.unlink()
    fresh = not partial.exists()
    with partial.open("ab") as file:
        file.truncate(digest.size_bytes)
    return pieces if fresh else _wrong(partial, pieces)


def _held(folder: Path, name: str) -> int:
    """Bytes of a file that are on the disk already."""
    paths = folder / name, _partial(folder, name)
    return max(path.stat().st_blocks * 512 if path.is_file() else 0 for path in paths)


def _wrong(path: Path, pieces: Sequence[Piece]) -> list[Piece]:
    wrong = []
    with path.open("rb") as file:
        for piece in pieces:
            if not is_part(piece.digest, piece.part, file.read(piece.size_bytes)):
                wrong.append(piece)
    return wrong


def _fetch(store: Store, folder: Path, piece: Piece) -> Piece:
    data = read_part(store, piece.file, piece.digest, piece.part)
    with _partial(folder, piece.file).open("r+b") as file:
        file.seek(piece.start)
        file.write(data)
        file.flush()
        # Beside the other parts' transfers, not after all of them.
        os.fdatasync(file.fileno())
    return piece


def _give_name(folder: Path, name: str) -> None:
    """Give a complete file its name."""
    partial = _partial(folder, name)
    if not partial.is_file():
        return
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(folder / name)
    sync_folder(folder)


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise InputError(
            f"{folder}: {needed_bytes:,} bytes are missing, the disk has {free:,} free; make room, "
            "or pull fewer bits with --max-bits"
        )


def _partial(folder: Path, name: str) -> Path:
    return folder / f"{PARTIAL}{name}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other pulls out of a folder, which is made if it is not there."""
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give one that exists or can be made")
        folder.mkdir(parents=True, exist_ok=True)
        # Asking for permissions would say nothing of a disk that is read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write into {folder} ({error.strerror}); pull into a folder that you may write"
        ) from error
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise InputError(f"another pull writes to {folder}; wait for its end") from error
    finally:
        os.close(handle)


@contextlib.contextmanager
def _errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"cannot write {folder}: {error.strerror or error}") from error
