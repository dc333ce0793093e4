"""Rivals must be what they are called, or the ablation says nothing."""

import itertools

import pytest
import torch

from mbq.kernels.bitplanes import pack_planes
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import pack_pair
from mbq.kernels.router import Router
from mbq.kernels.widths import WIDTHS
from mbq.workers.rivals import OracleRouter, RandomRouter, ShuffledRouter
from tests.support.weights import exponents

ROWS, K, GROUP = 6, 64, 32


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _linear(precision: Precision, seed: int) -> tuple[ElasticLinear, torch.Tensor]:
    """An elastic linear and the weight it approximates."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 256, (ROWS, K), dtype=torch.uint8, generator=generator)
    scale = torch.rand(ROWS, K // GROUP, generator=generator) + 0.1
    state = {f"plane_{p}": plane for p, plane in enumerate(pack_planes(code))}
    state["exponent"] = exponents(K)
    state["scale_zero"] = pack_pair(scale, torch.full_like(scale, 2.0))
    for bits in WIDTHS:
        state[f"gain_bias_{bits}"] = pack_pair(torch.ones(ROWS), torch.full((ROWS,), 0.1 / bits))
    linear = ElasticLinear(K, ROWS, GROUP, precision)
    linear.load_state_dict(state)
    # Off by less than an 8-bit step, so that every width brings the weight nearer.
    return linear, linear.weight(8) + 1e-3


def test_shuffled_keeps_the_histogram_and_not_the_tokens() -> None:
    precision = Precision(8)
    precision.bits, precision.log_threshold = None, 0.0
    router = Router(K, 1, 8, 0, 2, precision)
    head = torch.tensor([1.0, 0.0]).expand(4, 1, 2)
    knots = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]) - torch.arange(4.0)[:, None, None]
    router.get_buffer("head").copy_(head.contiguous().view(torch.int32))
    router.get_buffer("knots").copy_(knots[:, None].contiguous().view(torch.int32))
    x = torch.randn(200, K) * torch.randn(200, 1).exp()
    widths = router(x, 0)
    shuffled = ShuffledRouter(router, _generator())(x, 0)
    assert len(widths.unique()) > 1
    assert torch.equal(shuffled.sort().values, widths.sort().values)
    assert not torch.equal(shuffled, widths)


@pytest.mark.parametrize(
    ("bits", "drawn"),
    [
        (2.0, [2]),
        (2.25, [2, 3]),
        (3.0, [3]),
        (3.75, [3, 4]),
        (4.0, [4]),
        (5.5, [4, 6]),
        (7.0, [6, 8]),
        (8.0, [8]),
    ],
)
def test_random_draws_the_average_from_two_neighbours(bits: float, drawn: list[int]) -> None:
    widths = RandomRouter(bits, _generator())(torch.zeros(2, 4000, K), 0)
    assert widths.shape == (8000,)
    assert widths.double().mean().item() == pytest.approx(bits, abs=0.03)
    assert widths.unique().tolist() == drawn


def test_the_oracle_knows_what_each_step_removes() -> None:
    precision = Precision(8)
    precision.bits = None
    pairs = [_linear(precision, seed) for seed in (1, 2)]
    importance = [0.1 + torch.rand(ROWS) for _ in pairs]
    linears, sources = zip(*pairs, strict=True)
    oracle = OracleRouter(linears, sources, importance, [0.5, -0.5], precision)
    x = torch.randn(5, K)
    for number, (linear, source) in enumerate(pairs):
        errors = []
        for bits in WIDTHS:
            out = x @ linear.weight(bits).T + 0.1 / bits
            errors.append((out - x @ source.T).square() @ importance[number])
        # Per bit: the steps to 6 and to 8 bits have two of them.
        benefit = torch.stack([a - b for a, b in itertools.pairwise(errors)])
        benefit /= torch.tensor([1, 1, 2, 2])[:, None]
        expected = benefit.clamp(min=1e-30).log() + (0.5, -0.5)[number]
        found = oracle.log_earnings(x)[:, number]
        hurts = benefit <= 0
        torch.testing.assert_close(found[~hurts], expected[~hurts], rtol=1e-2, atol=1e-2)
        assert (found[hurts] < -50).all()
        precision.log_threshold = expected[0].median().item()
        taken = (found >= precision.log_threshold).long().cumprod(0).sum(0)
        assert torch.equal(oracle(x, number), torch.tensor(WIDTHS)[taken])
