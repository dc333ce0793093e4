"""What `check` says a run takes: sums that a reader can follow."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mbq.artifacts.spec_file import parse_spec
from mbq.orchestrator.cli import main
from mbq.orchestrator.estimate import to_text
from mbq.orchestrator.submit import prepare


def test_a_run_of_the_tiny_model_takes_this(
    tiny_document: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    document = tiny_document(propagation="sequential")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(document))
    checked = CliRunner().invoke(
        main, ["check", str(path), "--json"], env={"MBQ_HOME": str(tmp_path)}
    )
    found = json.loads(checked.stdout)
    known = prepare("tiny", parse_spec(document)).document

    vocabulary, hidden, wide, key_value = 320, 64, 96, 32
    block = 2 * hidden * hidden + 2 * key_value * hidden + 3 * wide * hidden
    channels = 3 * hidden + 2 * key_value + 2 * wide
    weights, tokens = 3 * block, 12 * 32
    # Float32 beside the blocks: embeddings, head, two norms a block and the last one.
    kept = 4 * (2 * vocabulary * hidden + (2 * 3 + 1) * hidden)
    # 8 bits a weight, scale and zero for 32 of them, gain and bias at five widths, and exponents.
    checkpoint = kept + weights + 4 * weights // 32 + 5 * 4 * 3 * channels
    checkpoint += 3 * (6 * hidden + wide)
    forward = 2 * weights + 2 * vocabulary * hidden

    assert found == {
        "run": known.run,
        "model": "tiny",
        "model_digest": known.model_digest,
        "blocks": 3,
        # Three captures, calibrations and settles, four shapes, files of base and four slices, 15
        # rows of the table, and one each to sense, to route and to sample.
        "tasks": 3 + 3 + 3 + 4 + 5 + 15 + 3,
        "quantized_weights": weights,
        "calibration_tokens": tokens,
        # In float32: those of the full-precision model and of 2, 3 and 4 bits.
        "hidden_state_bytes": 4 * tokens * hidden * 4,
        "task_memory_bytes": (
            # The source's weights, those that are trained, gradients, two moments, two limits and
            # two quantized copies, all in float32.
            9 * 4 * block
            # Hidden states of four streams on the way in, and a target.
            + 5 * 4 * tokens * hidden
            + 12 * 8 * 32 * 4 * (wide + hidden)
            # A Gram matrix of every linear's input in each stream, and the widest in inversion.
            + 4 * 4 * (6 * hidden**2 + wide**2)
            + 24 * wide**2
        ),
        "checkpoint_bytes": checkpoint,
        "store_bytes": checkpoint + weights,
        "flops": (
            # Five widths in two passes, forward and backward, and as much as one more around them.
            tokens * 6 * (5 * 2 + 1) * weights
            # Two blocks are run for the next one, on four streams.
            + 2 * tokens * 4 * 2 * block
            + 3 * 8 * 32 * forward
            + 3 * 21 * 128 * forward
            + 200 * checkpoint
            + 15 * 512 * forward
        ),
    }


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0.0 B"),
        (1023, "1023.0 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**40, "1.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(size_bytes: float, text: str) -> None:
    found = {
        "run": "0123456789ab", "model": "tiny", "model_digest": "sha256:0", "blocks": 3,
        "tasks": 36, "quantized_weights": 92_160, "calibration_tokens": 12_345,
        "task_memory_bytes": 2048, "hidden_state_bytes": size_bytes, "checkpoint_bytes": 3072,
        "store_bytes": 4096, "flops": 1.26e15,
    }  # fmt: skip
    assert to_text(found).splitlines() == [
        "run 0123456789ab: tiny (sha256:0)",
        "3 blocks, 92,160 weights to quantize, 36 tasks",
        f"12,345 calibration tokens, {text} of hidden states a block",
        "2.0 KiB of memory for one calibrate task",
        "3.0 KiB checkpoint, 4.0 KiB in the store",
        "1,260.0 TFLOP in all",
    ]
