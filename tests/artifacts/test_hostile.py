"""Damaged and hostile files: refused by an error of ours, soon, in little memory, in their folder.

Seals and digests keep accidents out, so the hostile files here have right ones. What takes too long
or too much memory is tried in a process of its own, at the largest size that its reader takes.
`benchmarks/fuzz.py` tries many more.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pydantic
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbq.artifacts import keys, manifest, tensors
from mbq.artifacts.checkpoint import INDEX_FILE, find_linears
from mbq.artifacts.config import config_bits, cut_config
from mbq.artifacts.digests import PART_BYTES, digest_of
from mbq.artifacts.errors import MbqError
from mbq.artifacts.loading import load_model
from mbq.artifacts.manifest import MAX_DOCUMENT_BYTES, find_run, get_document, put_document
from mbq.artifacts.packed import CONFIG_FILE, MANIFEST_FILE, open_checkpoint, verify
from mbq.artifacts.pull import pull
from mbq.artifacts.source import Source
from mbq.artifacts.spec import Document
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import Entry, encode, open_tensors

BASE, SLICE = (f"model-{part}-00001-of-00001.safetensors" for part in ("base", "slice0"))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(2**70)
JSON = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(), SCALAR, max_size=3)


def _file(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _tensor(shape: object, offsets: object = (0, 4), data: bytes = b"abcd") -> bytes:
    return _file({"x": {"dtype": "U8", "shape": shape, "data_offsets": offsets}}, data)


def _sealed(text: bytes) -> bytes:
    """A document's text with a right seal."""
    body = text.rstrip()[:-1].rstrip()
    return body + b',\n "seal": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


def _refused(action: Callable[[], object]) -> str:
    """The message of an error of ours: short, and one that can be shown."""
    with pytest.raises(MbqError) as caught:
        action()
    assert 0 < len(str(caught.value).encode()) <= 2000
    return str(caught.value)


def _refused_or(action: Callable[[], object]) -> None:
    with suppress(MbqError):
        action()
        return
    _refused(action)


def _silent(fraction: float) -> None:
    pass


def _read_all(store: LocalStore, name: str) -> dict[str, bytes]:
    opened = open_tensors(store, name)
    return {tensor: opened.read(tensor) for tensor in opened.entries}


@pytest.fixture
def packed(finished_run: Any, tmp_path: Path) -> LocalStore:
    """A copy of the packed checkpoint, in a folder with nothing else in it."""
    return LocalStore(Path(shutil.copytree(finished_run.checkpoint, tmp_path / "in" / "packed")))


@pytest.fixture(scope="module")
def shelf(finished_run: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """The same for all examples of a property; whoever damages a file puts it back."""
    folder = tmp_path_factory.mktemp("shelf") / "packed"
    return LocalStore(Path(shutil.copytree(finished_run.checkpoint, folder)))


@contextmanager
def _holding(path: Path, data: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    old = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        path.unlink() if old is None else path.write_bytes(old)


def _flipped(store: LocalStore, number: int, bit: int) -> AbstractContextManager[None]:
    """One bit of one file."""
    paths = sorted(store.root.iterdir())
    path = paths[number % len(paths)]
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    return _holding(path, bytes(data))


def _edit(store: LocalStore, name: str, change: Callable[[Any], object]) -> None:
    """Change a JSON file; a manifest is sealed again."""
    document = json.loads(store.read(name))
    change(document)
    sealed = document.pop("seal", None) is not None
    text = json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
    store.put(name, [_sealed(text) if sealed else text])


def _list(store: LocalStore, name: str, data: bytes = b"", **changes: Any) -> None:
    """Let the manifest name one more file."""
    new = {name: digest_of([data]).model_dump() | changes}
    _edit(store, MANIFEST_FILE, lambda document: document["files"].update(new))


ONE = b'{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
TWICE, GAP = (
    b'{"x":' + ONE + b',"%s":' % n + r + b"}" for n, r in ((b"x", ONE), (b"y", ONE[:-4] + b"3,5]}"))
)
HEADERS = {
    "2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header that ends early": struct.pack("<Q", 100_000_000) + b"{}",
    "90 MB of brackets": _file(b"[" * 90_000_000),
    "deep": _file(b'{"x":' * 100_000),
    "no object": _file(b'"x"'),
    "invalid UTF-8": _file(b'{"\xff\xfe":1}'),
    "UTF-16": _file(_tensor([4])[8:-4].decode().encode("utf-16"), b"abcd"),
    "a lone surrogate": _file(b'{"\\ud800":' + ONE + b"}", b"ab"),
    "a name twice": _file(TWICE, b"ab"),
    "overlap": _file(TWICE.replace(b'"x"', b'"y"', 1), b"ab"),
    "a gap": _file(GAP, b"abcde"),
    "a name of a megabyte": _file({"x" * 2**20: 1}),
    "5000 digits": _file(b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}"),
    "no dtype": _file({"x": {"shape": [4], "data_offsets": [0, 4]}}, b"abcd"),
    "a dtype that is a list": _file({"x": {"dtype": [[]], "shape": [], "data_offsets": [0, 0]}}),
    "pickle": pickle.dumps({"x": os.system}),
    "a product that overflows": _tensor([2**63, 2**63, 0], (0, 0), b""),
    "a dimension that overflows": _tensor([0, 2**64], (0, 0), b""),
    **{f"shape {s!r}": _tensor(s) for s in (None, 4, "4", [-4], [-2, -2], ["4"], [None], {"4": 1})},
    **{f"shape {s!r}": _tensor(s) for s in ([4.0], [4.5], [True, 4], [[4]], [2**63, 2**63])},
    **{f"shape {s!r}": _tensor(s) for s in ([float("nan")], [float("inf")], [2**64 + 4])},
    **{f"offsets {o!r}": _tensor([4], o) for o in (None, [], [0], [0, 4, 4], [4, 0], [-4, 0])},
    **{f"offsets {o!r}": _tensor([4], o) for o in ([0.0, 4.0], [False, 4], ["0", "4"], [0, 2**70])},
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_refused(store: LocalStore, content: bytes) -> None:
    store.put("file", [content])
    _refused(lambda: _read_all(store, "file"))


@settings(max_examples=150)
@given(field=st.sampled_from(["dtype", "shape", "data_offsets", "x", ""]), value=JSON)
def test_whatever_a_header_says_the_library_reads_the_same(
    shelf: LocalStore, field: str, value: object
) -> None:
    header: dict[str, Any] = {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    (header["x"] if len(field) > 1 else header)[field] = value
    content = _file(header, b"abcd")

    def read() -> None:
        ours = _read_all(shelf, "file")
        assert ours == {n: bytes(t["data"]) for n, t in safetensors.deserialize(content)}

    with _holding(shelf.path("file"), content):
        _refused_or(read)


@pytest.fixture(scope="module")
def documents(finished_run: Any) -> dict[type[Document], bytes]:
    """One of each kind that a store holds, without its seal."""
    kinds = [kind for kind in vars(manifest).values() if isinstance(kind, type)]
    found = {}
    for stat in finished_run.store.walk(keys.RUNS):
        for kind in kinds:
            with suppress(MbqError, pydantic.ValidationError):
                if issubclass(kind, Document):
                    text = manifest.read_sealed(finished_run.store, stat.key)
                    kind.model_validate_json(text)
                    found[kind] = text
    assert len(found) == 10
    return found


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(number=st.integers(0), place=st.integers(0), value=JSON)
def test_a_sealed_document_is_refused_or_means_what_it_says(
    store: LocalStore, documents: Any, number: int, place: int, value: object
) -> None:
    kind, text = list(documents.items())[number % len(documents)]
    put_document(store, "file", kind.model_validate_json(text))
    assert store.read("file") == _sealed(text), "seals that are made here are not right"
    members = list(re.finditer(rb'"[^"]*"|[\d.e-]+|true|false|null|[\[{]', text))
    start, end = members[place % len(members)].span()
    new = json.dumps(value).encode()
    extra = {b"{": b'{"extra":' + new + b",", b"[": b"[" + new + b","}.get(text[start:end], new)
    store.path("file").write_bytes(_sealed(text[:start] + extra + text[end:]))

    def read() -> None:
        found = get_document(store, "file", kind)
        assert kind.model_validate_json(found.model_dump_json()) == found

    _refused_or(read)


NONSENSE = [*b'NaN Infinity 1e999 \xff "\\ud800" "\\u0000" {} null'.split(), b"[" * 100_000]
NONSENSE += [b"9" * 4200, b"9" * 5000, b"[" * 150 + b"]" * 150, b'"%s"' % (b"n" * 100_000)]


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: ascii(value[:9]))
def test_nonsense_in_a_sealed_manifest_is_refused(packed: LocalStore, value: bytes) -> None:
    text = manifest.read_sealed(packed, MANIFEST_FILE)
    packed.put(MANIFEST_FILE, [_sealed(text.replace(b'e": 32,', b'e": ' + value + b","))])
    _refused(lambda: open_checkpoint(packed))


def test_a_run_of_a_later_format_is_told_from_a_damaged_one(
    finished_run: Any, store: LocalStore
) -> None:
    document = finished_run.document.model_dump(mode="json") | {"format_version": 99}
    document["spec"]["calibration"]["novelty"] = 1
    store.put(keys.spec_key("abc"), [_sealed(json.dumps(document).encode())])
    assert "has format 99" in _refused(lambda: find_run(store, "abc"))


@pytest.mark.parametrize("run", ["../../elsewhere", "another"])
def test_a_run_in_the_folder_of_another_is_refused(
    finished_run: Any, store: LocalStore, run: str
) -> None:
    put_document(store, keys.spec_key("abc"), finished_run.document.model_copy(update={"run": run}))
    _refused(lambda: find_run(store, "abc"))


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
    "lists in a header": ("x", lambda: _file(_fill(b'{"x":[', b"[],", b"1]}", HEADER))),
    "tensors in a header": ("x", lambda: _file(_members(EMPTY, HEADER))),
    "large dimensions": ("x", lambda: _tensor([10**4000] * 1500)),
    "wrong members": (MANIFEST_FILE, lambda: _sealed(_fill(b'{"blocks":[', b"1,", b"1]}", ROOM))),
    "unknown members": (MANIFEST_FILE, lambda: _sealed(_members(b"1", ROOM))),
    "lists in a document": (MANIFEST_FILE, lambda: _sealed(_fill(b'{"x":[', b"[],", b"1]}", ROOM))),
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
try:
    readers[file]()
except errors.MbqError as error:
    print(type(error).__name__)
"""


def _read_with_little(file: str, folder: Path) -> str:
    """What the reader of a file says that has 10 seconds and a GiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, file, str(folder)],
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=10,
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
    _list(packed, "huge", size_bytes=2**40, part_sha256=parts)
    assert _read_with_little("all", packed.root) == "InputError"
    written = packed.path("target").rglob("*")
    assert sum(path.stat().st_blocks * 512 for path in written) < 2**20


def test_a_config_of_a_gigabyte_is_refused_unread(packed: LocalStore) -> None:
    _list(packed, CONFIG_FILE, size_bytes=2**30, part_sha256=["0" * 64] * (2**30 // PART_BYTES))
    _refused(lambda: pull(open_checkpoint(packed), packed.path("target"), None, _silent))


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
    _list(packed, name)
    _refused(lambda: open_checkpoint(packed))


@pytest.mark.parametrize("name", [*NAMES, "x" * 300, "\ud800", None, 5, ["x"]], ids=ascii)
def test_an_index_names_plain_files(packed: LocalStore, name: object) -> None:
    _edit(packed, INDEX_FILE, lambda document: document["weight_map"].update(more=name))
    _refused(lambda: Source(str(packed.root)).tensors)


@pytest.mark.parametrize(
    "slices", [[], [[]] * 3, [[SLICE]] * 4, [[SLICE] * 2, [], [], []], [["x"], [], [], []]]
)
def test_slices_hold_files_of_the_manifest_once(packed: LocalStore, slices: object) -> None:
    _edit(packed, MANIFEST_FILE, lambda document: document.update(slice_files=slices))
    _refused(lambda: open_checkpoint(packed))


@pytest.mark.parametrize("change", [{"more": BASE}, {"lm_head.weight": None}], ids=str)
def test_an_index_and_its_files_name_the_same_tensors(packed: LocalStore, change: Any) -> None:
    def edit(document: Any) -> None:
        files = document["weight_map"] | change
        document["weight_map"] = {name: file for name, file in files.items() if file}

    _edit(packed, INDEX_FILE, edit)
    _refused(lambda: Source(str(packed.root)).tensors)


def test_a_block_of_5000_digits_is_no_block() -> None:
    entry = Entry(f"model.layers.{'9' * 5000}.x.weight", "F32", (4, 4))
    assert find_linears({entry.name: entry}) == []


@settings(max_examples=100)
@given(value=JSON, key=st.sampled_from(["max_bits", "quant_method", "quantization_config", "x"]))
def test_a_config_is_refused_or_cut(value: object, key: str) -> None:
    part: dict[str, Any] = {"quant_method": "mbq", "max_bits": 8, key: value}
    config = json.dumps({"quantization_config": part, key: value}).encode()
    _refused_or(lambda: config_bits(cut_config(config, config_bits(config))))


@settings(max_examples=60)
@given(number=st.integers(0), bit=st.integers(0))
def test_every_flipped_bit_of_a_folder_is_found(shelf: LocalStore, number: int, bit: int) -> None:
    with _flipped(shelf, number, bit), suppress(MbqError):
        assert verify(open_checkpoint(shelf), _silent)


def test_a_config_with_other_white_space_is_not_what_was_written(packed: LocalStore) -> None:
    packed.put(CONFIG_FILE, [packed.read(CONFIG_FILE) + b" "])
    assert verify(open_checkpoint(packed), _silent)


@settings(max_examples=30)
@given(number=st.integers(0), bit=st.integers(0), there=st.booleans())
def test_a_pull_from_or_into_a_damaged_folder_is_right_or_refused(
    shelf: LocalStore, tmp_path_factory: Any, number: int, bit: int, there: bool
) -> None:
    target = LocalStore(tmp_path_factory.mktemp("pulled") / "target")
    if there:
        pull(open_checkpoint(shelf), target.root, None, _silent)
    pulled = []
    with _flipped(target if there else shelf, number, bit), suppress(MbqError):
        pull(open_checkpoint(shelf), target.root, None, _silent)
        pulled = [(path.name, path.read_bytes()) for path in target.root.iterdir()]
    assert pulled or there or not target.path(CONFIG_FILE).exists()
    assert all(data == shelf.read(name) for name, data in pulled)


@pytest.mark.parametrize(
    "name", ["x" * 250, "x" * 300, "con", "ü" * 100, "config.json "], ids=ascii
)
def test_odd_names_are_pulled_into_the_folder_or_not_at_all(packed: LocalStore, name: str) -> None:
    _list(packed, name, b"odd")
    with suppress(OSError):
        packed.path(name).write_bytes(b"odd")
    target = packed.root.with_name("target")
    _refused_or(lambda: pull(open_checkpoint(packed), target, None, _silent))
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
    _refused_or(lambda: pull(open_checkpoint(packed), target, None, _silent))
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
    _list(packed, "more.safetensors", evil)
    packed.path("more.safetensors").write_bytes(evil)
    _refused(lambda: pull(open_checkpoint(packed), target, None, _silent))
    packed.path(name).write_bytes(evil)
    if name == "pytorch_model.bin":
        packed.delete(INDEX_FILE)
    assert "is damaged" in _refused(lambda: load_model(packed.root))
    assert not ran.exists() and not (target / CONFIG_FILE).exists()


CURVES = '{"8": {"average_bits": %s, "log_thresholds": %s}}'
DAMAGE = {
    "": '[] | "mbq" | 5',
    "max_bits": 'GONE | null | 0 | -2 | 3 | "8" | true | 10 | 2000000000 | []',
    "group_size": 'GONE | null | 0 | -32 | "32" | 48 | 32.0',
    "linears": 'GONE | null | [] | "x" | ["x"] | [1] | ["mlp.down_proj"] | {}',
    "unknown": "1",
    "routing": '0 | [] | {} | "x"',
    "routing/knots": 'GONE | null | -1 | 0 | "1" | 3',
    "routing/slices": 'GONE | null | 0 | 3 | "4" | 1000000000000',
    "routing/width": 'GONE | "8" | -1 | 0 | 1000000000000 | []',
    "routing/routers": 'GONE | null | [] | {"x": ["y"]} | {"x": []} | {"x": 5} | {}',
    "routing/curves": " | ".join(
        ["GONE", "null", CURVES % ("[]", "[]"), CURVES % ('"28"', "[1, 0]")]
        + [CURVES % ("[2, 8]", end) for end in ('["a", "b"]', "[1]", "[NaN, NaN]", "[0, 1]")]
    ),
}


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

    _edit(packed, CONFIG_FILE, change)
    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(5)
    try:
        assert "unpack" not in _refused(lambda: load_model(packed.root, average_bits=3.0))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _rewrite(store: LocalStore, name: str, change: Callable[[Entry], Entry | None]) -> None:
    """Change the tensors of a file."""
    opened, data = open_tensors(store, name), _read_all(store, name)
    pairs = [(new, data[entry.name]) for entry in opened.entries.values() if (new := change(entry))]
    store.put(name, encode([entry for entry, _ in pairs], [data for _, data in pairs]))


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_model_that_lacks_a_tensor_is_refused(packed: LocalStore, name: str) -> None:
    _rewrite(packed, BASE, lambda entry: None if entry.name == name else entry)
    assert name in _refused(lambda: load_model(packed.root))


@pytest.mark.parametrize("file", [BASE, SLICE])
@pytest.mark.parametrize("what", ["shape", "dtype"])
def test_a_tensor_of_another_kind_is_refused(packed: LocalStore, file: str, what: str) -> None:
    def change(entry: Entry) -> Entry:
        if what == "shape":
            return Entry(entry.name, entry.dtype, (*entry.shape[::-1], 1))
        return Entry(entry.name, "F32" if entry.dtype == "I32" else "I32", entry.shape)

    _rewrite(packed, file, change)
    _refused(lambda: load_model(packed.root))


@pytest.mark.parametrize("absolute", [True, False])
def test_no_weights_are_loaded_from_outside_of_the_folder(
    packed: LocalStore, absolute: bool
) -> None:
    outside = packed.path(BASE).replace(packed.root.with_name("outside.safetensors"))
    name = str(outside) if absolute else f"../{outside.name}"
    packed.put(INDEX_FILE, [packed.read(INDEX_FILE).replace(BASE.encode(), name.encode())])
    _refused(lambda: load_model(packed.root))
