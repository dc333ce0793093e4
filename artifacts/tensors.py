"""Safetensors written by hand: our own tensor order, streamed, and the same bytes every time.

The library's writer sorts tensors and needs all of them in memory. Here the header follows from
names, dtypes and shapes alone, so it is written before any data exists, padded with spaces so that
the data starts at a multiple of 4096 bytes (planes of real models then start at page boundaries).

    header = encode_header([Entry("a.plane_0", "I32", (256, 8))])
    file   = header + data of each entry in that order, no holes
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mbq.artifacts.errors import CorruptError
from mbq.artifacts.store import Store

ALIGNMENT_BYTES = 4096
PART_BYTES = 16 * 1024 * 1024
_MAX_HEADER_BYTES = 100_000_000
# Those that a checkpoint we quantize or write may hold.
_DTYPE_BYTES = {"U8": 1, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Digest:
    """What bytes are: sha256 of the whole and of every 16 MiB part."""

    sha256: str
    size_bytes: int
    part_sha256: tuple[str, ...]


def encode_header(entries: Sequence[Entry]) -> bytes:
    """Length, JSON and padding that precede the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.size_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded = -(-(8 + len(text)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES - 8
    return struct.pack("<Q", padded) + text.ljust(padded)


def encode(entries: Sequence[Entry], data: Iterable[bytes]) -> Iterator[bytes]:
    """A whole file in chunks: the header, then the data of each entry.

    Raises:
        ValueError: the data of an entry has the wrong size.
    """
    yield encode_header(entries)
    for entry, chunk in zip(entries, data, strict=True):
        if len(chunk) != entry.size_bytes:
            raise ValueError(
                f"{entry.name}: {entry.dtype} {list(entry.shape)} is {entry.size_bytes} bytes, "
                f"got {len(chunk)}"
            )
        yield chunk


class Digester:
    """Passes chunks through and remembers what they were."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._size_bytes = 0
        self._part = hashlib.sha256()
        self._parts: list[str] = []

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._whole.update(chunk)
            self._update_parts(memoryview(chunk))
            yield chunk

    def digest(self) -> Digest:
        parts = list(self._parts)
        if self._size_bytes % PART_BYTES:
            parts.append(self._part.hexdigest())
        return Digest(self._whole.hexdigest(), self._size_bytes, tuple(parts))

    def _update_parts(self, view: memoryview) -> None:
        while view:
            room = PART_BYTES - self._size_bytes % PART_BYTES
            self._part.update(view[:room])
            self._size_bytes += len(view[:room])
            if self._size_bytes % PART_BYTES == 0:
                self._parts.append(self._part.hexdigest())
                self._part = hashlib.sha256()
            view = view[room:]


def digest_of(chunks: Iterable[bytes]) -> Digest:
    digester = Digester()
    for _ in digester.through(chunks):
        pass
    return digester.digest()


def read_chunks(store: Store, key: str) -> Iterator[bytes]:
    """An object in parts of 16 MiB."""
    size = store.size(key) or 0
    for start in range(0, size, PART_BYTES):
        yield store.read(key, start, PART_BYTES)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors object in a store, read tensor by tensor with ranged reads."""

    store: Store
    key: str
    entries: dict[str, Entry]
    starts: dict[str, int]

    def read(self, name: str) -> bytes:
        """Bytes of one tensor, row-major, little-endian.

        Raises:
            CorruptError: there is no such tensor, or the object ends before it does.
        """
        if name not in self.entries:
            raise CorruptError(f"{self.key} holds no tensor {name}; it was packed by another plan")
        size = self.entries[name].size_bytes
        data = self.store.read(self.key, self.starts[name], size)
        if len(data) != size:
            raise CorruptError(f"{self.key} ends inside {name}: {len(data)} of {size} bytes")
        return data


def open_tensors(store: Store, key: str) -> TensorFile:
    """Read and check the header of a safetensors object.

    Raises:
        CorruptError: the header is not that of a safetensors file of this size.
    """
    prefix = store.read(key, 0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise CorruptError(f"{key} is not a safetensors file: it announces a {length} byte header")
    entries: dict[str, Entry] = {}
    starts: dict[str, int] = {}
    end = 0
    try:
        header = json.loads(store.read(key, 8, length))
        header.pop("__metadata__", None)
        for name, fields in header.items():
            entry = Entry(name, str(fields["dtype"]), tuple(int(n) for n in fields["shape"]))
            start, stop = fields["data_offsets"]
            if start != end or stop - start != entry.size_bytes or min(entry.shape, default=0) < 0:
                raise CorruptError(f"{key}: {name} does not lie where its shape says")
            entries[name], starts[name] = entry, 8 + length + start
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{key} has a broken header: {error}") from error
    if store.size(key) != 8 + length + end:
        raise CorruptError(
            f"{key} has {store.size(key)} bytes, its header promises {8 + length + end}"
        )
    return TensorFile(store, key, entries, starts)
