"""Writing a large object in parts: a few at a time, and taken up where a killed writer stopped.

    find or begin an upload -> send the parts it does not have -> complete

Memory is bounded by the parts in flight. A part counts as stored when the store's tag for it is its
MD5; where tags are something else (encrypted buckets), it is sent again, which is always right. Two
writers of the same bytes may share an upload: whoever loses it finds the object complete.
"""

import contextlib
import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from mbq.artifacts.errors import InputError, StoreError
from mbq.artifacts.spans import Span, md5_of, size_of

# A store allows 10,000 parts: objects up to 156 GiB. Files of a checkpoint are 4 GiB at most.
PARTS_IN_FLIGHT = 4


class UploadLost(StoreError):
    """The store no longer knows an upload."""


@dataclass(frozen=True)
class StoredPart:
    """A part that the store has; `tag` is its name for it."""

    tag: str
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """A part of the object to write."""

    number: int
    span: Span
    md5: bytes

    @property
    def size_bytes(self) -> int:
        return size_of(self.span)


@dataclass(frozen=True)
class SentPart:
    """A part whose bytes are no longer in memory."""

    number: int
    stored: StoredPart
    md5: bytes


class Upload(Protocol):
    """The calls that one upload of one object needs. All of them may raise UploadLost."""

    def stored_parts(self) -> Mapping[int, StoredPart]: ...

    def send(self, part: Part) -> StoredPart: ...

    def complete(self, parts: Sequence[SentPart]) -> None: ...

    def abort(self) -> None: ...

    def read_back(self, start: int, length: int) -> bytes:
        """Bytes of the object as it is now; none if there is no object."""


def write_parts(upload: Upload, spans: Iterator[Span]) -> None:
    """Send spans as the parts of an upload and complete it.

    Raises:
        StoreError, InputError: the store failed, or refused the credentials; the upload stays, to
            be taken up again.
    """
    stored = upload.stored_parts()
    sent: list[SentPart] = []
    flying: deque[Future[SentPart]] = deque()
    try:
        with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
            for number in itertools.count(1):
                if len(flying) == PARTS_IN_FLIGHT:
                    sent.append(flying.popleft().result())
                # Drawn only now: what waits would be in memory, too.
                span = next(spans, None)
                if span is None:
                    break
                flying.append(pool.submit(_send, upload, number, span, stored.get(number)))
            sent += [future.result() for future in flying]
    except (StoreError, InputError):
        # The store failed, or the credentials for it.
        raise
    except Exception:
        # The source of the bytes failed: nobody will take this upload up.
        with contextlib.suppress(StoreError, InputError):
            upload.abort()
        raise
    try:
        upload.complete(sent)
    except UploadLost:
        # An earlier try may have succeeded and its answer been lost.
        if not _holds(upload, sent):
            raise


def _send(upload: Upload, number: int, span: Span, stored: StoredPart | None) -> SentPart:
    digest = md5_of(span)
    if stored != StoredPart(digest.hexdigest(), size_of(span)):
        stored = upload.send(Part(number, span, digest.digest()))
    return SentPart(number, stored, digest.digest())


def _holds(upload: Upload, parts: Sequence[SentPart]) -> bool:
    """Whether the object consists of these parts, byte for byte, and of nothing more."""
    start = 0
    for part in parts:
        data = upload.read_back(start, part.stored.size_bytes)
        if hashlib.md5(data).digest() != part.md5:
            return False
        start += part.stored.size_bytes
    return not upload.read_back(start, 1)
