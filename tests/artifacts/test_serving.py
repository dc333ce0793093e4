"""The examples of serving do what they say."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq.artifacts.loading import load_model

SERVING = Path(__file__).parents[2] / "examples" / "serving"


def _run(script: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0


def test_more_bits_are_given_when_the_queue_drains(
    finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(SERVING / "peak.py", str(finished_run.checkpoint), "--requests", "9")
    asked = [float(line.split()[4]) for line in capsys.readouterr().out.splitlines()]
    assert asked == [2.5, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.0]


def test_a_step_that_is_repeated_decodes_what_generate_does(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=4)
    decoder = runpy.run_path(str(SERVING / "captured.py"))["Decoder"](model, 24)
    # The second prompt meets the cache of the first.
    for tokens in (5, 9):
        ids = torch.randint(2, 300, (1, tokens))
        expected = model.generate(
            ids, max_new_tokens=24 - tokens, do_sample=False, eos_token_id=None
        )
        assert list(decoder.decode(ids)) == expected[0, tokens:].tolist()


def test_the_width_changes_between_two_tokens(
    finished_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    widths = ("--average-bits", "8", "--average-bits", "2")
    _run(SERVING / "captured.py", str(finished_run.checkpoint), *widths, "--tokens", "3")
    read = [float(line.split()[5].rstrip(":")) for line in capsys.readouterr().out.splitlines()]
    assert read == [8.0, 2.0]
