"""What a store holds and nobody needs: found first, removed then, and never what is young.

    blobs       named by no document of a run: killed or superseded work
    uploads     multipart uploads and partial files whose writer did not come back
    probes      of processes that were killed while they looked whether a store works

What is younger than the grace may belong to somebody who is about to name it, so it stays. A blob
that an unreadable document may name stays, too: then nothing is removed. To drop a run, delete its
folder `runs/<run>`; its blobs become garbage.
"""

import itertools
import re
import secrets
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mbq.artifacts import keys
from mbq.artifacts.errors import NotFoundError, StoreError
from mbq.artifacts.sealed import read_sealed
from mbq.artifacts.store import PROBES, Stat, Store, Unfinished

GRACE_SECONDS = 24 * 3600.0
_PROBE = re.compile(rf"{PROBES}/[0-9a-f]{{16}}")
_SHA256 = re.compile(rb"\b[0-9a-f]{64}\b")
_READERS = 8


@dataclass(frozen=True)
class Garbage:
    """What can go: everything in it was written before a time by the store's clock."""

    before: float
    objects: tuple[Stat, ...]
    unfinished: tuple[Unfinished, ...]

    @property
    def size_bytes(self) -> int:
        objects = sum(stat.size_bytes for stat in self.objects)
        return objects + sum(found.size_bytes for found in self.unfinished)


def find_garbage(store: Store, grace_seconds: float = GRACE_SECONDS) -> Garbage:
    """Look, and remove nothing.

    Raises:
        NotFoundError: it is no store of runs.
        CorruptError: a document is damaged, and what it names is not known.
        StoreError: the store cannot be read.
    """
    found: Iterable[Iterator[object]] = (
        store.walk(keys.RUNS),
        store.walk(keys.BLOBS),
        _unfinished(store),
    )
    if all(next(some, None) is None for some in found):
        raise NotFoundError(f"{store.uri} holds no runs and no blobs; give the store of some runs")
    before = _now(store) - grace_seconds
    # Blobs first: what is named between the two steps is seen to be named.
    candidates = [s for folder in (keys.BLOBS, PROBES) for s in store.walk(folder) if _is_ours(s)]
    unfinished = [found for found in _unfinished(store) if found.started < before]
    named = _named_blobs(store)
    objects = [
        stat
        for stat in candidates
        if stat.modified < before and stat.key.rpartition("/")[2] not in named
    ]
    return Garbage(before, tuple(objects), tuple(unfinished))


def remove_garbage(store: Store, garbage: Garbage) -> None:
    """Remove what was found, if the store still says that it is old.

    Asked again since objects may have been written anew, and dates damaged on their way.
    """
    for found in garbage.objects:
        now = store.stat(found.key)
        if now is not None and now.modified < garbage.before:
            store.delete(found.key)
    still_old = {found.handle for found in _unfinished(store) if found.started < garbage.before}
    for unfinished in garbage.unfinished:
        if unfinished.handle in still_old:
            store.discard(unfinished)


def _is_ours(stat: Stat) -> bool:
    """Whether an object has a name that we give; in a bucket there may be folders of others."""
    name = stat.key.rpartition("/")[2]
    return bool(_PROBE.fullmatch(stat.key)) or (
        bool(_SHA256.fullmatch(name.encode())) and stat.key == keys.blob_key(name)
    )


def _unfinished(store: Store) -> Iterator[Unfinished]:
    """What writers of ours left; in a bucket without a prefix there may be those of others."""
    return itertools.chain.from_iterable(map(store.unfinished, (keys.RUNS, keys.BLOBS, PROBES)))


def _now(store: Store) -> float:
    """The time by the store's clock, which is the one that objects are dated by."""
    key = f"{PROBES}/{secrets.token_hex(8)}"
    store.put(key, [b"mbq"])
    stat = store.stat(key)
    store.delete(key)
    if stat is None:
        raise StoreError(f"{store.uri} does not hold what was just written there")
    return stat.modified


def _named_blobs(store: Store) -> set[str]:
    """Every digest in a document that blobs are read by."""
    # Listed twice: a page that was damaged on its way must not make a document invisible.
    documents = {s.key for _ in range(2) for s in store.walk(keys.RUNS) if keys.names_blobs(s.key)}
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda key: _digests(store, key), sorted(documents))
        return {digest for digests in found for digest in digests}


def _digests(store: Store, key: str) -> Iterable[str]:
    try:
        return [found.decode() for found in _SHA256.findall(read_sealed(store, key))]
    except NotFoundError:
        # Deleted since it was listed; or a name that was damaged on its way, and is listed right
        # the other time.
        return []
