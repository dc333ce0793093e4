"""Checkpoints and actions that the tests of faults share."""

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.config import CONFIG_FILE
from mbq.artifacts.digests import PART_BYTES, Digest, digest_of
from mbq.artifacts.documents import BlockRecord, Manifest
from mbq.artifacts.errors import CorruptError, InputError, StoreError
from mbq.artifacts.packed import Report, make_index, open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.s3 import S3Store
from mbq.artifacts.sealed import put_document
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import LocalStore, Store
from mbq.artifacts.tensors import Entry, encode
from tests.support.proxy import Proxy

FOR_EVER = 10**6
# All that a call may raise about something that exists.
LOUD = (StoreError, CorruptError, InputError)
BASE, LOWER, UPPER = (f"model-{name}-00001-of-00001.safetensors" for name in ("base", "0", "1"))

Linked = Callable[..., tuple[S3Store, Proxy]]


def noise(size: int) -> bytes:
    """Bytes of which no two parts are alike."""
    noise = os.urandom(1 << 20)
    pieces = (b"%16d" % start + noise[16:] for start in range(0, size, 1 << 20))
    return b"".join(pieces)[:size]


def make_record(blob: Digest) -> BlockRecord:
    fields: dict[str, Any] = {"loss_before": {}, "loss_after": {}, "outlier_overlap": {}}
    return BlockRecord(block=0, blob=blob, hardware="cpu", attempt=1, seconds=1.0, **fields)


def pack(folder: Path, parts: dict[str, int]) -> Path:
    """A checkpoint of two slices whose weight files have that many full parts and a bit."""
    local = LocalStore(folder)
    for name, full in parts.items():
        data = noise(full * PART_BYTES + 50_000)
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
        files={name: digest_of([local.read(name)]) for name in file_names(folder)},
        slice_files=((LOWER,), (UPPER,)),
        blocks=(),
        hardware=(),
    )
    put_document(local, "manifest.json", manifest)
    return folder


def file_names(folder: Path) -> list[str]:
    """The files of a folder, hidden ones as well."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def same(first: Path, second: Path) -> bool:
    names = file_names(first)
    same = ((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    return names == file_names(second) and all(same)


def upload(folder: Path, store: Store) -> None:
    for name in file_names(folder):
        store.put(name, [(folder / name).read_bytes()])


def pull_all(store: Store, folder: Path, report: Report = lambda _: None) -> int:
    return pull(open_checkpoint(store), folder, None, report).fetched_bytes


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def outcome_of(action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:
        return error


def when(proxy: Proxy, method: str, path: str, number: int, action: Callable[[], Any]) -> None:
    """Act once, before the numbered request of that kind is forwarded."""
    counter = count(1)

    def act(asked: str, where: str) -> None:
        if asked == method and path in where and next(counter) == number:
            action()

    proxy.on_request = act
