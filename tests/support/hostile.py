"""Making hostile files with right seals and digests, and what is expected of their readers."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from mbq.artifacts.digests import digest_of
from mbq.artifacts.errors import MbqError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import open_tensors

BASE, SLICE = (f"model-{part}-00001-of-00001.safetensors" for part in ("base", "slice0"))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(2**70)
JSON = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(), SCALAR, max_size=3)


def safetensors_file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one_tensor(shape: object, offsets: object = (0, 4), data: bytes = b"abcd") -> bytes:
    return safetensors_file({"x": {"dtype": "U8", "shape": shape, "data_offsets": offsets}}, data)


def sealed_again(text: bytes) -> bytes:
    """A document's text with a right seal."""
    body = text.rstrip()[:-1].rstrip()
    return body + b',\n "seal": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def refused(action: Callable[[], object]) -> str:
    """The message of an error of ours: short, and one that can be shown."""
    with pytest.raises(MbqError) as caught:
        action()
    assert 0 < len(str(caught.value).encode()) <= 2000
    return str(caught.value)


def refused_or(action: Callable[[], object]) -> None:
    with suppress(MbqError):
        action()
        return
    refused(action)


def ignore(fraction: float) -> None:
    pass


def read_all(store: LocalStore, name: str) -> dict[str, bytes]:
    opened = open_tensors(store, name)
    return {tensor: opened.read(tensor) for tensor in opened.entries}


@contextmanager
def holding(path: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    old = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        path.unlink() if old is None else path.write_bytes(old)


def flipped_bit(store: LocalStore, number: int, bit: int) -> AbstractContextManager[None]:
    """One bit of one file."""
    paths = sorted(store.root.iterdir())
    path = paths[number % len(paths)]
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    return holding(path, bytes(data))


def edit_json(store: LocalStore, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file; a manifest is sealed again."""
    document = json.loads(store.read(name))
    change(document)
    sealed = document.pop("seal", None) is not None
    text = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    store.put(name, [sealed_again(text) if sealed else text])


def list_more(store: LocalStore, name: str, data: bytes = b"", **changes: Any) -> None:
    """Let the manifest name one more file."""
    new = {name: digest_of([data]).model_dump() | changes}
    edit_json(store, MANIFEST_FILE, lambda document: document["files"].update(new))
