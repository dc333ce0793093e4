"""Where artifacts live: a flat map from keys to bytes, with the few calls an object store has.

    put         PUT        atomic: readers see the old object, the new one, or none; never a part
    read        GET        the whole object, or a byte range of it
    stat        HEAD       None when there is no such object
    children    LIST       sorted names one level below a prefix
    walk        LIST       every object below a prefix
    delete      DELETE     deleting what is not there is fine
    unfinished             what killed writers left behind; `discard` removes one of them

A key is made of plain names joined by `/`; `..`, empty and hidden parts are refused, so that a
name read from a document cannot leave the store. Instances hold configuration, not connections:
they are pickled into tasks. Nothing here relies on locks or on conditional writes: not every
object store has them.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlparse

from mbq.artifacts.errors import InputError, NotFoundError, StoreError

# How long a person waits for a store that does not answer, and how long work does: a restarted
# server must not cost a block.
ASKING_SECONDS = 10.0
WORKING_SECONDS = 300.0
# Where probes lie, so that those of killed processes are found again.
PROBES = "probes"
# A file being written; readers and listings skip hidden names.
PARTIAL = ".partial-"


@dataclass(frozen=True)
class Stat:
    """What a store says of an object; `modified` is in seconds since the epoch by its own clock."""

    key: str
    size_bytes: int
    modified: float


@dataclass(frozen=True)
class Unfinished:
    """An object whose writer has not come to its end, or never will.

    Attributes:
        handle: how the store finds it: a file, or the id of a multipart upload.
        started: in seconds since the epoch by the store's clock.
    """

    key: str
    handle: str
    size_bytes: int
    started: float


class Store(Protocol):
    @property
    def uri(self) -> str: ...

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write an object, replacing one of the same key. Raises StoreError."""

    def read(self, key: str, start: int = 0, length: int | None = None) -> bytes:
        """Bytes [start, start + length) of an object; fewer where it ends.

        Raises:
            NotFoundError: there is no such object.
            StoreError: it cannot be read.
        """

    def stat(self, key: str) -> Stat | None: ...

    def children(self, prefix: str) -> list[str]: ...

    def walk(self, prefix: str) -> Iterator[Stat]: ...

    def delete(self, key: str) -> None: ...

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]: ...

    def discard(self, unfinished: Unfinished) -> None: ...


@dataclass(frozen=True)
class LocalStore:
    """A folder. Shared between machines it must be one mount that all of them see."""

    root: Path

    @property
    def uri(self) -> str:
        return self.root.absolute().as_uri()

    def put(self, key: str, chunks: Iterable[bytes]) -> None:
        path = self.path(key)
        partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
        try:
            with _errors("write", path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("wb") as file:
                    for chunk in chunks:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
                sync_folder(path.parent)
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

    def stat(self, key: str) -> Stat | None:
        with _errors("read", self.path(key)) as path:
            try:
                found = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            if not stat.S_ISREG(found.st_mode):
                return None
            return Stat(key, found.st_size, found.st_mtime)

    def children(self, prefix: str) -> list[str]:
        with _errors("list", self.path(prefix)) as folder:
            if not folder.is_dir():
                return []
            return sorted(p.name for p in folder.iterdir() if is_name(p.name))

    def walk(self, prefix: str) -> Iterator[Stat]:
        with _errors("list", self.path(prefix)) as folder:
            for path in _files_below(folder):
                key = path.relative_to(self.root).as_posix()
                # Files come and go while we look.
                if is_key(key) and (found := self.stat(key)) is not None:
                    yield found

    def delete(self, key: str) -> None:
        with _errors("delete", self.path(key)) as path:
            path.unlink(missing_ok=True)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        with _errors("list", self.path(prefix) if prefix else self.root) as folder:
            for path in _files_below(folder):
                if not path.name.startswith(PARTIAL):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    name = path.relative_to(self.root).as_posix()
                    yield Unfinished(name, str(path), found.st_size, found.st_mtime)

    def discard(self, unfinished: Unfinished) -> None:
        with _errors("delete", Path(unfinished.handle)) as path:
            path.unlink(missing_ok=True)

    def path(self, key: str) -> Path:
        """The file that holds an object."""
        return self.root.joinpath(*check_key(key).split("/"))


def open_store(uri: str, patience_seconds: float = ASKING_SECONDS) -> Store:
    """The store at a folder's path, a `file://` or an `s3://` URI; nothing is contacted.

    Args:
        patience_seconds: how long a call keeps trying while an object store does not answer.

    Raises:
        InputError: the scheme is unknown, or there is no bucket or no such user's home.
    """
    try:
        parsed = urlparse(uri)
    except ValueError as error:
        raise InputError(f"{uri} is no URI ({error}); write s3://bucket/prefix") from error
    if parsed.scheme == "s3":
        from mbq.artifacts.s3 import S3Store

        prefix = parsed.path.strip("/")
        if not parsed.netloc or parsed.query or parsed.fragment or (prefix and not is_key(prefix)):
            raise InputError(f"{uri}: write s3://bucket/prefix, with plain names joined by /")
        return S3Store(parsed.netloc, prefix, patience_seconds)
    if parsed.scheme == "file" and parsed.netloc in ("", "localhost"):
        if parsed.query or parsed.fragment:
            raise InputError(f"{uri}: write ? and # in a file's URI as %3F and %23")
        return LocalStore(Path(unquote(parsed.path) or "/"))
    if "://" in uri:
        raise InputError(
            f"{uri} has an unknown scheme {parsed.scheme}://; use a folder's path, "
            "file:// for a folder that every node of the cluster mounts, or s3://bucket/prefix"
        )
    try:
        return LocalStore(Path(uri).expanduser().resolve())
    except RuntimeError as error:
        raise InputError(f"{uri} is the home of nobody; write the folder's path") from error


def open_object(uri: str) -> tuple[Store, str]:
    """The store and the key of a single object by its URI. Raises InputError."""
    folder, _, name = uri.rpartition("/")
    if not is_key(name) or folder.endswith(":/"):
        raise InputError(f"{uri} names no object; write s3://bucket/prefix/name")
    return open_store(folder if folder or not uri.startswith("/") else "/"), name


def is_name(name: str) -> bool:
    """Whether one part of a key is a plain name: not empty, hidden, or able to leave its folder."""
    return name.isprintable() and bool(name) and name[0] != "." and not set(name) & {"/", "\\"}


def is_key(key: str) -> bool:
    return all(map(is_name, key.split("/")))


def check_key(key: str) -> str:
    """The key, if it is one. Raises StoreError."""
    if not is_key(key):
        raise StoreError(f"{key!r} is not a key: use plain names joined by /")
    return key


def probe(store: Store) -> None:
    """Write, read (whole and in part), list and delete a small object, and list uploads.

    Raises:
        InputError: the store cannot be used.
    """
    name = secrets.token_hex(8)
    key = f"{PROBES}/{name}"
    try:
        store.put(key, [b"mbq"])
        if (store.read(key), store.read(key, 1, 1)) != (b"mbq", b"b"):
            raise StoreError("it returns other bytes than it was given")
        if name not in store.children(PROBES):
            raise StoreError("it does not list what it was given")
        store.delete(key)
        # Every object of several parts asks for the uploads that there are; a folder has none, and
        # would be searched whole.
        if not isinstance(store, LocalStore):
            next(store.unfinished(), None)
    except (StoreError, NotFoundError, InputError) as error:
        raise InputError(
            f"store: {store.uri} cannot be used ({error}); give a folder or bucket that you may "
            "write, read, list and delete in"
        ) from error


def require_folder(store: Store) -> None:
    """Refuse a local store that is not there; object stores have no folders, only names.

    Raises:
        NotFoundError: there is no such folder.
        InputError: it is something else.
    """
    if not isinstance(store, LocalStore) or os.path.isdir(store.root):
        return
    if os.path.lexists(store.root):
        raise InputError(f"store: {store.root} is not a folder; give the folder of a store")
    raise NotFoundError(f"store: there is no folder {store.root}; give the one that holds the runs")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, those behind links, too, but none in hidden folders.

    Raises:
        OSError: a folder cannot be read, or a link leads nowhere: what is there is not known.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise error

    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(filter(is_name, folders))
        for path in (Path(place, name) for name in sorted(files)):
            if path.is_symlink():
                path.stat()
            yield path


@contextlib.contextmanager
def _errors(what: str, path: Path) -> Iterator[Path]:
    try:
        yield path
    except OSError as error:
        raise StoreError(f"cannot {what} {path}: {error.strerror or error}") from error
