"""Documents as they lie in a store: JSON that ends with a seal, the sha256 of all before it.

So that a bit that flips on the way to or from a store cannot become a threshold, and an edited
document is not taken for what a run wrote.
"""

import hashlib
from typing import TypeVar

from pydantic import ValidationError

from mbq.artifacts.digests import READS
from mbq.artifacts.errors import CorruptError, NotFoundError
from mbq.artifacts.spec import Document, explain
from mbq.artifacts.store import Store

DocumentT = TypeVar("DocumentT", bound=Document)

MAX_DOCUMENT_BYTES = 8 * 1024 * 1024
# Validation costs a kilobyte for every member that is wrong.
_MAX_MEMBERS = 250_000
_SEAL = b',\n "seal": "%s"\n}\n'


def put_document(store: Store, key: str, document: Document) -> None:
    """Write a document with its seal: the sha256 of everything before it, as its last member.

    Raises:
        CorruptError: it is larger than any that would be read.
    """
    body = document.model_dump_json(indent=1).encode()[:-2]
    sealed = body + _SEAL % hashlib.sha256(body).hexdigest().encode()
    if len(sealed) > MAX_DOCUMENT_BYTES:
        raise CorruptError(f"{key} has {len(sealed):,} bytes; no document may have that many")
    _check_members(key, sealed)
    store.put(key, [sealed])


def get_document(store: Store, key: str, kind: type[DocumentT]) -> DocumentT:
    """Read and validate a document.

    Raises:
        NotFoundError: there is none.
        CorruptError: it is not a document of that kind, or not as it was written.
    """
    data = read_sealed(store, key)
    _check_members(key, data)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{key} is not a valid {kind.__name__}: {explain(error)}") from error


def find_document(store: Store, key: str, kind: type[DocumentT]) -> DocumentT | None:
    try:
        return get_document(store, key, kind)
    except NotFoundError:
        return None


def read_sealed(store: Store, key: str) -> bytes:
    """A document without its seal, as it was written.

    Raises:
        NotFoundError: there is none.
        CorruptError: it has no seal, or one of other bytes.
    """
    size = len(_SEAL % (b"0" * 64))
    for _ in range(READS):
        data = store.read(key, 0, MAX_DOCUMENT_BYTES)
        body = data[:-size]
        if data[-size:] == _SEAL % hashlib.sha256(body).hexdigest().encode():
            return body + b"\n}"
    raise CorruptError(
        f"{store.uri}/{key} is not as it was written: it was damaged or edited, or is no document "
        "of mbq-cluster; restore it, or delete it and resume its run"
    )


def _check_members(key: str, data: bytes) -> None:
    if data.count(b",") > _MAX_MEMBERS:
        raise CorruptError(f"{key} has more members than any document of mbq-cluster")


def document_sha256(store: Store, key: str) -> str:
    """The sha256 of a document as it lies in the store, seal and all. Raises as `read_sealed`."""
    body = read_sealed(store, key)[:-2]
    return hashlib.sha256(body + _SEAL % hashlib.sha256(body).hexdigest().encode()).hexdigest()
