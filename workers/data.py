"""From a named text to token sequences: read documents, tokenize, cut windows.

Runs once, where a run is submitted; the tokens then travel with the run, so that no worker needs
the network or the text, and what was calibrated on is exactly known. Works without torch.

A document is what its dataset calls one: WikiText-2 and PTB are one document each (lines joined by
a blank line and by a space, the convention of GPTQ and OmniQuant), a file, a JSON line or a module
of the standard library is one document. Every document begins with the model's BOS token if it has
one; where a model computes nonsense without it, as Gemma does, every window does instead.
Calibration windows are drawn without replacement from the documents in a random order; evaluation
windows follow each other from the first document on. Windows never overlap.
"""

import glob
import itertools
import os
import random
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mbq.artifacts.digests import read_chunks
from mbq.artifacts.errors import InputError, StoreError, first_line
from mbq.artifacts.source import Source
from mbq.artifacts.spec import CalibrationText, Evaluation, Text
from mbq.artifacts.store import open_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = NDArray[np.int32]

# Calibration draws its windows from this many times the text it needs.
_OVERSAMPLING = 8
# What reports colour by bits: public-domain prose (A. Lincoln, 1863), numbers and code.
SAMPLE_TEXT = """\
Four score and seven years ago our fathers brought forth, upon this continent, a new nation, \
conceived in liberty, and dedicated to the proposition that all men are created equal.

In 2023, 17.4 % of 1,024 parts failed; in 2024 it was 3.9 %.

def average(values):
    # The mean of a list of numbers.
    total = 0
    for value in values:
        total += value
    return total / len(values)
"""
_SAMPLE_TOKENS = 256
# Folders of the standard library that hold tests, tools or tables rather than code.
_NOT_LIBRARY = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings"}


@dataclass(frozen=True)
class _Load:
    """How `datasets` finds a text: one reader, its rows, and what joins them into a document."""

    path: str
    name: str | None = None
    revision: str | None = None
    column: str = "text"
    splits: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, list[str]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    joiner: str | None = None


_SPLITS = {"calibration": "train", "evaluation": "test"}
_LOADS = {
    "text": _Load("text", options={"sample_by": "document"}),
    "jsonl": _Load("json"),
    "wikitext2": _Load("Salesforce/wikitext", "wikitext-2-raw-v1", splits=_SPLITS, joiner="\n\n"),
    "ptb": _Load(
        "ptb-text-only/ptb_text_only",
        # The repository holds a loading script, which `datasets` no longer runs; the Hub keeps the
        # same rows as Parquet on this branch.
        revision="refs/convert/parquet",
        column="sentence",
        splits=_SPLITS,
        joiner=" ",
    ),
    "c4": _Load(
        "allenai/c4",
        files={
            "calibration": ["en/c4-train.00000-of-01024.json.gz"],
            "evaluation": ["en/c4-validation.00000-of-00008.json.gz"],
        },
        rows=20_000,
    ),
}


def calibration_tokens(text: CalibrationText, source: Source) -> Tokens:
    """Token sequences [samples, sequence_length] to calibrate on.

    Raises:
        InputError: the text cannot be read or is too small.
    """
    wanted = text.samples
    stream = _stream(
        text,
        source,
        "calibration",
        random.Random(text.seed),
        _OVERSAMPLING * wanted * text.sequence_length,
    )
    windows = _windows(stream, text.sequence_length, source)
    if len(windows) < wanted:
        raise InputError(
            f"calibration.samples: {wanted} sequences of {text.sequence_length} tokens need "
            f"{wanted * text.sequence_length:,} tokens, {text.dataset} has {len(stream):,}; lower "
            "samples or sequence_length, or add text"
        )
    order = np.random.default_rng(text.seed).permutation(len(windows))[:wanted]
    return windows[order]


def evaluation_tokens(text: Evaluation, source: Source) -> Tokens:
    """Token sequences [n, sequence_length] to evaluate on: at least two, at most `tokens` tokens.

    Raises:
        InputError: the text cannot be read or is too small.
    """
    stream = _stream(text, source, "evaluation", None, text.tokens)
    windows = _windows(stream, text.sequence_length, source)
    if len(windows) < 2:
        raise InputError(
            f"evaluation.sequence_length: two sequences of {text.sequence_length} tokens are "
            f"needed for a standard error, {text.dataset} has {len(stream):,} tokens; lower "
            "sequence_length or add text"
        )
    return windows[: text.tokens // text.sequence_length]


def sample_tokens(source: Source) -> Tokens:
    """The sample text as one sequence [1, n]."""
    ids = _start(source) + _tokenizer(source).encode(SAMPLE_TEXT, add_special_tokens=False).ids
    longest = min(source.config.get("max_position_embeddings", _SAMPLE_TOKENS), _SAMPLE_TOKENS)
    return _known(np.asarray([ids[:longest]], dtype=np.int32), source)


def _stream(
    text: Text, source: Source, field: str, shuffle: random.Random | None, enough: int
) -> Tokens:
    """Tokens of the documents, one after the other, until there are `enough` of them."""
    tokenizer = _tokenizer(source)
    start = [] if _opens_windows(source) else _start(source)
    pieces: list[list[int]] = []
    count = 0
    for document in _documents(text, field, shuffle):
        ids = start + tokenizer.encode(document, add_special_tokens=False).ids
        pieces.append(ids)
        count += len(ids)
        if count >= enough:
            break
    return _known(np.asarray([t for piece in pieces for t in piece], dtype=np.int32), source)


def _known(tokens: Tokens, source: Source) -> Tokens:
    """The same tokens, all of which the model has embeddings for."""
    size = source.config["vocab_size"]
    if tokens.size and tokens.max() >= size:
        raise InputError(
            f"model.source: the tokenizer of {source.location} gives token {tokens.max()}, the "
            f"model has embeddings for {size:,}; fetch tokenizer and model from the same place"
        )
    return tokens


def _tokenizer(source: Source) -> "Tokenizer":
    from tokenizers import Tokenizer

    data = source.require("tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(
            f"model.source: tokenizer.json of {source.location} is no tokenizer ({error}); fetch "
            "it again"
        ) from error
    # Calibration wants whole documents: a tokenizer's own truncation and padding are for serving.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _start(source: Source) -> list[int]:
    """What every document, or window, begins with."""
    bos = source.config.get("bos_token_id")
    return [bos] if isinstance(bos, int) else []


def _opens_windows(source: Source) -> bool:
    """Whether the BOS token belongs at the start of every window, not of every document."""
    return str(source.config["model_type"]).startswith("gemma")


def _windows(stream: Tokens, length: int, source: Source) -> Tokens:
    start = _start(source) if _opens_windows(source) else []
    room = length - len(start)
    count = len(stream) // room
    opening = np.tile(np.asarray(start, dtype=np.int32), (count, 1))
    return np.concatenate([opening, stream[: count * room].reshape(count, room)], axis=1)


def _documents(text: Text, field: str, shuffle: random.Random | None) -> Iterable[str]:
    if text.dataset == "stdlib":
        paths = library_modules(text, field)
        if shuffle is not None:
            shuffle.shuffle(paths)
        return (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    documents = list(_loaded(text, field))
    if shuffle is not None:
        shuffle.shuffle(documents)
    return documents


def library_modules(text: Text, field: str) -> list[Path]:
    """Modules of the standard library that `include` lists or `exclude` does not, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {
        name: path
        for path in root.rglob("*.py")
        if not _NOT_LIBRARY & set((name := path.relative_to(root)).parts[:-1])
    }
    kept = {name.as_posix() for name in modules}
    if text.include is not None:
        kept &= _listed(text.include, f"{field}.include")
    if text.exclude is not None:
        kept -= _listed(text.exclude, f"{field}.exclude")
    return [modules[name] for name in sorted(modules) if name.as_posix() in kept]


def _listed(path: str, field: str) -> set[str]:
    try:
        return set(Path(path).read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(
            f"{field}: cannot read {path} ({reason}); give a list of modules, one a line"
        ) from error


def _loaded(text: Text, field: str) -> list[str]:
    """Documents of a dataset that the `datasets` library reads."""
    with tempfile.TemporaryDirectory() as folder:
        local = [_local_file(file, field, Path(folder), n) for n, file in enumerate(text.files)]
        return _read_dataset(text, field, local)


def _local_file(file: str, field: str, folder: Path, number: int) -> str:
    """Path of a text file here; one of an object store is downloaded into the folder."""
    if "://" not in file:
        if not os.path.isfile(file):
            raise InputError(f"{field}.files: there is no file {file}; give paths that exist")
        return file
    try:
        store, key = open_object(file)
        path = folder / f"{number}-{key}"
        found = store.stat(key)
        with path.open("wb") as out:
            for chunk in read_chunks(store, key):
                out.write(chunk)
    except (InputError, StoreError) as error:
        raise InputError(f"{field}.files: {error}") from error
    if found is None:
        raise InputError(f"{field}.files: there is no {file}; give objects that exist")
    return str(path)


def _read_dataset(text: Text, field: str, local: list[str]) -> list[str]:
    """Documents of a dataset, or of the local files that stand for those of the text."""
    load = _LOADS[text.dataset]
    # A name is no pattern.
    files = [glob.escape(file) for file in local] or load.files.get(field)
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        rows = load_dataset(
            load.path,
            load.name,
            data_files=files,
            revision=load.revision,
            split="train" if files else load.splits[field],
            streaming=True,
            **load.options,
        )
        texts = [row[load.column] for row in itertools.islice(rows, load.rows)]
    except Exception as error:  # datasets raises whatever its reader or its network raises
        if text.files:
            raise InputError(
                f"{field}.files: cannot read {', '.join(text.files)} as {text.dataset} "
                f'({first_line(error)}); give UTF-8 text, or jsonl with a "text" in every line'
            ) from error
        raise InputError(
            f"{field}.dataset: cannot read {text.dataset} ({first_line(error)}); check the "
            "network, or use text files of your own"
        ) from error
    if not all(isinstance(value, str) for value in texts):
        raise InputError(
            f'{field}.files: every line of {list(text.files)} must hold a string "text"'
        )
    return texts if load.joiner is None else [load.joiner.join(texts)]
