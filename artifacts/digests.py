"""What bytes are: sha256 of the whole and of every 16 MiB part; and reads that are held against it.

Nothing on the way is trusted to return what was written: not disks, networks, proxies or stores.
Objects are read by parts, each checked; what is wrong is asked for again before it is an error.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Self

from pydantic import Field, model_validator

from mbq.artifacts.errors import CorruptError
from mbq.artifacts.spec import Document
from mbq.artifacts.store import Store

PART_BYTES = 16 * 1024 * 1024
# How often bytes are asked for until they are believed to be wrong in the store itself.
READS = 4
# Tensors are read in order: the part at hand, and the one that the last tensor began in.
_PARTS_KEPT = 2

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Digest(Document):
    """What bytes are."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    part_sha256: tuple[Sha256, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.part_sha256) != -(-self.size_bytes // PART_BYTES):
            raise ValueError(
                f"{self.size_bytes} bytes do not have {len(self.part_sha256)} parts of {PART_BYTES}"
            )
        return self


class Digester:
    """Passes chunks through and remembers what they were."""

    def __init__(self) -> None:
        self._whole = hashlib.sha256()
        self._size_bytes = 0
        self._part = hashlib.sha256()
        self._parts: list[str] = []

    def through(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        # Hashing releases the interpreter's lock: the whole and the parts take a core each.
        with ThreadPoolExecutor(1) as beside:
            for chunk in chunks:
                whole = beside.submit(self._whole.update, chunk)
                self._update_parts(memoryview(chunk))
                whole.result()
                yield chunk

    def digest(self) -> Digest:
        parts = list(self._parts)
        if self._size_bytes % PART_BYTES:
            parts.append(self._part.hexdigest())
        return Digest(
            size_bytes=self._size_bytes, sha256=self._whole.hexdigest(), part_sha256=tuple(parts)
        )

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
    """An object in parts, unchecked."""
    stat = store.stat(key)
    for start in range(0, stat.size_bytes if stat else 0, PART_BYTES):
        yield store.read(key, start, PART_BYTES)


def part_size(digest: Digest, part: int) -> int:
    """Bytes of one part."""
    return min(PART_BYTES, digest.size_bytes - part * PART_BYTES)


def is_part(digest: Digest, part: int, data: bytes | memoryview) -> bool:
    return hashlib.sha256(data).hexdigest() == digest.part_sha256[part]


def read_part(store: Store, key: str, digest: Digest, part: int) -> bytes:
    """One part of an object.

    Raises:
        NotFoundError, StoreError: it cannot be read.
        CorruptError: it is not what the digest says, however often it is read.
    """
    for _ in range(READS):
        data = store.read(key, part * PART_BYTES, part_size(digest, part))
        if is_part(digest, part, data):
            return data
    raise CorruptError(
        f"{store.uri}/{key}: bytes from {part * PART_BYTES} on are not what was written; restore "
        "the object, or delete it and resume the run that wrote it"
    )


class CheckedObject:
    """An object of a known digest, read by ranges."""

    def __init__(self, store: Store, key: str, digest: Digest) -> None:
        self._store = store
        self._key = key
        self._digest = digest
        self._kept: dict[int, bytes] = {}

    def read(self, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length); fewer where the object ends. Raises as `read_part`."""
        size = self._digest.size_bytes
        end = size if length is None else min(start + length, size)
        pieces = []
        while start < end:
            part, offset = divmod(start, PART_BYTES)
            piece = self._part(part)[offset : offset + end - start]
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

    def _part(self, part: int) -> bytes:
        if part not in self._kept:
            while len(self._kept) >= _PARTS_KEPT:
                del self._kept[min(self._kept)]
            self._kept[part] = read_part(self._store, self._key, self._digest, part)
        return self._kept[part]
