"""Safetensors written by hand: our own tensor order, streamed, and the same bytes every time.

The library's writer sorts tensors and needs all of them in memory. Here the header follows from
names, dtypes and shapes alone, so it is written before any data exists, padded with spaces so that
the data starts at a multiple of 4096 bytes (planes of real models then start at page boundaries).

    header = encode_header([Entry("a.plane_0", "I32", (256, 8))])
    file   = header + data of each entry in that order, no holes

What is read back is held against the digests of the parts it lies in (`digests.py`).
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mbq.artifacts.digests import CheckedObject, Digest
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.store import Store

ALIGNMENT_BYTES = 4096
# The library allows 100 MB, which as JSON of the worst kind are gigabytes of objects.
_MAX_HEADER_BYTES = 16 * 1024 * 1024
_MAX_ELEMENTS = 2**60
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _DTYPE_BYTES[self.dtype]


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


@dataclass(frozen=True)
class TensorFile:
    """A safetensors object in a store, read tensor by tensor with ranged reads.

    Attributes:
        starts: where each tensor begins in the object, in bytes.
        read_range: reads `length` bytes from `start` on.
    """

    key: str
    entries: dict[str, Entry]
    starts: dict[str, int]
    read_range: Callable[[int, int], bytes]

    def read(self, name: str) -> bytes:
        """Bytes of one tensor, row-major, little-endian.

        Raises:
            CorruptError: there is no such tensor, or the object ends before it does.
        """
        if name not in self.entries:
            raise CorruptError(f"{self.key} holds no tensor {name}; it was packed by another plan")
        size = self.entries[name].size_bytes
        data = self.read_range(self.starts[name], size)
        if len(data) != size:
            raise CorruptError(f"{self.key} ends inside {name}: {len(data)} of {size} bytes")
        return data


def open_tensors(store: Store, key: str, digest: Digest | None = None) -> TensorFile:
    """Read and check the header of a safetensors object.

    Args:
        digest: what the object is; every byte read is then held against it.

    Raises:
        CorruptError: the header is not that of a safetensors file of this size, or the bytes are
            not those of the digest.
    """
    read_range = (
        partial(store.read, key) if digest is None else CheckedObject(store, key, digest).read
    )
    prefix = read_range(0, 8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= _MAX_HEADER_BYTES:
        raise CorruptError(f"{key} is not a safetensors file: it announces a {length} byte header")
    entries, starts = _parse_header(key, read_range(8, length), 8 + length)
    end = max(
        (starts[name] + entry.size_bytes for name, entry in entries.items()), default=8 + length
    )
    size = _size(store, key) if digest is None else digest.size_bytes
    if size != end:
        raise CorruptError(f"{key} has {size} bytes, its header promises {end}")
    return TensorFile(key, entries, starts, read_range)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that repeats no name: parsers disagree on which of its values counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _parse_header(
    key: str, text: bytes, data_start: int
) -> tuple[dict[str, Entry], dict[str, int]]:
    """Tensors and where they begin; they follow each other without a gap."""
    entries: dict[str, Entry] = {}
    starts: dict[str, int] = {}
    end = 0
    try:
        header = json.loads(text.decode(), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        for name, fields in header.items():
            entry = Entry(_checked_name(name), fields["dtype"], _checked_shape(fields["shape"]))
            start, stop = fields["data_offsets"]
            if type(start) is not int or type(stop) is not int:
                raise ValueError("an offset is no integer")
            if start != end or stop - start != entry.size_bytes:
                raise CorruptError(f"{key}: {name} does not lie where its shape says")
            entries[name], starts[name] = entry, data_start + start
            end = stop
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise CorruptError(f"{key} has a broken header: {error!s:.200}") from error
    return entries, starts


def _checked_name(name: str) -> str:
    if not 0 < len(name.encode()) <= 255:
        raise ValueError("a name is empty or has more than 255 bytes")
    return name


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """Sizes whose product, however many there are, stays a number that a file can have."""
    if not isinstance(shape, list):
        raise ValueError("a shape is no list")
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < _MAX_ELEMENTS:
            raise ValueError("a shape holds what is no size")
        count *= max(size, 1)
        if count >= _MAX_ELEMENTS:
            raise ValueError("a shape is larger than any file")
    return tuple(shape)


def _size(store: Store, key: str) -> int:
    stat = store.stat(key)
    return stat.size_bytes if stat else 0
