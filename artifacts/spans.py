"""Bytes that lie in several places: cut, hashed and sent where they are, never joined.

A block is a list of tensors of any size, its parts are 16 MiB each: a part that was joined would be
in memory twice, and copying it is a tenth of what sending it costs.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator

Span = tuple[memoryview, ...]

_READ_BYTES = 1024 * 1024


def cut(chunks: Iterable[bytes], size: int) -> Iterator[Span]:
    """The same bytes in spans of `size`; the last one may be smaller."""
    held: list[memoryview] = []
    count = 0
    for chunk in chunks:
        view = memoryview(chunk)
        while count + len(view) >= size:
            room = size - count
            yield (*held, view[:room])
            held, count, view = [], 0, view[room:]
        if view:
            held.append(view)
            count += len(view)
    if held:
        yield tuple(held)


def size_of(span: Span) -> int:
    return sum(map(len, span))


def md5_of(span: Span) -> "hashlib._Hash":
    digest = hashlib.md5(usedforsecurity=False)
    for view in span:
        digest.update(view)
    return digest


class SpanFile(io.RawIOBase):
    """A span as a file for HTTP clients, which send what `read` returns, whatever its size."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._size = size_of(span)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> memoryview | bytes:
        """The next bytes, up to a MiB even if fewer were asked for: clients ask for 16 KiB."""
        skip = self._at
        for view in self._span:
            if skip < len(view):
                found = view[skip : skip + _READ_BYTES]
                self._at += len(found)
                return found
            skip -= len(view)
        return b""
