"""Hand-written safetensors: readable by the library, streamed, and refused when damaged."""

import json
import struct

import pytest
import torch
from safetensors.torch import load, save

from mbq.artifacts.errors import CorruptError
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import (
    ALIGNMENT_BYTES,
    Entry,
    encode,
    encode_header,
    open_tensors,
)

ENTRIES = [Entry("z", "I32", (2, 3)), Entry("a", "U8", (5,)), Entry("empty", "F16", (0, 4))]
DATA = [bytes(range(24)), b"hello", b""]


def test_the_library_reads_our_files() -> None:
    tensors = load(b"".join(encode(ENTRIES, DATA)))
    assert (
        tensors["z"].tolist()
        == torch.frombuffer(bytearray(DATA[0]), dtype=torch.int32).view(2, 3).tolist()
    )
    assert bytes(tensors["a"].tolist()) == b"hello"
    assert tensors["empty"].shape == (0, 4)


def test_keeps_our_order_and_alignment() -> None:
    header = encode_header(ENTRIES)
    assert len(header) % ALIGNMENT_BYTES == 0
    names = list(json.loads(header[8:]))
    assert names == ["__metadata__", "z", "a", "empty"]


def test_reads_single_tensors_of_our_files_and_the_librarys(store: LocalStore) -> None:
    store.put("ours", encode(ENTRIES, DATA))
    ours = open_tensors(store, "ours")
    assert [ours.read(entry.name) for entry in ENTRIES] == DATA
    store.put("theirs", [save({"x": torch.arange(4, dtype=torch.int32), "y": torch.ones(3)})])
    theirs = open_tensors(store, "theirs")
    assert theirs.entries["x"] == Entry("x", "I32", (4,))
    assert theirs.read("x") == struct.pack("<4i", 0, 1, 2, 3)


def test_refuses_data_of_the_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"a: U8 \[5\] is 5 bytes, got 4"):
        list(encode(ENTRIES, [DATA[0], b"hell", b""]))


def _file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"short", "not a safetensors file"),
        (struct.pack("<Q", 2**63) + b"{}", "not a safetensors file"),
        (_file(b"not json"), "broken header"),
        (_file([1, 2]), "broken header"),
        (_file({"x": 5}), "broken header"),
        (_file({"x": {"dtype": "I99", "shape": [1], "data_offsets": [0, 4]}}), "broken header"),
        (
            _file({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 3]}}, b"abc"),
            "does not lie where its shape says",
        ),
        (
            _file({"x": {"dtype": "U8", "shape": [-1, -3], "data_offsets": [0, 3]}}, b"abc"),
            "broken header",
        ),
        (
            _file({"x": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, b"abc"),
            "does not lie where its shape says",
        ),
        (
            _file({"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"abc"),
            "its header promises",
        ),
        (
            _file({"x": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"abc"),
            "its header promises",
        ),
    ],
)
def test_damaged_files_are_refused(store: LocalStore, content: bytes, message: str) -> None:
    store.put("damaged", [content])
    with pytest.raises(CorruptError, match=message):
        open_tensors(store, "damaged")


def test_asking_for_a_tensor_that_is_not_there(store: LocalStore) -> None:
    store.put("file", encode(ENTRIES, DATA))
    with pytest.raises(CorruptError, match="holds no tensor b"):
        open_tensors(store, "file").read("b")
