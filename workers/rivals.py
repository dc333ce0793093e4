"""Other ways to choose slices, to hold the routers against: same linears, other counts.

    shuffled   the learned router's counts, given to other tokens of the same batch: what is left of
               its gain is sharing bits across linears
    random     every token of every linear draws between two neighbouring widths
    oracle     the true benefit of each token in place of an expected one; no router can know it

Each stands where a block's router stood: called with an input and the number of a linear, it
answers with slice counts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.kernels.linear import ElasticLinear
from mbq.kernels.quantize import SLICE_BITS, unpack_pair
from mbq.kernels.router import Precision, Router


class ShuffledRouter(nn.Module):
    """Permutes the tokens of another router's counts."""

    def __init__(self, router: Router, generator: torch.Generator) -> None:
        super().__init__()
        self.router = router
        self.generator = generator

    def forward(self, x: Tensor, linear: int) -> Tensor | int:
        counts: Tensor | int = self.router(x, linear)
        if isinstance(counts, int):
            return counts
        order = torch.randperm(len(counts), generator=self.generator)
        return counts[order.to(counts.device)]


class RandomRouter(nn.Module):
    """Draws one of the two slice counts around an average width."""

    def __init__(self, average_bits: float, generator: torch.Generator) -> None:
        super().__init__()
        self.fewer = math.floor(average_bits / SLICE_BITS)
        self.share = average_bits / SLICE_BITS - self.fewer
        self.generator = generator

    def forward(self, x: Tensor, linear: int) -> Tensor:
        drawn = torch.rand(x.numel() // x.shape[-1], generator=self.generator)
        return (self.fewer + (drawn < self.share).long()).to(x.device)


class OracleRouter(nn.Module):
    """Knows what each slice would remove of the linear's error, token by token."""

    def __init__(
        self,
        linears: Sequence[ElasticLinear],
        sources: Sequence[Tensor],
        log_worths: Sequence[float],
        precision: Precision,
    ) -> None:
        super().__init__()
        # In tuples, so that the linears are not registered twice.
        self.linears = tuple(linears)
        self.sources = tuple(sources)
        self.log_worths = tuple(log_worths)
        self.precision = precision
        self.off: dict[int, list[Tensor]] = {}

    def forward(self, x: Tensor, linear: int) -> Tensor:
        gates_ET = self.log_earnings_of(x, linear) >= self.precision.log_threshold
        return 1 + gates_ET[: self.precision.max_slices - 1].long().cumprod(0).sum(0)

    def log_earnings(self, x: Tensor) -> Tensor:
        """True earnings of every slice: float32 [E, L, T]."""
        return torch.stack([self.log_earnings_of(x, n) for n in range(len(self.linears))], dim=1)

    @torch.no_grad()
    def log_earnings_of(self, x: Tensor, number: int) -> Tensor:
        """Those of one linear: float32 [E, T]."""
        linear, source_NK = self.linears[number], self.sources[number].float()
        widths = range(1, linear.precision.max_slices + 1)
        if number not in self.off:
            self.off[number] = [linear.weight(k) - source_NK for k in widths]
        x_TK = x.reshape(-1, x.shape[-1]).float()
        errors = []
        for k in widths:
            _, bias_N = unpack_pair(linear.get_buffer(f"gain_bias_{k}"))
            off_TN = F.linear(x_TK, self.off[number][k - 1], bias_N)
            errors.append(off_TN.square().sum(1))
        benefit_ET = -torch.stack(errors).diff(dim=0)
        # A slice that hurts this token earns nothing.
        return benefit_ET.clamp(min=1e-30).log() + self.log_worths[number]
