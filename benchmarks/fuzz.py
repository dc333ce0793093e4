"""Feed damaged and hostile artifacts to everything that reads them; they must be refused, clearly.

    python benchmarks/fuzz.py [--seed 0] [--count 20000]
    python benchmarks/fuzz.py --seed 0 --only 1234        # one input again, with its traceback

A tiny checkpoint and a document of each kind are made on the fly. One file is mutated (bits
flipped, cut, spliced; or members of its JSON replaced by nasty ones, then sealed or encoded anew)
and read. Allowed are an MbqError whose message can be shown, and a success that is true: what was
read is what the bytes say, what a digest or a seal vouches for is what was written, and nothing
lies outside of the folder that was written to. All else is a finding: it is printed, its input is
saved in base64 beside the numbers in benchmarks/results/<date>-fuzz.json, and the exit code is 1.
`load_model` is not among the readers: it needs transformers.
"""

import base64
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import click
import safetensors
import yaml
from provenance import provenance
from record import RESULTS

from mbq.artifacts import documents, keys
from mbq.artifacts.checkpoint import INDEX_FILE, find_linears
from mbq.artifacts.config import CONFIG_FILE, config_bits, cut_config
from mbq.artifacts.digests import digest_of
from mbq.artifacts.documents import Manifest
from mbq.artifacts.errors import MbqError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import make_index, open_checkpoint, verify
from mbq.artifacts.pull import pull
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import get_document, put_document
from mbq.artifacts.source import Source
from mbq.artifacts.spec import FORMAT_VERSION, Document
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import Entry, encode, open_tensors

PACKAGES = ("mbq-cluster", "pydantic", "safetensors")
# Beyond this an input counts as a hang, and a message as no message.
MAX_SECONDS = 60
MAX_MESSAGE = 2000
RUN = "0123456789ab"
FOLDERS = {"store", "target", "outside"}
UP = "model.layers.0.mlp.up_proj"
TENSORS = {
    "base.safetensors": (
        Entry("model.norm", "F32", (8,)),
        Entry(f"{UP}.weight", "F16", (4, 4)),
    ),
    "a.safetensors": (Entry("empty", "U8", (0, 3)), Entry(f"{UP}.plane_0", "I32", (4, 2))),
    "b.safetensors": (Entry(f"{UP}.plane_1", "I32", (4, 2)), Entry("one", "I64", ())),
}
SAMPLES: dict[str, Any] = yaml.safe_load("""
Config: {model_type: llama, hidden_size: 4, num_hidden_layers: 1, vocab_size: 8,
  quantization_config: {quant_method: mbq, max_bits: 4, group_size: 32, linears: [mlp.up_proj]}}
ShardRecord: {blobs: [a], file: &blob {size_bytes: 1, part_sha256: [&sha
  0000000000000000000000000000000000000000000000000000000000abcdef], sha256: *sha}}
Manifest: {run: 0123456789ab, model_digest: a, max_bits: 4, group_size: 32,
  files: {a.safetensors: *blob, b.safetensors: *blob}, blocks: [*sha], hardware: [any],
  slice_files: [[a.safetensors], [b.safetensors]]}
RunDocument: {run: 0123456789ab, name: fuzz, model_location: /m, model_commit: null,
  code_version: a, model_digest: a, model_files: {a: *blob}, calibration_tokens: *blob,
  evaluation_tokens: *blob, sample_tokens: null, spec: {model: {source: /m}, calibration: &text
  {dataset: text, files: [/t]}, evaluation: *text}}
BlockRecord: {block: 0, blob: *blob, hardware: any, loss_before: {2: 0.5}, loss_after: {2: 0.2},
  outlier_overlap: {2: {3: 0.5}}, attempt: 1, seconds: 1.5}
Status: {run: 0123456789ab, attempt: 1, state: running, blocks_done: 0, blocks_total: 1,
  fraction: 0.5, seconds_left: null, started_at: 1, updated_at: 2,
  running: [{task: block 0, fraction: 0.5}],
  failures: [{task: block 0, attempt: 1, error: lost, final: false}]}
SensitivityRecord: {sensitivity: {a: 0.5}, blob: *blob}
RoutingRecord: {method: norm, blobs: [*sha], sensitivity: *sha, router_bits: 0.1,
  curves: {3: {average_bits: [2, 3], log_thresholds: [-1, -2]}},
  settled: [{average_bits: 3, realised_bits: 3.1, divergence: 0.1}]}
VariantLosses: {variant: a, manifest_sha256: null, losses: [1, 2], linear_bits: {a: 2}}
TokenBits: {manifest_sha256: *sha, ids: [1, 2], bits: {"3": [2, 4]}}
ValidationRecord: {linear: a, out_features: 4, in_features: 64, manifest_sha256: *sha,
  hardware: any, checks: 1, largest_error: 0.1,
  timings: [{bits: null, tokens: 1, seconds: 0.1, spread_seconds: 0.1}]}
Results: {run: 0123456789ab, method: null, tokens_sha256: *sha, tokens: 9, sequence_length: 8,
  rows: [{variant: a, bits: 2, realised_bits: 2, total_bits: 2.5, perplexity: 9,
  perplexity_error: 0.1, gap: 0.1, gap_error: 0.1}], slice_bytes: [64, 64], base_bytes: 160}
""")
SAMPLES["Manifest"]["format_version"] = FORMAT_VERSION
SEAL = b',\n "seal": "%s"\n}\n'
SEAL_BYTES = len(SEAL % (b"0" * 64))
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|true|false|null|[\[\]{}]')
NASTY = (
    *b"null true false 0 -1 -0 1 2 4 8 16 0.0 4.0 0.5 1e999 -1e999 NaN Infinity {} [] [[]]".split(),
    *b"2147483648 9223372036854775807 18446744073709551616 [1] [0.0,4.0]".split(),
    *b'"" "x" "4" "U8" "../x" "/etc/passwd" "a/b" "..\\\\x" ".partial-x" "." ".." "con"'.split(),
    *b'"manifest.json" "config.json" "x\\u0000y" "\\ud800" "x\\n\\u001b[31m" "\xff"'.split(),
    *(b"9" * n for n in (60, 4200, 4400)),
    *(b'"%s"' % (b"n" * n) for n in (250, 300, 100_000)),
    *(b"[" * n + b"]" * n for n in (150, 900, 990, 2000, 50_000)),
    b'{"a":1}',
    b"[" + b"[]," * 5000 + b"[]]",
)


class Wrong(Exception):
    """Something was accepted that should not have been, or refused without saying why."""


class Hang(BaseException):
    pass


class Lab:
    """Valid artifacts, and folders to read mutated ones in; `given` is the mutated file at hand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.given = ("", b"")
        for name in FOLDERS:
            (root / name).mkdir()
        rng = Random(0)
        self.files = {
            name: b"".join(encode(entries, [rng.randbytes(e.size_bytes) for e in entries]))
            for name, entries in TENSORS.items()
        }
        config = json.dumps(SAMPLES.pop("Config")).encode()
        self.files[CONFIG_FILE] = cut_config(config, 4)
        self.files[INDEX_FILE] = make_index(self.fill("store", self.files), self.files)
        self.files[MANIFEST_FILE] = agreeing(self.files)
        kinds = {name: getattr(documents, name) for name in SAMPLES}
        self.documents: dict[type[Document], bytes] = {}
        for name, kind in kinds.items():
            put_document(LocalStore(root / "store"), name, kind.model_validate(SAMPLES[name]))
            self.documents[kind] = (root / "store" / name).read_bytes()

    def fill(self, folder: str, files: dict[str, bytes], given: str | None = None) -> LocalStore:
        """Make a folder hold these files, of which `given` is the mutated one."""
        if given is not None:
            self.given = given, files[given]
        shutil.rmtree(self.root / folder)
        (self.root / folder).mkdir()
        for name, data in files.items():
            (self.root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / folder / name).write_bytes(data)
        return LocalStore(self.root / folder)


def agreeing(files: dict[str, bytes]) -> bytes:
    """The manifest of these files, sealed as `put_document` does it."""
    digests = {n: digest_of([data]) for n, data in files.items() if n != MANIFEST_FILE}
    document = Manifest.model_validate(SAMPLES["Manifest"] | {"files": digests})
    return seal(document.model_dump_json(indent=1).encode()[:-2])


def seal(body: bytes) -> bytes:
    return body + SEAL % hashlib.sha256(body).hexdigest().encode()


def mutate(rng: Random, name: str, data: bytes) -> bytes:
    """An attack on a file: blind damage, or one that knows its format."""
    if rng.random() < 0.3:
        return damage(rng, data)
    if name.endswith(".safetensors"):
        start = 8 + struct.unpack("<Q", data[:8])[0]
        text, rest = poison(rng, data[8:start].rstrip()), data[start:]
        return struct.pack("<Q", len(text)) + text + (damage(rng, rest) if len(text) % 5 else rest)
    if name in (CONFIG_FILE, INDEX_FILE):
        return poison(rng, data)
    return seal(poison(rng, data[:-SEAL_BYTES]))


def damage(rng: Random, data: bytes) -> bytes:
    """Flip, cut, overwrite, insert or append; never in the padding."""
    out = bytearray(data)
    solid = [n for n, byte in enumerate(data) if byte != 0x20] or [0]
    at, other, length = rng.choice(solid), rng.choice(solid), rng.choice((1, 2, 8, 100))
    match rng.randrange(6):
        case 0 if data:
            for n in rng.choices(solid, k=rng.choice((1, 1, 2, 8))):
                out[n] ^= 1 << rng.randrange(8)
        case 1:
            del out[at:]
        case 2:
            del out[at : at + length]
        case 3:
            out[at : at + length] = rng.randbytes(length)
        case 4:
            out[at:at] = data[other : other + length]
        case _:
            out += rng.choice((b"\0", b"}", rng.randbytes(length)))
    return bytes(out)


def poison(rng: Random, text: bytes) -> bytes:
    """Change members of a JSON text: replace, drop, repeat or exchange them, or add one."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        spans = [match.span() for match in TOKEN.finditer(text)]
        if not spans:
            break
        first = rng.randrange(len(spans))
        start = end = spans[first][0]
        depth = 0
        for at, after in spans[first:]:
            depth += (text[at : at + 1] in b"[{") - (text[at : at + 1] in b"]}")
            end = after
            if depth <= 0:
                break
        old, other = text[start:end], text[slice(*rng.choice(spans))]
        alike = rng.choice((old + b".0", old + b"e0", b'"' + old + b'"', b"-" + old))
        new = rng.choice((*rng.choices(NASTY, k=6), b"", old + b"," + old, other, alike, alike))
        if old[:1] == b"{" and rng.random() < 0.3:
            name = rng.choice((b"extra", b"../x", b"\\ud800", b"manifest.json"))
            new = b'{"%s":%s,%s' % (name, rng.choice((rng.choice(NASTY), other)), old[1:])
        text = text[:start] + new + text[end:]
    return text


def read_tensors(lab: Lab, rng: Random) -> str:
    name = rng.choice(list(TENSORS))
    data = mutate(rng, name, lab.files[name])
    store = lab.fill("store", {name: data}, name)
    digest = digest_of([lab.files[name]]) if rng.random() < 0.2 else None
    opened = open_tensors(store, name, digest)
    data = data if digest is None else lab.files[name]
    check_entries(opened.entries)
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start], object_pairs_hook=once)
    header.pop("__metadata__", None)
    sizes = [n for told in header.values() for n in (*told["shape"], *told["data_offsets"])]
    require(all(type(n) is int for n in sizes), "a size that is no integer")
    ours = {n: (list(e.shape), opened.read(n)) for n, e in opened.entries.items()}
    require(b"".join(read for _, read in ours.values()) == data[start:], "other bytes")
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError:
        return "read, unlike the library"
    same = {n: (t["shape"], bytes(t["data"])) for n, t in theirs.items()} == ours
    require(same, "the library reads other tensors")
    return "read"


def read_document(lab: Lab, rng: Random) -> str:
    kind, original = rng.choice(list(lab.documents.items()))
    key, data = keys.spec_key(RUN), mutate(rng, kind.__name__, original)
    store = lab.fill("store", {key: data}, key)
    if kind is documents.RunDocument:
        require(find_run(store, RUN).run == RUN, "the document is of another run than its folder")
    found = get_document(store, key, kind)
    require(data == seal(data[:-SEAL_BYTES]), "its seal is not that of its bytes")
    again = kind.model_validate_json(found.model_dump_json())
    require(again == found, "written and read again it is another document")
    check_names(getattr(found, "files", ()))
    return "read"


def read_config(lab: Lab, rng: Random) -> str:
    data = mutate(rng, CONFIG_FILE, lab.files[CONFIG_FILE])
    lab.given = CONFIG_FILE, data
    require(type(config_bits(data)) is int, "a width that is no number")
    was, now = json.loads(data), json.loads(cut_config(data, 2))
    was["quantization_config"]["max_bits"] = 2
    # Not by ==: NaN is not NaN.
    require(json.dumps(was, sort_keys=True) == json.dumps(now, sort_keys=True), "not as asked")
    return "read"


def read_source(lab: Lab, rng: Random) -> str:
    files = {name: data for name, data in lab.files.items() if name != MANIFEST_FILE}
    name = rng.choice((CONFIG_FILE, INDEX_FILE, *TENSORS))
    store = lab.fill("store", files | {name: mutate(rng, name, files[name])}, name)
    source = Source(str(store.root))
    require(type(source.config["hidden_size"]) is int, "a size that is no number")
    check_names(source.weight_map.values())
    check_entries(source.tensors)
    require(set(source.tensors) == set(source.weight_map), "the index names other tensors")
    find_linears(source.tensors)
    return "read"


def verify_packed(lab: Lab, rng: Random) -> str:
    name = rng.choice(list(lab.files))
    files = lab.files | {name: mutate(rng, name, lab.files[name])}
    store = lab.fill("store", files, name)
    if faults := verify(open_checkpoint(store), lambda done: None):
        require(max(map(len, faults)) <= MAX_MESSAGE, "the faults are endless")
        return "faults told"
    check_folder(store, files)
    return "verified"


def pull_packed(lab: Lab, rng: Random) -> str:
    """Pull from a hostile store, from one whose manifest agrees with it, or to a damaged folder."""
    name = rng.choice(list(lab.files))
    sent = lab.files | {name: mutate(rng, name, lab.files[name])}
    there: dict[str, bytes] = {}
    way = rng.randrange(3)
    if way == 0 and name != MANIFEST_FILE:
        sent[MANIFEST_FILE] = agreeing(sent)
    elif way == 1:
        sent, there = lab.files, sent
    target = lab.fill("target", there)
    store = lab.fill("store", sent)
    lab.given = name, (there or sent)[name]
    pull(open_checkpoint(store), target.root, rng.choice((None, 2, 4)), lambda done: None)
    check_folder(target, sent)
    require(not verify(open_checkpoint(target), lambda done: None), "it cannot be verified")
    return "pulled"


def check_folder(store: LocalStore, sent: dict[str, bytes]) -> None:
    """Every file that is there is named by the manifest, and right."""
    known = json.loads(sent[MANIFEST_FILE])["files"]
    for path in store.root.iterdir():
        data = path.read_bytes()
        if path.name == CONFIG_FILE:
            require(cut_config(data, config_bits(data)) == data, "not the config that was written")
            data = cut_config(data, 4)
        if path.name not in (MANIFEST_FILE, INDEX_FILE):
            right = hashlib.sha256(data).hexdigest() == known.get(path.name, {}).get("sha256")
            require(right, f"{path.name} is not what the manifest says")
    check_names(json.loads(store.read(INDEX_FILE))["weight_map"].values())


def check_entries(entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        require(showable(name), "the name of a tensor cannot be shown")
        shape = all(type(n) is int and 0 <= n < 2**63 for n in entry.shape)
        require(shape, f"{entry.shape!r:.100} is no shape")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    require(len(dict(pairs)) == len(pairs), "a name that stands there twice")
    return dict(pairs)


def check_names(names: Iterable[str]) -> None:
    for name in names:
        plain = name and name[0] != "." and name.isprintable() and not set(name) & {"/", "\\"}
        require(bool(plain), f"a file is called {name!a:.100}")
        require(name != MANIFEST_FILE, "a manifest cannot know its own digest")


def showable(text: str) -> bool:
    return text.encode(errors="replace").decode() == text


def require(truth: bool, otherwise: str) -> None:
    if not truth:
        raise Wrong(otherwise)


READERS = {
    reader.__name__: reader
    for reader in (
        read_tensors,
        read_document,
        read_config,
        read_source,
        verify_packed,
        pull_packed,
    )
}


def attempt(lab: Lab, reader: str, rng: Random) -> tuple[str, BaseException | None]:
    """How one input ended, and what was wrong with that."""
    signal.alarm(MAX_SECONDS)
    try:
        outcome = READERS[reader](lab, rng)
        inside = {path.name for path in lab.root.iterdir()} == FOLDERS
        require(inside and not os.listdir(lab.root / "outside"), "something was written outside")
        return outcome, None
    except MbqError as error:
        message = str(error)
        if 0 < len(message) <= MAX_MESSAGE and showable(message):
            return type(error).__name__, None
        return "unclear error", Wrong(f"a message of {len(message)} characters: {message!a:.100}")
    except (Exception, Hang) as error:
        return type(error).__name__, error
    finally:
        signal.alarm(0)


def kind_of(error: BaseException) -> str:
    """What a finding is told from others by."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/artifacts/" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return where or re.sub("[0-9]+", "N", str(error).partition(":")[0])


def ring(*_: Any) -> None:
    raise Hang(f"no answer within {MAX_SECONDS} seconds")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--count", default=20_000, show_default=True)
@click.option("--only", type=int, help="Number of the one input to try.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Where results go.")
def main(seed: int, count: int, only: int | None, out: Path) -> None:
    """Try inputs, count how they ended, and write that down."""
    signal.signal(signal.SIGALRM, ring)
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in READERS}
    findings: dict[str, dict[str, Any]] = {}
    slowest = (0.0, "", 0)
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        lab = Lab(Path(folder))
        before, started = peak_bytes(), time.monotonic()
        for number in range(count) if only is None else [only]:
            began, reader = time.monotonic(), list(READERS)[number % len(READERS)]
            outcome, error = attempt(lab, reader, Random(f"{seed}/{number}"))
            slowest = max(slowest, (round(time.monotonic() - began, 3), reader, number))
            outcomes[reader][outcome] += 1
            if only is not None:
                traceback.print_exception(error)
                print(reader, outcome, *lab.given)
            elif error is not None:
                kind = f"{reader}: {type(error).__name__}: {kind_of(error)}"
                data = base64.b64encode(lab.given[1]).decode()
                if kind not in findings:
                    click.echo(
                        f"{kind}\n  --seed {seed} --only {number}: {lab.given[0]} {data:.200}"
                    )
                new = {"seed": seed, "number": number, "file": lab.given[0], "input": data}
                findings.setdefault(kind, new | {"times": 0})["times"] += 1
    result = {
        **provenance(PACKAGES),
        "seconds": round(time.monotonic() - started, 1),
        "outcomes": {name: dict(counts.most_common()) for name, counts in outcomes.items()},
        "slowest": dict(zip(("seconds", "reader", "number"), slowest, strict=True)),
        "peak_bytes": {"before": before, "after": peak_bytes()},
    }
    if only is None:
        path = out / f"{result['date']}-fuzz.json"
        path.write_text(json.dumps(result | {"findings": findings}, indent=1) + "\n")
        click.echo(f"{json.dumps(result, indent=1)}\n{len(findings)} findings\n{path}")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
