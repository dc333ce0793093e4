"""Where artifacts live: a flat map from keys to bytes, with the few calls an object store has.

    put      PUT        atomic: readers see the old object, the new one, or none; never a part
    read     GET        the whole object, or a byte range of it
    size     HEAD       None when there is no such object
    children LIST       sorted names one level below a prefix
    delete   DELETE     deleting what is not there is fine

A key is made of plain names joined by `/`; `..`, empty and hidden parts are refused, so that a
name read from a document cannot leave the store. Instances hold configuration, not connections:
they are pickled into tasks.
"""

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from mbq.artifacts.errors import InputError, NotFoundError, StoreError

# A file being written; readers and listings skip hidden names.
_PARTIAL = ".partial-"


class Store(Protocol):
    @property
    def uri(self) -> str: ...

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write an object, replacing one of the same key. Raises StoreError."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of an object. Raises NotFoundError, StoreError."""

    def size(self, key: str) -> int | None: ...

    def children(self, prefix: str) -> list[str]: ...

    def delete(self, key: str) -> None: ...


@dataclass(frozen=True)
class LocalStore:
    """A folder. Shared between machines it must be one mount that all of them see."""

    root: Path

    @property
    def uri(self) -> str:
        return self.root.as_uri()

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        path = self.path(key)
        partial = path.with_name(f"{_PARTIAL}{secrets.token_hex(8)}")
        try:
            with _errors("write", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
                _sync_folder(path.parent)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        with _errors("read", self.path(key)) as path:
            try:
                file = path.open("rb")
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFoundError(f"the store {self.root} has no {key}") from error
            with file:
                file.seek(start)
                return file.read(-1 if length is None else length)

    def size(self, key: str) -> int | None:
        with _errors("read", self.path(key)) as path:
            return path.stat().st_size if path.is_file() else None

    def children(self, prefix: str) -> list[str]:
        with _errors("list", self.path(prefix)) as folder:
            if not folder.is_dir():
                return []
            return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))

    def delete(self, key: str) -> None:
        with _errors("delete", self.path(key)) as path:
            path.unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """The file that holds an object."""
        parts = key.split("/")
        if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in parts):
            raise StoreError(f"{key!r} is not a key: use plain names joined by /")
        return self.root.joinpath(*parts)


def open_store(uri: str) -> LocalStore:
    """The store at a folder's path or `file://` URI; nothing is created or contacted.

    Raises:
        InputError: the scheme is unknown.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "file" and parsed.netloc in ("", "localhost"):
        return LocalStore(Path(unquote(parsed.path)))
    if "://" in uri:
        raise InputError(
            f"store: {uri} has an unknown scheme {parsed.scheme}://; use a folder's path, or "
            "file:// for a folder that every node of the cluster mounts"
        )
    return LocalStore(Path(uri).expanduser().resolve())


def probe(store: Store) -> None:
    """Write, read and delete a small object.

    Raises:
        InputError: the store cannot be used.
    """
    key = f"probe-{secrets.token_hex(8)}"
    try:
        store.put(key, [b"mbq"])
        if store.read(key) != b"mbq":
            raise StoreError("it returns other bytes than it was given")
        store.delete(key)
    except (StoreError, NotFoundError) as error:
        raise InputError(
            f"store: {store.uri} cannot be used ({error}); give a folder you may write to"
        ) from error


@contextlib.contextmanager
def _errors(what: str, path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise StoreError(f"cannot {what} {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
