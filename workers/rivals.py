"""Other ways to choose widths, to hold the routers against: same linears, other bits.

    shuffled   the learned router's widths, given to other tokens of the same batch: what is left of
               its gain is sharing bits across linears
    random     every token of every linear draws between two neighbouring widths
    oracle     the true benefit of each token, which routers are fitted to, in place of an expected
               one; no router can know it

Each stands where a block's router stood: called with an input and the number of a linear, it
answers with widths.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import unpack_pair
from mbq.kernels.router import Router, bits_taken
from mbq.kernels.widths import around, steps_up_to, widths_up_to


class ShuffledRouter(nn.Module):
    """Permutes the tokens of another router's widths."""

    def __init__(self, router: Router, generator: torch.Generator) -> None:
        super().__init__()
        self.router = router
        self.generator = generator

    def forward(self, x: Tensor, linear: int) -> Tensor | int:
        widths: Tensor | int = self.router(x, linear)
        if isinstance(widths, int):
            return widths
        order = torch.randperm(len(widths), generator=self.generator)
        return widths[order.to(widths.device)]


class RandomRouter(nn.Module):
    """Draws one of the two widths around an average."""

    def __init__(self, average_bits: float, generator: torch.Generator) -> None:
        super().__init__()
        self.low, self.high = around(average_bits)
        self.share = (average_bits - self.low) / max(self.high - self.low, 1)
        self.generator = generator

    def forward(self, x: Tensor, linear: int) -> Tensor:
        drawn = torch.rand(x.numel() // x.shape[-1], generator=self.generator)
        return torch.where(drawn < self.share, self.high, self.low).to(x.device)


class OracleRouter(nn.Module):
    """Knows what each step would remove of the linear's error, token by token.

    Args:
        sources: weights [N, K] of the linears.
        importance: of their output channels [N] (`sensitivity.importance`).
    """

    def __init__(
        self,
        linears: Sequence[ElasticLinear],
        sources: Sequence[Tensor],
        importance: Sequence[Tensor],
        log_worths: Sequence[float],
        precision: Precision,
    ) -> None:
        super().__init__()
        # In tuples, so that the linears are not registered twice.
        self.linears = tuple(linears)
        self.sources = tuple(sources)
        self.importance = tuple(importance)
        self.log_worths = tuple(log_worths)
        self.precision = precision
        self.off: dict[int, list[Tensor]] = {}

    def forward(self, x: Tensor, linear: int) -> Tensor:
        earned_ET = self.log_earnings_of(x, linear)
        wanted_E = earned_ET.new_tensor(self.precision.log_thresholds()[: len(earned_ET)])
        return bits_taken(earned_ET >= wanted_E[:, None])

    def log_earnings(self, x: Tensor) -> Tensor:
        """True earnings of every step: float32 [E, L, T]."""
        return torch.stack([self.log_earnings_of(x, n) for n in range(len(self.linears))], dim=1)

    @torch.no_grad()
    def log_earnings_of(self, x: Tensor, number: int) -> Tensor:
        """Those of one linear: float32 [E, T]."""
        linear, source_NK = self.linears[number], self.sources[number].float()
        widths = widths_up_to(linear.stored_bits)
        if number not in self.off:
            self.off[number] = [linear.weight(bits) - source_NK for bits in widths]
        x_TK = x.reshape(-1, x.shape[-1]).float()
        errors = []
        for bits, off_NK in zip(widths, self.off[number], strict=True):
            _, bias_N = unpack_pair(linear.get_buffer(f"gain_bias_{bits}"))
            off_TN = F.linear(x_TK, off_NK, bias_N)
            errors.append(off_TN.square() @ self.importance[number])
        benefit_ET = -torch.stack(errors).diff(dim=0)
        benefit_ET /= torch.tensor(steps_up_to(linear.stored_bits), device=x.device)[:, None]
        # A step that hurts this token earns nothing.
        return benefit_ET.clamp(min=1e-30).log() + self.log_worths[number]
