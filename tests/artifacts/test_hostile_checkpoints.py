"""Hostile checkpoints: nothing leaves its folder, no pickle runs, what loads is what was packed.

As in `test_hostile.py`, seals and digests are right where a test is about something else.
"""

import json
import os
import pickle
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.artifacts.checkpoint import INDEX_FILE, find_linears
from mbq.artifacts.config import CONFIG_FILE, config_bits, cut_config
from mbq.artifacts.errors import MbqError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.loading import load_model
from mbq.artifacts.packed import open_checkpoint, verify
from mbq.artifacts.pull import pull
from mbq.artifacts.source import Source
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import Entry, encode, open_tensors
from tests.support.hostile import (
    BASE,
    JSON,
    SLICE,
    edit_json,
    flipped_bit,
    ignore,
    list_more,
    read_all,
    refused,
    refused_or,
)

NAMES = [
    "../x",
    "/etc/passwd",
    "a/b",
    "..\\x",
    ".partial-x",
    ".",
    "..",
    "",
    "a\0b",
    "a\nb",
    "\x1b[m",
]


@pytest.mark.parametrize("name", [*NAMES, MANIFEST_FILE], ids=ascii)
def test_a_manifest_names_plain_files_and_not_itself(packed: LocalStore, name: str) -> None:
    list_more(packed, name)
    refused(lambda: open_checkpoint(packed))


@pytest.mark.parametrize("name", [*NAMES, "x" * 300, "\ud800", None, 5, ["x"]], ids=ascii)
def test_an_index_names_plain_files(packed: LocalStore, name: object) -> None:
    edit_json(packed, INDEX_FILE, lambda document: document["weight_map"].update(more=name))
    refused(lambda: Source(str(packed.root)).tensors)


@pytest.mark.parametrize(
    "slices", [[], [[]] * 3, [[SLICE]] * 4, [[SLICE] * 2, [], [], []], [["x"], [], [], []]]
)
def test_slices_hold_files_of_the_manifest_once(packed: LocalStore, slices: object) -> None:
    edit_json(packed, MANIFEST_FILE, lambda document: document.update(slice_files=slices))
    refused(lambda: open_checkpoint(packed))


@pytest.mark.parametrize("change", [{"more": BASE}, {"lm_head.weight": None}], ids=str)
def test_an_index_and_its_files_name_the_same_tensors(packed: LocalStore, change: Any) -> None:
    def edit(document: Any) -> None:
        files = document["weight_map"] | change
        document["weight_map"] = {name: file for name, file in files.items() if file}

    edit_json(packed, INDEX_FILE, edit)
    refused(lambda: Source(str(packed.root)).tensors)


@pytest.mark.parametrize("run", [*NAMES, "/elsewhere/run", "../../run", ""], ids=ascii)
def test_a_manifest_names_a_run_that_may_be_a_folder(packed: LocalStore, run: str) -> None:
    edit_json(packed, MANIFEST_FILE, lambda document: document.update(run=run))
    refused(lambda: open_checkpoint(packed))


def test_a_block_of_5000_digits_is_no_block() -> None:
    entry = Entry(f"model.layers.{'9' * 5000}.x.weight", "F32", (4, 4))
    assert find_linears({entry.name: entry}) == []


@settings(max_examples=100)
@given(value=JSON, key=st.sampled_from(["max_bits", "quant_method", "quantization_config", "x"]))
def test_a_config_is_refused_or_cut(value: object, key: str) -> None:
    part: dict[str, Any] = {"quant_method": "mbq", "max_bits": 8, key: value}
    document = {"quantization_config": part, key: value}
    config = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"

    def cut_and_cut_back() -> None:
        bits = config_bits(config)
        cut = cut_config(config, 2)
        assert config_bits(cut) == 2
        assert cut_config(cut, bits) == config

    refused_or(cut_and_cut_back)


@settings(max_examples=60)
@given(number=st.integers(0), bit=st.integers(0))
def test_every_flipped_bit_of_a_folder_is_found(shelf: LocalStore, number: int, bit: int) -> None:
    with flipped_bit(shelf, number, bit), suppress(MbqError):
        assert verify(open_checkpoint(shelf), ignore)


def test_a_config_with_other_white_space_is_not_what_was_written(packed: LocalStore) -> None:
    packed.put(CONFIG_FILE, [packed.read(CONFIG_FILE) + b" "])
    assert verify(open_checkpoint(packed), ignore)


@settings(max_examples=30)
@given(number=st.integers(0), bit=st.integers(0), there=st.booleans())
def test_a_pull_from_or_into_a_damaged_folder_is_right_or_refused(
    shelf: LocalStore, tmp_path_factory: Any, number: int, bit: int, there: bool
) -> None:
    target = LocalStore(tmp_path_factory.mktemp("pulled") / "target")
    if there:
        pull(open_checkpoint(shelf), target.root, None, ignore)
    pulled = []
    with flipped_bit(target if there else shelf, number, bit), suppress(MbqError):
        pull(open_checkpoint(shelf), target.root, None, ignore)
        pulled = [(path.name, path.read_bytes()) for path in target.root.iterdir()]
    assert pulled or there or not target.path(CONFIG_FILE).exists()
    assert all(data == shelf.read(name) for name, data in pulled)


@pytest.mark.parametrize(
    "name", ["x" * 250, "x" * 300, "con", "ü" * 100, "config.json "], ids=ascii
)
def test_odd_names_are_pulled_into_the_folder_or_not_at_all(packed: LocalStore, name: str) -> None:
    list_more(packed, name, b"odd")
    with suppress(OSError):
        packed.path(name).write_bytes(b"odd")
    target = packed.root.with_name("target")
    refused_or(lambda: pull(open_checkpoint(packed), target, None, ignore))
    assert {path.name for path in packed.root.parent.iterdir()} <= {"packed", "target"}


@pytest.mark.parametrize(
    "place", [BASE, f".partial-{BASE}", CONFIG_FILE, INDEX_FILE, MANIFEST_FILE]
)
@pytest.mark.parametrize("link", ["symbolic", "dangling", "hard"])
def test_a_pull_writes_through_no_link(packed: LocalStore, place: str, link: str) -> None:
    target, outside = packed.root.with_name("target"), packed.root.with_name("outside")
    target.mkdir()
    if link != "dangling":
        outside.write_bytes(b"precious")
    (os.link if link == "hard" else os.symlink)(outside, target / place)
    refused_or(lambda: pull(open_checkpoint(packed), target, None, ignore))
    assert not outside.exists() if link == "dangling" else outside.read_bytes() == b"precious"


class _Code:
    """Pickled, it makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", [BASE, "model.safetensors", "pytorch_model.bin"])
def test_no_pickle_is_unpickled(packed: LocalStore, name: str) -> None:
    ran, target = packed.root.with_name("ran"), packed.root.with_name("target")
    evil = pickle.dumps({"x": _Code(ran)})
    list_more(packed, "more.safetensors", evil)
    packed.path("more.safetensors").write_bytes(evil)
    refused(lambda: pull(open_checkpoint(packed), target, None, ignore))
    packed.path(name).write_bytes(evil)
    if name == "pytorch_model.bin":
        packed.delete(INDEX_FILE)
    assert "is damaged" in refused(lambda: load_model(packed.root))
    assert not ran.exists() and not (target / CONFIG_FILE).exists()


CURVE = '{"average_bits": %s, "log_thresholds": %s}'
DAMAGE = {
    "": '[] | "mbq" | 5',
    "max_bits": 'GONE | null | 0 | -2 | 3 | "8" | true | 10 | 2000000000 | []',
    "group_size": 'GONE | null | 0 | -32 | "32" | 48 | 32.0',
    "linears": 'GONE | null | [] | "x" | ["x"] | [1] | ["mlp.down_proj"] | {}',
    "unknown": "1",
    "routing": '0 | [] | {} | "x"',
    "routing/knots": 'GONE | null | -1 | 0 | "1" | 3',
    "routing/max_bits": 'GONE | null | 0 | 3 | 6 | 10 | "8" | 1000000000000',
    "routing/width": 'GONE | "8" | -1 | 0 | 1000000000000 | []',
    "routing/routers": 'GONE | null | [] | {"x": ["y"]} | {"x": []} | {"x": 5} | {}',
    "routing/curves": "GONE | null | {} | []",
    "routing/curves/3": " | ".join(
        ["GONE", "null", CURVE % ("[]", "[]"), CURVE % ('"23"', "[1, 0]")]
        + [CURVE % (ends, "[1, 0]") for ends in ("[2, 8]", "[3, 2]", "[2.5, 3]", "[2]")]
        + [CURVE % ("[2, 3]", end) for end in ('["a", "b"]', "[1]", "[NaN, NaN]", "[0, 1]")]
    ),
    "routing/curves/5": CURVE % ("[4, 5]", "[1, 0]"),
}


def test_all_bits_that_are_there_have_routing(packed: LocalStore) -> None:
    def cut(document: Any) -> None:
        routing = document["quantization_config"]["routing"]
        routing["max_bits"] = 4
        del routing["curves"]["6"], routing["curves"]["8"]

    edit_json(packed, CONFIG_FILE, cut)
    assert "of 8 bits 4 have routing" in refused(lambda: load_model(packed.root))


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k, vs in DAMAGE.items() for v in vs.split(" | ")]
)
def test_a_damaged_quantization_config_is_refused(packed: LocalStore, key: str, value: str) -> None:
    def change(document: Any) -> None:
        *path, last = ["quantization_config", *filter(None, key.split("/"))]
        for name in path:
            document = document[name]
        document.pop(last, None)
        if value != "GONE":
            document[last] = json.loads(value)

    def ring(*_: Any) -> None:
        raise TimeoutError("no answer within 5 seconds")

    edit_json(packed, CONFIG_FILE, change)
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    try:
        assert "unpack" not in refused(lambda: load_model(packed.root, average_bits=3.0))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _rewrite(store: LocalStore, name: str, change: Callable[[Entry], Entry | None]) -> None:
    """Change the tensors of a file."""
    opened, data = open_tensors(store, name), read_all(store, name)
    pairs = [(new, data[entry.name]) for entry in opened.entries.values() if (new := change(entry))]
    store.put(name, encode([entry for entry, _ in pairs], [data for _, data in pairs]))


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_model_that_lacks_a_tensor_is_refused(packed: LocalStore, name: str) -> None:
    _rewrite(packed, BASE, lambda entry: None if entry.name == name else entry)
    assert name in refused(lambda: load_model(packed.root))


@pytest.mark.parametrize("file", [BASE, SLICE])
@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_a_tensor_of_another_kind_is_refused(packed: LocalStore, file: str, what: str) -> None:
    def change(entry: Entry) -> Entry:
        if what == "shape":
            return Entry(entry.name, entry.dtype, (*entry.shape[::-1], 1))
        other = {"I32": "F32", "F32": "I32", "I8": "F8_E4M3"}[entry.dtype]
        return Entry(entry.name, other, entry.shape)

    _rewrite(packed, file, change)
    refused(lambda: load_model(packed.root))


@pytest.mark.parametrize("absolute", [True, False])
def test_no_weights_are_loaded_from_outside_of_the_folder(
    packed: LocalStore, absolute: bool
) -> None:
    outside = packed.path(BASE).replace(packed.root.with_name("outside.safetensors"))
    name = str(outside) if absolute else f"../{outside.name}"
    packed.put(INDEX_FILE, [packed.read(INDEX_FILE).replace(BASE.encode(), name.encode())])
    refused(lambda: load_model(packed.root))
