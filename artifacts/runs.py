"""Runs in a store: found by their ids, and their blobs, which lie under their digests."""

import json
import time
from collections.abc import Iterable

from mbq.artifacts import keys
from mbq.artifacts.digests import Digest, Digester
from mbq.artifacts.documents import BlockRecord, RunDocument
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.sealed import MAX_DOCUMENT_BYTES, find_document, get_document
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import Store

# Far less than the grace that unreferenced blobs are given.
_YOUNG_SECONDS = 3600.0


def put_blob(store: Store, chunks: Iterable[bytes]) -> Digest:
    """Store bytes under their digest; bytes that are there and young are not written again.

    What is old and named by no document may be about to be collected (`garbage.py`): writing it
    again makes it young.
    """
    digester = Digester()
    data = list(digester.through(chunks))
    digest = digester.digest()
    key = keys.blob_key(digest.sha256)
    stat = store.stat(key)
    complete = stat is not None and stat.size_bytes == digest.size_bytes
    if stat is None or not complete or time.time() - stat.modified > _YOUNG_SECONDS:
        store.put(key, data)
    return digest


def find_run(store: Store, run: str) -> RunDocument:
    """Raises NotFoundError or CorruptError; refuses a run of another format."""
    key = keys.spec_key(run)
    try:
        document = get_document(store, key, RunDocument)
        if document.run != run:
            raise CorruptError(f"{key} is the document of another run, {document.run}")
        return document
    except CorruptError as error:
        try:
            raw = json.loads(store.read(key, 0, MAX_DOCUMENT_BYTES))
            found = raw["format_version"], raw["code_version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            found = FORMAT_VERSION, ""
        if found[0] == FORMAT_VERSION:
            raise CorruptError(f"{error}; or submit the same spec again") from None
        raise CorruptError(
            f"run {run} has format {found[0]}, this program reads {FORMAT_VERSION}; submit "
            f"it again, or use the version that wrote it ({found[1]})"
        ) from error


def block_records(store: Store, run: str, blocks: int) -> dict[int, BlockRecord]:
    """Records of the finished blocks whose blob is there in full."""
    found = {}
    for block in range(blocks):
        record = find_document(store, keys.block_key(run, block), BlockRecord)
        if record is not None and is_stored(store, record.blob):
            found[block] = record
    return found


def is_stored(store: Store, blob: Digest) -> bool:
    """Whether a blob is there in full."""
    stat = store.stat(keys.blob_key(blob.sha256))
    return stat is not None and stat.size_bytes == blob.size_bytes
