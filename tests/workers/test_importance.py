"""Importance of channels against the Jacobian of a small block."""

import torch
from torch import Tensor, nn

from mbq.workers.importance import channel_importance
from mbq.workers.model import BlockRunner


def test_channels_count_as_much_as_the_output_depends_on_them() -> None:
    class Scaled(nn.Module):
        """Two linears, one behind the other; channels of the first are scaled."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.dead = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x) * torch.tensor([1.0, 10.0, 0.1, 0.0])) + 0 * self.dead(x)

    block = Scaled().requires_grad_(False)
    runner = BlockRunner(block, lambda module, x: module(x), 3)
    found = channel_importance(runner, torch.randn(40, 50, 6), seed=0)
    # Of the squared Jacobian, its sum over outputs: that is how far the weight of `two` goes.
    expected = block.two.weight.square().sum(0) * torch.tensor([1.0, 100.0, 0.01, 0.0])
    assert torch.allclose(found["one"], expected / expected.mean(), rtol=0.2)
    assert torch.allclose(found["two"], torch.ones(6))
    assert torch.equal(found["dead"], torch.ones(6))
