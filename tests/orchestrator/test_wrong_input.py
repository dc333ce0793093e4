"""Specs, models and presets that cannot work are one line, before anything is made."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from transformers import GPTNeoXConfig, MixtralConfig

from tests.support.commands import fails

Make = Callable[..., dict[str, Any]]


# More than a file system takes.
LONG = "x" * 300
NO_FILES = "calibration.files=[]"


WRONG: list[tuple[str, list[str], tuple[str, ...]]] = [
    ("unknown key", ["--set", "calibration.sampels=3"], ("calibration.sampels", "samples?")),
    ("unknown section", ["--set", "quantization.bits=3"], ("quantization", "unknown key")),
    ("no widths", ["--set", "optimisation.widths=[]"], ("widths", "distinct")),
    ("no such width", ["--set", "optimisation.widths=[2,5]"], ("[2, 5]", "[2, 3, 4, 6, 8]")),
    (
        "width beyond the slices",
        ["--set", "slices=1"],
        ("optimisation.widths [2, 3, 4]", "out of [2]"),
    ),
    ("too many slices", ["--set", "slices=9"], ("slices", "9")),
    ("odd group", ["--set", "group_size=33"], ("group_size 33", "multiple of 32")),
    ("group too wide", ["--set", "group_size=64"], ("64", "96", "mlp.down_proj", "use 32")),
    ("no samples", ["--set", "calibration.samples=0"], ("calibration.samples", "0")),
    ("endless sequence", ["--set", "calibration.sequence_length=99999999"], ("sequence_length",)),
    ("beyond positions", ["--set", "calibration.sequence_length=256"], ("256", "128 positions")),
    ("not a number", ["--set", "threads=many"], ("threads", "'many'", "integer")),
    ("unknown dataset", ["--set", "calibration.dataset=pile"], ("calibration.dataset", "'pile'")),
    ("no such file", ["--set", "calibration.files=[/nowhere.txt]"], ("/nowhere.txt",)),
    ("files for nothing", ["--set", "calibration.dataset=stdlib"], ("stdlib takes no files",)),
    ("too little text", ["--set", "calibration.samples=60000"], ("1,920,000 tokens", "lower")),
    ("endless file", ["--set", f"calibration.files=[{LONG}]"], ("calibration.files", LONG)),
    ("endless folder", ["--set", f"model.source=./{LONG}"], ("model.source", LONG)),
    (
        "endless list",
        ["--set", f"calibration={{dataset: stdlib, exclude: {LONG}}}", "--set", NO_FILES],
        ("calibration.exclude", LONG),
    ),
    (
        "list of bytes",
        ["--set", f"calibration={{dataset: stdlib, exclude: {sys.executable}}}", "--set", NO_FILES],
        ("calibration.exclude", sys.executable, "not UTF-8"),
    ),
    (
        "list in a folder",
        ["--set", "calibration={dataset: stdlib, exclude: /tmp}", "--set", NO_FILES],
        ("calibration.exclude", "/tmp", "Is a directory"),
    ),
    ("no such folder", ["--set", "model.source=./nowhere"], ("model.source", "no folder")),
    ("no such method", ["--set", "optimisation.method=gptq"], ("'gptq'", "'joint' or 'clip'")),
    ("no such sharing", ["--set", "routing.method=best"], ("routing.method", "'best'", "'auto'")),
    ("average too high", ["--set", "evaluation.average_bits=[2.5,9]"], ("average_bits", "9")),
    (
        "average beyond the slices",
        ["--set", "slices=2", "--set", "evaluation.average_bits=[5]"],
        ("evaluation.average_bits [5.0]", "between 2 and 4"),
    ),
    ("average twice", ["--set", "evaluation.average_bits=[3,3]"], ("distinct",)),
    ("unknown rival", ["--set", "evaluation.rivals=[best]"], ("evaluation.rivals", "'best'")),
    (
        "target beyond the slices",
        ["--set", "slices=2", "--set", "routing={method: target, target_bits: 8}"],
        ("routing.target_bits 8.0", "more than 4"),
    ),
    ("malformed setting", ["--set", "threads"], ("--set threads", "field=value")),
    ("unknown scheme", ["--store", "gs://bucket/runs"], ("gs://bucket/runs", "unknown scheme")),
    (
        "unknown scheme of a model",
        ["--set", "model.source=http://x/y"],
        ("mbq-cluster: model.source: http://x/y has an unknown scheme",),
    ),
    (
        "unknown scheme of a text",
        ["--set", "calibration.files=[http://x/y.txt]"],
        ("mbq-cluster: calibration.files: http://x has an unknown scheme",),
    ),
    ("store in a file", ["--store", "/dev/null/store"], ("/dev/null/store", "you may write")),
    ("no dashboard", ["--address", "ray://here:10001"], ("--address ray://here:10001", "http://")),
    ("no address", ["--address", "http://[::1:8265"], ("--address http://[::1:8265: write",)),
    ("no cluster there", ["--address", "http://127.0.0.1:9"], ("cannot reach", "--address")),
    (
        "laptop path, remote cluster",
        ["--address", "http://192.0.2.7:8265"],
        ("path of this machine", "file://"),
    ),
    (
        "laptop model, remote cluster",
        ["--address", "http://192.0.2.7:8265", "--store", "file:///mnt/store"],
        ("model.source", "folder of this machine"),
    ),
]


@pytest.mark.parametrize(
    ("arguments", "words"), [w[1:] for w in WRONG], ids=[w[0].replace(" ", "-") for w in WRONG]
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    tiny_document: Make,
    tmp_path: Path,
    arguments: list[str],
    words: tuple[str, ...],
) -> None:
    path = spec(tiny_document())
    fails(invoke("submit", path, *arguments), 2, *words)
    assert os.listdir(tmp_path) == ["spec.yaml"]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (MixtralConfig, {"num_local_experts": 2}, ("mixture of experts", "dense")),
        (GPTNeoXConfig, {}, ("gpt_neox", "use one of apertus")),
    ],
)
def test_models_we_cannot_quantize(
    invoke: Callable[..., Result],
    spec: Callable[[dict[str, Any]], str],
    make_model: Callable[..., Path],
    tiny_document: Make,
    kind: type,
    changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    folder = make_model(kind, **changes)
    fails(invoke("submit", spec(tiny_document(model={"source": str(folder)}))), 2, *words)


def test_unknown_presets_and_files(invoke: Callable[..., Result], tmp_path: Path) -> None:
    fails(invoke("submit", "llama9-1t"), 2, "llama9-1t", "llama2-13b")
    fails(invoke("check", "gone.yaml"), 3, "no spec file gone.yaml")
    fails(invoke("check", LONG), 2, LONG, "presets are")
    fails(invoke("check", f"{LONG}.yaml"), 2, LONG)
    fails(invoke("eval", LONG), 3, f"there is no run {LONG}")
    assert os.listdir(tmp_path) == []
