"""Losses against the full model's own, and the arithmetic of the table."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mbq.artifacts.errors import NumericError
from mbq.artifacts.source import open_source
from mbq.kernels.reference import round_to_nearest
from mbq.workers.evaluate import perplexity_of, rounded_block, sequence_losses, table
from mbq.workers.model import linears, open_model


def test_losses_are_those_of_the_full_model(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, torch.device("cpu"))
    ids = (torch.arange(5 * 17).view(5, 17) * 13 % 320).int()
    blocks = (model.block(index) for index in range(model.block_count))
    losses = sequence_losses(model, blocks, ids, 2, lambda fraction: None)
    full = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for row, loss in zip(ids.long(), losses, strict=True):
        with torch.no_grad():
            expected = full(row[None], labels=row[None]).loss.item()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_rounded_blocks_hold_rounded_weights(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, torch.device("cpu"))
    original = linears(model.block(0))
    for name, linear in linears(rounded_block(model.block(0), 4, 32)).items():
        assert torch.equal(linear.weight, round_to_nearest(original[name].weight, 4, 32))


def test_table_of_known_losses() -> None:
    losses = {"full": [1.0, 3.0], "rtn-2": [2.0, 4.0], "routed-2.5": [1.5, 3.1]}
    rows = table(losses, {"rtn-2": 2.0, "routed-2.5": 2.4}, {"rtn-2": 0.25, "routed-2.5": 0.5})
    full, rounded, packed = rows
    assert full.perplexity == pytest.approx(math.e**2)
    # Two sequences one apart from their mean: standard deviation sqrt(2), error 1.
    assert full.perplexity_error == pytest.approx(math.e**2)
    assert (full.gap, full.gap_error) == (0.0, 0.0)
    # Paired: the difference is the same in both sequences, so its error is zero.
    assert (rounded.gap, rounded.gap_error) == (1.0, 0.0)
    assert (packed.bits, packed.realised_bits, packed.total_bits) == (2.5, 2.4, 2.9)
    assert packed.gap == pytest.approx(0.3)
    assert packed.gap_error == pytest.approx(0.2)


def test_losses_that_are_not_finite_are_an_error(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, torch.device("cpu"))
    ids = torch.arange(2 * 17).view(2, 17).int()
    blocks = [model.block(index) for index in range(model.block_count)]
    next(iter(linears(blocks[1]).values())).weight[0, 0] = math.inf
    with pytest.raises(NumericError, match="losses are not finite"):
        sequence_losses(model, blocks, ids, 2, lambda fraction: None)


def test_a_perplexity_beyond_all_numbers_is_a_large_one() -> None:
    perplexity, error = perplexity_of([800.0, 900.0])
    assert perplexity > 1e300 and error > 0
