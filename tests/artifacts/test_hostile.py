"""Damaged and hostile files: refused by an error of ours, soon, in little memory, in their folder.

Seals and digests keep accidents out, so the hostile files here have right ones. What takes too long
or too much memory is tried in a process of its own, at the largest size that its reader takes.
`benchmarks/fuzz.py` tries many more.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pydantic
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbq.artifacts import documents as kinds_of_documents
from mbq.artifacts import keys, tensors
from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.config import CONFIG_FILE
from mbq.artifacts.digests import PART_BYTES
from mbq.artifacts.errors import MbqError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.pull import pull
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import MAX_DOCUMENT_BYTES, get_document, put_document, read_sealed
from mbq.artifacts.spec import Document
from mbq.artifacts.store import LocalStore
from tests.support.hostile import (
    JSON,
    holding,
    ignore,
    list_more,
    one_tensor,
    read_all,
    refused,
    refused_or,
    safetensors_file,
    sealed_again,
)

ONE = b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
TWICE, GAP = (
    b'{"x":' + ONE + b',"%s":' % n + r + b"}" for n, r in ((b"x", ONE), (b"y", ONE[:-4] + b"3,5]}"))
)
HEADERS = {
    "2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header that ends early": struct.pack("<Q", 100_000_000) + b"{}",
    "90 MB of brackets": safetensors_file(b"[" * 90_000_000),
    "deep": safetensors_file(b'{"x":' * 100_000),
    "no object": safetensors_file(b'"x"'),
    "invalid UTF-8": safetensors_file(b'{"\xff\xfe":1}'),
    "UTF-16": safetensors_file(one_tensor([4])[8:-4].decode().encode("utf-16"), b"abcd"),
    "a lone surrogate": safetensors_file(b'{"\\ud800":' + ONE + b"}", b"ab"),
    "a name twice": safetensors_file(TWICE, b"ab"),
    "overlap": safetensors_file(TWICE.replace(b'"x"', b'"y"', 1), b"ab"),
    "a gap": safetensors_file(GAP, b"abcde"),
    "a name of a megabyte": safetensors_file({"x" * 2**20: 1}),
    "5000 digits": safetensors_file(b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"),
    "no dtype": safetensors_file({"x": {"shape": [4], "data_offsets": [0, 4]}}, b"abcd"),
    "a dtype that is a list": safetensors_file(
        {"x": {"dtype": [[]], "shape": [], "data_offsets": [0, 0]}}
    ),
    "pickle": pickle.dumps({"x": os.system}),
    "a product that overflows": one_tensor([2**63, 2**63, 0], (0, 0), b""),
    "a dimension that overflows": one_tensor([0, 2**64], (0, 0), b""),
    **{
        f"shape {s!r}": one_tensor(s)
        for s in (None, 4, "4", [-4], [-2, -2], ["4"], [None], {"4": 1})
    },
    **{f"shape {s!r}": one_tensor(s) for s in ([4.0], [4.5], [True, 4], [[4]], [2**63, 2**63])},
    **{f"shape {s!r}": one_tensor(s) for s in ([float("nan")], [float("inf")], [2**64 + 4])},
    **{f"offsets {o!r}": one_tensor([4], o) for o in (None, [], [0], [0, 4, 4], [4, 0], [-4, 0])},
    **{
        f"offsets {o!r}": one_tensor([4], o)
        for o in ([0.0, 4.0], [False, 4], ["0", "4"], [0, 2**70])
    },
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(store: LocalStore, content: bytes) -> None:
    store.put("file", [content])
    refused(lambda: read_all(store, "file"))


@settings(max_examples=150)
@given(field=st.sampled_from(["dtype", "shape", "data_offsets", "x", ""]), value=JSON)
def test_whatever_a_header_says_the_library_reads_the_same(
    shelf: LocalStore, field: str, value: object
) -> None:
    header: dict[str, Any] = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    (header["x"] if len(field) > 1 else header)[field] = value
    content = safetensors_file(header, b"abcd")

    def read() -> None:
        ours = read_all(shelf, "file")
        assert ours == {n: bytes(t["data"]) for n, t in safetensors.deserialize(content)}

    with holding(shelf.path("file"), content):
        refused_or(read)


@pytest.fixture(scope="module")
def documents(finished_run: Any) -> dict[type[Document], bytes]:
    """One of each kind that a store holds, without its seal."""
    kinds = [kind for kind in vars(kinds_of_documents).values() if isinstance(kind, type)]
    found = {}
    for stat in finished_run.store.walk(keys.RUNS):
        for kind in kinds:
            with suppress(MbqError, pydantic.ValidationError):
                if issubclass(kind, Document):
                    text = read_sealed(finished_run.store, stat.key)
                    kind.model_validate_json(text)
                    found[kind] = text
    assert len(found) == 11
    return found


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0), place=st.integers(0), value=JSON)
def test_a_sealed_document_is_refused_or_means_what_it_says(
    store: LocalStore, documents: Any, number: int, place: int, value: object
) -> None:
    kind, text = list(documents.items())[number % len(documents)]
    put_document(store, "file", kind.model_validate_json(text))
    assert store.read("file") == sealed_again(text), "seals that are made here are not right"
    members = list(re.finditer(rb'"[^"]*"|[\d.e-]+|true|false|null|[\[{]', text))
    start, end = members[place % len(members)].span()
    new = json.dumps(value).encode()
    extra = {b"{": b'{"extra":' + new + b",", b"[": b"[" + new + b","}.get(text[start:end], new)
    store.path("file").write_bytes(sealed_again(text[:start] + extra + text[end:]))

    def read() -> None:
        found = get_document(store, "file", kind)
        assert kind.model_validate_json(found.model_dump_json()) == found

    refused_or(read)


NONSENSE = [*b'NaN Infinity 1e999 \xff "\\ud800" "\\u0000" {} null'.split(), b"[" * 100_000]
NONSENSE += [b"9" * 4200, b"9" * 5000, b"[" * 150 + b"]" * 150, b'"%s"' % (b"n" * 100_000)]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: ascii(value[:9]))
def test_nonsense_in_a_sealed_manifest_is_refused(packed: LocalStore, value: bytes) -> None:
    text = read_sealed(packed, MANIFEST_FILE)
    packed.put(MANIFEST_FILE, [sealed_again(text.replace(b'e": 32,', b'e": ' + value + b","))])
    refused(lambda: open_checkpoint(packed))


def test_a_run_of_a_later_format_is_told_from_a_damaged_one(
    finished_run: Any, store: LocalStore
) -> None:
    document = finished_run.document.model_dump(mode="json") | {"format_version": 99}
    document["spec"]["calibration"]["novelty"] = 1
    store.put(keys.spec_key("abc"), [sealed_again(json.dumps(document).encode())])
    assert "has format 99" in refused(lambda: find_run(store, "abc"))


@pytest.mark.parametrize("run", ["../../elsewhere", "another"])
def test_a_run_in_the_folder_of_another_is_refused(
    finished_run: Any, store: LocalStore, run: str
) -> None:
    put_document(store, keys.spec_key("abc"), finished_run.document.model_copy(update={"run": run}))
    refused(lambda: find_run(store, "abc"))


def _fill(start: bytes, middle: bytes, end: bytes, size: int) -> bytes:
    return start + middle * ((size - len(start) - len(end)) // len(middle)) + end


def _members(value: bytes, size: int) -> bytes:
    """A JSON object of as many members as there is room for."""
    many = (b'"%07d":%s,' % (n, value) for n in range(size // (len(value) + 11) - 1))
    return b"{" + b"".join(many)[:-1] + b"}"


ROOM, HEADER = MAX_DOCUMENT_BYTES - 1000, tensors._MAX_HEADER_BYTES
EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
DEEP = b'{"quantization_config":{"quant_method":"mbq","max_bits":4},"x":' + b"[" * 900
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "lists in a header": ("x", lambda: safetensors_file(_fill(b'{"x":[', b"[],", b"1]}", HEADER))),
    "tensors in a header": ("x", lambda: safetensors_file(_members(EMPTY, HEADER))),
    "large dimensions": ("x", lambda: one_tensor([10**4000] * 1500)),
    "wrong members": (
        MANIFEST_FILE,
        lambda: sealed_again(_fill(b'{"blocks":[', b"1,", b"1]}", ROOM)),
    ),
    "unknown members": (MANIFEST_FILE, lambda: sealed_again(_members(b"1", ROOM))),
    "lists in a document": (
        MANIFEST_FILE,
        lambda: sealed_again(_fill(b'{"x":[', b"[],", b"1]}", ROOM)),
    ),
    "a deep config": (CONFIG_FILE, lambda: _fill(DEEP, b"1,", b"1" + b"]" * 900 + b"}", ROOM)),
    "lists in an index": (INDEX_FILE, lambda: _fill(b'{"x":[', b"[],", b"1]}", 256 * 2**20)),
}
SCRIPT = """
import resource, sys
from pathlib import Path
from mbq.artifacts import config, errors, packed, pull, source, store, tensors
file, folder = sys.argv[1], Path(sys.argv[2])
store = store.LocalStore(folder)
readers = {
    "x": lambda: tensors.open_tensors(store, file),
    "manifest.json": lambda: packed.open_checkpoint(store),
    "config.json": lambda: config.cut_config(store.read(file), 4),
    "model.safetensors.index.json": lambda: source.Source(str(folder)).weight_map,
    "all": lambda: pull.pull(packed.open_checkpoint(store), folder / "target", None, print),
}
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (size, size))
resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
try:
    readers[file]()
except errors.MbqError as error:
    print(type(error).__name__)
"""


def _read_with_little(file: str, folder: Path) -> str:
    """What the reader of a file says that has 10 seconds of a processor and a GiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, file, str(folder)],
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout.strip()


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_read_or_refused_soon_and_in_little_memory(tmp_path: Path, bomb: str) -> None:
    name, content = BOMBS[bomb]
    (tmp_path / name).write_bytes(content())
    _read_with_little(name, tmp_path)


def test_a_terabyte_is_refused_before_it_is_laid_out(packed: LocalStore) -> None:
    parts = ["0" * 64] * (2**40 // PART_BYTES)
    list_more(packed, "huge", size_bytes=2**40, part_sha256=parts)
    assert _read_with_little("all", packed.root) == "InputError"
    written = packed.path("target").rglob("*")
    assert sum(path.stat().st_blocks * 512 for path in written) < 2**20


def test_a_config_of_a_gigabyte_is_refused_unread(packed: LocalStore) -> None:
    list_more(packed, CONFIG_FILE, size_bytes=2**30, part_sha256=["0" * 64] * (2**30 // PART_BYTES))
    refused(lambda: pull(open_checkpoint(packed), packed.path("target"), None, ignore))
