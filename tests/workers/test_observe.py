"""What is seen of a full-precision block: how much tokens count, and means over uneven parts."""

import pytest
import torch
from torch import nn

from mbq.workers.model import BlockRunner
from mbq.workers.observe import observe, token_weights


def test_a_token_counts_as_ten_usual_ones_at_most() -> None:
    target = torch.ones(2, 3, 8)
    target[0, 1] = 3.0
    target[1, 2, 5] = 2000.0
    weight = token_weights(target.bfloat16())
    ones = [1.0, 1.0, 1.0]
    # A channel of 2000 is an energy of 500,000 (as bfloat16 has it), of which 10 count.
    assert weight.flatten().tolist() == [*ones, 1.0, 1.0, pytest.approx(2e-5, rel=0.02)]
    assert torch.equal(token_weights(torch.zeros(2, 3, 8)), torch.ones(2, 3, 1))


def test_parts_count_by_their_tokens() -> None:
    linear = nn.Linear(6, 3)
    x = torch.randn(5, 4, 6)
    x[4] += 10
    # Four sequences, then one.
    block = BlockRunner(nn.Sequential(linear), lambda module, x: module(x), 4)
    target, passed = observe(block, x)
    assert torch.allclose(target.out_BTH, linear(x))
    assert torch.allclose(passed["0"].input_mean_K, x.mean((0, 1)), atol=1e-5)
    rms = linear(x).square().mean().sqrt().item()
    assert passed["0"].output_rms == pytest.approx(rms, rel=1e-5)
