"""The spec: what it refuses and how it says so, and what decides a run's id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mbq.artifacts.errors import InputError, NotFoundError
from mbq.artifacts.spec import RunSpec, run_id
from mbq.artifacts.spec_file import load_spec, parse_spec

Make = Callable[..., dict[str, Any]]


def _with(document: dict[str, Any], path: str | int, value: Any) -> dict[str, Any]:
    *parents, last = path.split(".") if isinstance(path, str) else [path]
    inner = document
    for parent in parents:
        inner[parent] = dict(inner.get(parent, {}))
        inner = inner[parent]
    inner[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("calibration.sampels", 5, r"calibration\.sampels: unknown key; did you mean samples\?"),
        ("nonsense", 5, "nonsense: unknown key; known keys are model, calibration"),
        ("calibration.samples", 0, r"calibration\.samples: 0 must be greater than or equal to 1"),
        ("calibration.samples", 10**9, "must be less than or equal to 65536"),
        ("calibration.samples", "many", r"calibration\.samples: 'many' must be a valid integer"),
        ("calibration.sequence_length", 4, "must be greater than or equal to 8"),
        ("calibration.dataset", "pile", "calibration.dataset: 'pile' must be 'wikitext2'"),
        ("calibration.files", [], "dataset text needs at least one file"),
        ("calibration.include", "list.txt", "include and exclude belong to stdlib, not to text"),
        ("group_size", 48, "group_size 48 is not a multiple of 32"),
        ("group_size", 16, "must be greater than or equal to 32"),
        ("slices", 5, "must be less than or equal to 4"),
        ("optimisation.widths", [2, 5], r"\[2, 5\] must be distinct bits out of \[2, 3, 4, 6, 8\]"),
        ("optimisation.widths", [1, 2], r"\[1, 2\] must be distinct bits out of \[2, 3, 4, 6, 8\]"),
        ("optimisation.widths", [3, 3], r"\[3, 3\] must be distinct bits"),
        ("optimisation.widths", [], r"\[\] must be distinct bits"),
        ("optimisation.slice_counts", [1, 2], r"optimisation\.slice_counts: unknown key"),
        ("optimisation.method", "magic", "must be 'joint' or 'clip'"),
        (
            "optimisation",
            {"method": "clip", "widths": [3, 4]},
            r"optimisation\.widths \[3, 4\] must hold 2 where the method is clip",
        ),
        ("optimisation.weight_rate", -1, "must be greater than 0"),
        ("propagation", "both", "must be 'sequential' or 'full_precision'"),
        ("dtype", "int8", "must be 'float32' or 'bfloat16'"),
        ("threads", 0, "must be greater than or equal to 1"),
        ("evaluation.tokens", 300, "must hold at least two sequences of 200"),
        ("evaluation.tokens", 40_000_200, "40000200 are more than 200,000 sequences of 200"),
        ("evaluation.average_bits", [2.5, 3.0001], r"\[2\.5, 3\.0001\] .* most three decimals"),
        ("calibration.files", "a.txt", r"calibration\.files: 'a\.txt' must be a list; change it"),
        ("optimisation.widths", 3, r"optimisation\.widths: 3 must be a list; change it"),
        ("model", "/x", "model: '/x' must hold fields, as in `model: {source: ...}`; change it in"),
        ("evaluation", [1], "evaluation: must hold fields, as in `evaluation: {dataset: ...}`"),
        (1, 2, "^1: unknown key; known keys are model"),
        ("model.source", "", "must be a valid string|at least 1 character"),
    ],
)
def test_refuses_with_field_value_and_remedy(
    tiny_document: Make, path: str | int, value: Any, message: str
) -> None:
    document = tiny_document()
    if path == "evaluation.tokens":
        document = _with(document, "evaluation.sequence_length", 200)
    with pytest.raises(InputError, match=message) as caught:
        parse_spec(_with(document, path, value))
    assert "\n" not in str(caught.value)


def test_the_most_that_is_taken(tiny_document: Make) -> None:
    text = tiny_document()["evaluation"] | {"sequence_length": 200, "tokens": 40_000_199}
    evaluation = parse_spec(tiny_document(evaluation=text | {"average_bits": [2.125]})).evaluation
    assert evaluation is not None
    assert (evaluation.tokens, evaluation.average_bits) == (40_000_199, (2.125,))
    clip = {"method": "clip", "widths": [3, 2]}
    assert parse_spec(tiny_document(optimisation=clip)).optimisation.widths == (3, 2)


@pytest.mark.parametrize(
    ("key", "misspelt", "message"),
    [
        ("model", "modle", "modle: unknown key; did you mean model?"),
        ("calibration", "calibraton", "calibraton: unknown key; did you mean calibration?"),
        ("model.source", "sorce", "model.sorce: unknown key; did you mean source?"),
        ("calibration.dataset", "datset", "calibration.datset: unknown key; did you mean dataset?"),
    ],
)
def test_a_misspelt_key_is_named_before_the_one_that_is_missing(
    tiny_document: Make, key: str, misspelt: str, message: str
) -> None:
    document = tiny_document()
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        section[parent] = dict(section[parent])
        section = section[parent]
    section[misspelt] = section.pop(last)
    with pytest.raises(InputError) as caught:
        parse_spec(document)
    assert str(caught.value).startswith(message)


def test_a_missing_section_is_named(tiny_document: Make) -> None:
    document = tiny_document()
    del document["calibration"]
    with pytest.raises(InputError, match="calibration: missing"):
        parse_spec(document)


@pytest.mark.parametrize(
    ("slices", "widths", "allowed"),
    [(1, [2, 3], "[2]"), (2, [2, 6], "[2, 3, 4]"), (3, [8], "[2, 3, 4, 6]")],
)
def test_only_widths_of_the_slices_there_are_can_be_trained(
    tiny_document: Make, slices: int, widths: list[int], allowed: str
) -> None:
    document = tiny_document(slices=slices, optimisation={"widths": widths})
    with pytest.raises(InputError) as caught:
        parse_spec(document)
    assert f"{widths} must be distinct bits out of {allowed}, those of {slices} slices" in str(
        caught.value
    )
    assert parse_spec(tiny_document()).optimisation.widths == (2, 3, 4)
    assert parse_spec(tiny_document(slices=3)).max_bits == 6


def test_is_frozen(tiny_document: Make) -> None:
    spec = parse_spec(tiny_document())
    with pytest.raises(ValidationError):
        spec.group_size = 64  # type: ignore[misc]


def test_round_trips_through_json(tiny_document: Make) -> None:
    spec = parse_spec(tiny_document())
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


def test_settings_win_and_paths_follow_their_origin(
    tmp_path: Path, tiny_document: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "specs"
    folder.mkdir()
    document = tiny_document(model={"source": "./model"}, store="../store")
    document["calibration"] |= {"files": ["a.txt"]}
    (folder / "spec.yaml").write_text(yaml.safe_dump(document))
    monkeypatch.chdir(tmp_path)
    settings = [
        "calibration.samples=7",
        "optimisation.weight_rate=1e-3",
        "evaluation.files=[b.txt]",
    ]
    spec = load_spec(folder / "spec.yaml", settings)
    assert spec.calibration.samples == 7
    assert spec.optimisation.weight_rate == 1e-3
    assert spec.optimisation.passes == document["optimisation"]["passes"]
    assert spec.model.source == str(folder / "model")
    assert spec.calibration.files == (str(folder / "a.txt"),)
    assert spec.evaluation is not None
    assert spec.evaluation.files == (str(tmp_path / "b.txt"),)
    assert spec.store == str(tmp_path / "store")


@pytest.mark.parametrize("setting", ["samples", "=5", "calibration..samples=5", "a.b=[1"])
def test_malformed_settings(tmp_path: Path, tiny_document: Make, setting: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(tiny_document()))
    with pytest.raises(InputError, match="--set"):
        load_spec(path, [setting])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "\x00"])
def test_files_that_hold_no_spec(tmp_path: Path, text: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"spec\.yaml"):
        load_spec(path)
    with pytest.raises(NotFoundError, match="no spec file"):
        load_spec(tmp_path / "other.yaml")


def test_run_id_is_that_of_what_decides_the_bytes(tiny_document: Make) -> None:
    base = parse_spec(tiny_document())
    known = run_id(base, "model", "tokens")
    assert len(known) == 12
    same = [
        tiny_document(store="/elsewhere"),
        tiny_document(resources={"workers": 7}),
        tiny_document(evaluation=None),
    ]
    assert {run_id(parse_spec(document), "model", "tokens") for document in same} == {known}
    different = [
        tiny_document(group_size=64),
        tiny_document(slices=2),
        tiny_document(optimisation={"passes": 3}),
        tiny_document(optimisation={"widths": [2, 4]}),
        tiny_document(optimisation={"method": "clip"}),
        tiny_document(routing={"method": "norm"}),
        tiny_document(routing={"steps": 21}),
        tiny_document(propagation="sequential"),
        tiny_document(dtype="bfloat16"),
        tiny_document(threads=2),
        tiny_document(microbatch=2),
        _with(tiny_document(), "calibration.seed", 1),
    ]
    ids = {run_id(parse_spec(document), "model", "tokens") for document in different}
    ids |= {run_id(base, "other model", "tokens"), run_id(base, "model", "other tokens")}
    assert len(ids) == len(different) + 2
    assert known not in ids
