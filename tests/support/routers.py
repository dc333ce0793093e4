"""Routers with random values."""

import torch

from mbq.kernels.precision import Precision
from mbq.kernels.router import Router, pack_halves
from mbq.kernels.widths import widths_up_to


def as_bits(value: torch.Tensor) -> torch.Tensor:
    """Float32 values as they are stored."""
    return value.contiguous().view(torch.int32)


def random_router(
    precision: Precision,
    in_features: int,
    linears: int,
    width: int | None,
    knots: int = 6,
    seed: int = 0,
) -> Router:
    """A router whose log earnings are twice the score plus a quarter of the linear's number."""
    generator = torch.Generator().manual_seed(seed)
    router = Router(in_features, linears, precision.max_bits, width, knots, precision)
    extra = len(widths_up_to(precision.max_bits)) - 1
    if width:
        trunk = torch.randn(width, in_features, generator=generator) / 8
        router.get_buffer("trunk").copy_(pack_halves(trunk))
        router.get_buffer("offset").copy_(as_bits(torch.randn(width, generator=generator)))
    if width is not None:
        head = torch.randn(extra, linears, width + 2, generator=generator)
        router.get_buffer("head").copy_(as_bits(head))
    score = torch.linspace(-3, 3, knots).expand(extra, linears, knots)
    constant = torch.arange(linears)[:, None] / 4
    router.get_buffer("knots").copy_(as_bits(torch.stack((score, 2 * score + constant), 2)))
    return router
