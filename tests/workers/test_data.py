"""From text to windows: which tokens, in which order, and when a text will not do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import GemmaConfig

from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source, open_source
from mbq.artifacts.spec import CalibrationText, Evaluation, Text
from mbq.workers.data import calibration_tokens, evaluation_tokens, library_modules


@pytest.fixture
def source(tiny_model: Path) -> Source:
    return open_source(str(tiny_model), "main")


def _calibration(**fields: Any) -> CalibrationText:
    return CalibrationText(**({"samples": 5, "sequence_length": 16} | fields))


def _evaluation(**fields: Any) -> Evaluation:
    return Evaluation(**({"tokens": 256, "sequence_length": 16} | fields))


def test_evaluation_windows_are_the_text_in_order(
    tiny_model: Path, source: Source, text_file: Path
) -> None:
    tokens = evaluation_tokens(_evaluation(dataset="text", files=(str(text_file),)), source)
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    text = text_file.read_text(encoding="utf-8")
    expected = [0, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert tokens.shape == (16, 16)
    assert tokens.dtype == np.int32
    assert tokens.ravel().tolist() == expected[:256]


def test_every_window_of_a_gemma_begins_with_bos(
    make_model: Callable[..., Path], tiny_model: Path, text_file: Path
) -> None:
    source = open_source(str(make_model(GemmaConfig, head_dim=16)), "main")
    tokens = evaluation_tokens(_evaluation(dataset="text", files=(str(text_file),)), source)
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    text = text_file.read_text(encoding="utf-8")
    assert tokens.shape == (16, 16)
    assert tokens[:, 0].tolist() == [0] * 16
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens[:, 1:].ravel().tolist() == expected[: 16 * 15]


def test_calibration_draws_distinct_windows_by_seed(source: Source, text_file: Path) -> None:
    files = (str(text_file),)
    first = calibration_tokens(_calibration(dataset="text", files=files), source)
    again = calibration_tokens(_calibration(dataset="text", files=files), source)
    other = calibration_tokens(_calibration(dataset="text", files=files, seed=1), source)
    assert first.shape == (5, 16)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first, axis=0)) == 5


def test_every_json_line_is_a_document(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = [json.dumps({"text": f"line number {n} of this file", "id": n}) for n in range(40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    tokens = evaluation_tokens(_evaluation(dataset="jsonl", files=(str(path),)), source)
    # The BOS token marks where documents begin; windows cut through them.
    assert (tokens == 0).sum() > 10
    assert tokens[0, 0] == 0


def test_standard_library_by_list(source: Source, tmp_path: Path) -> None:
    chosen = tmp_path / "list.txt"
    chosen.write_text("json/decoder.py\nabc.py\n")
    only = evaluation_tokens(
        _evaluation(dataset="stdlib", include=str(chosen), tokens=100_000), source
    )
    tokenizer = Tokenizer.from_buffer(source.require("tokenizer.json"))
    text = tokenizer.decode(only[0].tolist())
    assert text.startswith("# Copyright 2007")


def test_held_out_modules_are_not_calibrated_on(tmp_path: Path) -> None:
    chosen = tmp_path / "list.txt"
    chosen.write_text("json/decoder.py\nabc.py\n")
    only = library_modules(Text(dataset="stdlib", include=str(chosen)), "evaluation")
    rest = library_modules(Text(dataset="stdlib", exclude=str(chosen)), "calibration")
    every = library_modules(Text(dataset="stdlib"), "calibration")
    assert [path.name for path in only] == ["abc.py", "decoder.py"]
    assert not set(only) & set(rest)
    assert sorted({*only, *rest}) == sorted(every)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": "text", "files": ("/nowhere.txt",)}, "there is no file /nowhere.txt"),
        ({"dataset": "jsonl", "files": ("/nowhere.jsonl",)}, "there is no file /nowhere.jsonl"),
        ({"dataset": "stdlib", "include": "/nowhere.txt"}, "include: cannot read /nowhere.txt"),
        ({"dataset": "wikitext2"}, "calibration.dataset: cannot read wikitext2"),
    ],
)
def test_text_that_is_not_there(source: Source, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        calibration_tokens(_calibration(**fields), source)


@pytest.mark.parametrize(
    ("name", "content", "dataset"),
    [
        ("bad.jsonl", b'{"text": "fine"}\nnot json\n', "jsonl"),
        ("other.jsonl", b'{"body": "no text here"}\n', "jsonl"),
        ("number.jsonl", b'{"text": 5}\n', "jsonl"),
        ("latin.txt", b"caf\xe9" * 100, "text"),
    ],
)
def test_text_that_cannot_be_read(
    source: Source, tmp_path: Path, name: str, content: bytes, dataset: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"calibration\.(dataset|files)") as caught:
        calibration_tokens(_calibration(dataset=dataset, files=(str(path),)), source)
    assert "\n" not in str(caught.value)


def test_text_that_is_too_small(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("just a few words")
    files = (str(path),)
    with pytest.raises(InputError, match=r"calibration\.samples: 5 sequences of 16 tokens need 80"):
        calibration_tokens(_calibration(dataset="text", files=files), source)
    with pytest.raises(InputError, match=r"evaluation\.sequence_length: two sequences of 16"):
        evaluation_tokens(_evaluation(dataset="text", files=files), source)


def test_a_tokenizer_of_another_model(source: Source, text_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source.location, tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    text = _evaluation(dataset="text", files=(str(text_file),))
    with pytest.raises(InputError, match=r"gives token \d+, the model has embeddings for 100"):
        evaluation_tokens(text, open_source(str(folder), "main"))


@pytest.mark.parametrize("name", ["n[1].txt", "a*.txt", "run [v2]/t?.txt"])
def test_a_file_is_the_one_that_was_named(tmp_path: Path, source: Source, name: str) -> None:
    named, others = tmp_path / name, [tmp_path / "n1.txt", tmp_path / "ab.txt", tmp_path / "t1.txt"]
    named.parent.mkdir(exist_ok=True)
    named.write_text("red green blue " * 200, encoding="utf-8")
    for other in others:
        other.write_text("one two three " * 200, encoding="utf-8")
    plain = tmp_path / "plain.text"
    plain.write_text(named.read_text(encoding="utf-8"), encoding="utf-8")
    found, expected = (
        evaluation_tokens(_evaluation(dataset="text", files=(str(file),)), source)
        for file in (named, plain)
    )
    assert np.array_equal(found, expected)
