"""`eval` and `bench` as a user meets them."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.support.commands import fails


def test_eval_agrees_with_the_runs_own_table(
    invoke: Callable[..., Result], finished_run: Any
) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    result = invoke("eval", run, "--store", store, "--bits", "2,3,8", "--json")
    rows = json.loads(result.stdout)
    status = json.loads(invoke("status", run, "--store", store, "--json").stdout)
    expected = {row["variant"]: row["perplexity"] for row in status["results"]["rows"]}
    assert [row["bits"] for row in rows] == [2, 3, 8]
    for row in rows:
        assert row["perplexity"] == pytest.approx(expected[f"mbq-{row['bits']}"], rel=1e-5)
    result = invoke("eval", run, "--store", store, "--average-bits", "2.25,3.5", "--json")
    rows = json.loads(result.stdout)
    assert [row["average_bits"] for row in rows] == [2.25, 3.5]
    for row in rows:
        # Which token a threshold takes may depend on how many are multiplied at once.
        name = f"routed-{row['average_bits']:g}"
        assert row["perplexity"] == pytest.approx(expected[name], rel=1e-3)
        assert row["realised_bits"] == pytest.approx(row["average_bits"], abs=0.2)


def test_eval_of_a_folder_on_a_text_of_its_own(
    invoke: Callable[..., Result], finished_run: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = str(finished_run.checkpoint)
    text = ["--dataset", "text", "--file", str(text_file), "--sequence-length", "32"]
    result = invoke("eval", folder, "--bits", "4", *text, "--tokens", "256")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("4 bits: ")
    fails(invoke("eval", folder, "--bits", "4"), 2, "names no text", "--dataset")
    fails(invoke("eval", folder, "--bits", "4", "--tokens", "5"), 2, "--tokens", "are of a text")
    fails(invoke("eval", folder, "--bits", "four", *text), 2, "--bits four")
    averages = "--average-bits"
    fails(invoke("eval", folder, averages, "2.5,", *text), 2, "--average-bits 2.5,", "as in 2.5,3")
    fails(invoke("eval", folder, averages, "2.5,9", *text), 2, "--average-bits 9", "2, 3, 4, 6, 8")
    fails(invoke("eval", folder, "--bits", "5", *text), 2, "--bits 5", "2, 3, 4, 6, 8 bits")
    shared = invoke("eval", folder, averages, "2.5", *text, "--tokens", "256")
    assert shared.stdout.startswith("average 2.5 bits (2.")
    for nothing in ("/nowhere", str(tmp_path)):
        fails(invoke("eval", nothing, *text), 3, nothing, "is not a packed checkpoint")
    shutil.copy(f"{folder}/manifest.json", tmp_path)
    fails(invoke("eval", str(tmp_path), *text), 3, "holds no config.json")
    fails(invoke("eval", folder, "--file", "/no.txt"), 2, "mbq-cluster: --file: ", "/no.txt")
    fails(invoke("eval", folder, *text, "--tokens", "5"), 2, "mbq-cluster: --tokens: 5 must be")
    few = tmp_path / "few.txt"
    few.write_text("few words")
    fails(
        invoke("eval", folder, "--file", str(few)),
        2,
        "mbq-cluster: --sequence-length: two sequences",
    )


def test_eval_of_a_cut_checkpoint_says_how_to_have_more(
    invoke: Callable[..., Result], finished_run: Any, text_file: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "two")
    assert invoke("pull", str(finished_run.checkpoint), folder, "--max-bits", "2").exit_code == 0
    text = ["--file", str(text_file), "--sequence-length", "32"]
    result = invoke("eval", folder, "--bits", "4", *text)
    fails(result, 2, "--bits 4", f"{folder} runs at 2 bits; pull it with a larger --max-bits")
    result = invoke("eval", folder, "--average-bits", "9", *text)
    fails(result, 2, "--average-bits 9", f"{folder} runs at 2 bits")
    assert "pull" not in result.stderr


def test_bench_checks_a_run_and_a_folder(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    result = invoke("bench", run, "--store", store)
    assert result.exit_code == 0, result.output
    assert "products of 4 shapes are right, largest error" in result.stdout
    records = json.loads(invoke("bench", str(finished_run.checkpoint), "--json").stdout)
    assert {r["linear"].rpartition(".")[2] for r in records} <= {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert all(0 < r["largest_error"] < 1e-5 for r in records)
    fails(invoke("bench", str(tmp_path)), 3, "manifest.json")
    with contextlib.chdir(finished_run.checkpoint.parent):
        named = invoke("bench", finished_run.checkpoint.name, "--json")
    assert json.loads(named.stdout) == records
    # A folder may be called as a run would be.
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(finished_run.checkpoint, folder)
    assert json.loads(invoke("bench", str(folder), "--json").stdout) == records
    by_path = invoke("bench", f"{store}/runs/{run}", "--json")
    assert json.loads(by_path.stdout) == records


def test_bench_does_not_pass_what_it_could_not_check(
    invoke: Callable[..., Result], finished_run: Any, tmp_path: Path
) -> None:
    four = str(tmp_path / "four")
    assert invoke("pull", str(finished_run.checkpoint), four, "--max-bits", "4").exit_code == 0
    checks = [
        record["checks"]
        for folder in (four, str(finished_run.checkpoint))
        for record in json.loads(invoke("bench", folder, "--json").stdout)
    ]
    # Three widths and their mix, instead of five.
    assert [6 * few for few in checks[:4]] == [4 * many for many in checks[4:]]
    for name in ("model-slice1-00001-of-00001.safetensors", "config.json"):
        (tmp_path / "four" / name).unlink()
        fails(invoke("bench", four), 3, name)


def test_eval_measures_every_stored_width(invoke: Callable[..., Result], finished_run: Any) -> None:
    store, run = str(finished_run.store.root), finished_run.document.run
    for target in ((run, "--store", store), (f"{store}/runs/{run}",)):
        result = invoke("eval", *target, "--json")
        assert [row["bits"] for row in json.loads(result.stdout)] == [2, 3, 4, 6, 8]
