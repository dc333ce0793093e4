"""Sharing a budget: known values, the best possible sharing, and what curves promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.workers.allocate import (
    Earnings,
    budget_curve,
    grid,
    log_worth,
    realised_bits,
    thresholds,
)


def _falling(extra: int, linears: int, tokens: int, seed: int) -> torch.Tensor:
    """Earnings that fall from step to step, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(1, linears, tokens, generator=generator)
    drops = torch.rand(extra, linears, tokens, generator=generator) + 0.5
    return first - drops.cumsum(0)


def test_worth_is_nats_per_bit() -> None:
    # 0.5 * sensitivity * error per bit, divided by 100 weights.
    assert log_worth(4.0, 100) == pytest.approx(math.log(4.0 / 2 / 100))
    assert math.isfinite(log_worth(0.0, 100))


def test_known_thresholds() -> None:
    # One linear, two steps of a bit that earn the same, four tokens that earn 1, 2, 3 and 4.
    earnings = [Earnings(torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]).expand(2, 1, 4), (10,))]
    found = thresholds(earnings, [2.0, 2.5, 3.0, 4.0], 4)
    assert found[0] > 4.0
    assert found[1:3] == [3.5, 2.5]
    assert found[3] <= 1.0
    for value, bits in zip(found, (2.0, 2.5, 3.0, 4.0), strict=True):
        assert realised_bits(earnings, value, 4) == bits


def test_steps_cost_their_own_bits() -> None:
    # One token of one linear: to 3 bits for 1, to 4 for 1, to 6 for 2 and to 8 for 2 more.
    earnings = [Earnings(torch.tensor([4.0, 3.0, 2.0, 1.0]).view(4, 1, 1), (7,))]
    widths = [2.0, 3.0, 4.0, 6.0, 8.0]
    found = thresholds(earnings, widths, 8)
    assert found[1:4] == [3.5, 2.5, 1.5]
    assert [realised_bits(earnings, value, 8) for value in found] == widths
    # In place of a width that no threshold gives stands the nearest one that some threshold does.
    assert thresholds(earnings, [4.9, 5.1, 6.9, 7.1], 8) == [2.5, 1.5, 1.5, found[4]]
    assert thresholds(earnings, [6.0], 6) == [2.0]
    assert [realised_bits(earnings, 0.0, ceiling) for ceiling in (2, 4, 6, 8)] == [2, 4, 6, 8]


def test_unequal_steps_average_over_tokens_and_linears() -> None:
    # A linear of 30 weights: one token at 6 bits, one at 3. One of 10: both at 8, then both at 2.
    large = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 5.0], [-1.0, 5.0]]).view(4, 1, 2)
    for value, bits in ((1.0, 8.0), (-1.0, 2.0)):
        earnings = [Earnings(large, (30,)), Earnings(torch.full((4, 1, 1), value), (10,))]
        expected = (30 * (6 + 3) / 2 + 10 * bits) / 40
        assert realised_bits(earnings, 0.0, 8) == pytest.approx(expected)


def test_equal_earnings_are_read_together() -> None:
    log = torch.tensor([[[5.0, 3.0, 3.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0]]]).expand(2, 1, 10)
    earnings = [Earnings(log, (7,))]
    found = [realised_bits(earnings, t, 4) for t in thresholds(earnings, [2.3, 2.4, 2.7], 4)]
    assert found == pytest.approx([2.2, 2.2, 3.0])


def test_linears_count_by_their_weights() -> None:
    # A linear of 30 weights beside one of 10: all its tokens are three quarters of the bits.
    large, small = torch.full((2, 1, 2), 1.0), torch.full((2, 1, 2), 0.0)
    earnings = [Earnings(large, (30,)), Earnings(small, (10,))]
    assert thresholds(earnings, [3.5], 4) == [0.5]
    assert realised_bits(earnings, 0.5, 4) == 3.5


def test_a_step_waits_for_the_one_before_it() -> None:
    # The second step and the third earn more than the first, but mean nothing alone.
    earnings = [Earnings(torch.tensor([[[1.0]], [[5.0]], [[4.0]]]), (1,))]
    assert realised_bits(earnings, 3.0, 6) == 2.0
    assert realised_bits(earnings, 0.5, 6) == 6.0
    assert realised_bits(earnings, 0.5, 4) == 4.0
    assert thresholds(earnings, [6.0], 6) == [1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_no_sharing_of_the_same_bits_earns_more(seed: int) -> None:
    log = _falling(3, 2, 2, seed)
    earnings = [Earnings(log, (1, 1))]
    threshold = thresholds(earnings, [3.5], 6)[0]
    spent = realised_bits(earnings, threshold, 6)
    # Earnings are per bit: what a step earns is that times its bits.
    whole = torch.tensor([1, 1, 2]).view(3, 1, 1) * log.exp()
    gates = (log >= threshold).double().cumprod(0)
    earned = float((gates * whole).sum())
    # Every way to give four (token, linear) pairs 2, 3, 4 or 6 bits.
    for steps in itertools.product(range(4), repeat=4):
        if sum((2, 3, 4, 6)[taken] for taken in steps) / 4 > spent:
            continue
        read = torch.tensor(steps).view(1, 2, 2) > torch.arange(3).view(3, 1, 1)
        assert float((read * whole).sum()) <= earned + 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 6, 8]), st.integers(1, 50))
def test_curves_fall_and_keep_their_promise(seed: int, ceiling: int, tokens: int) -> None:
    earnings = [
        Earnings(_falling(4, 3, tokens, seed), (40, 10, 10)),
        Earnings(_falling(4, 1, tokens, seed + 1), (60,)),
    ]
    curve = budget_curve({3.0: earnings}, ceiling)
    assert curve.average_bits == grid(ceiling)
    assert all(b <= a for a, b in itertools.pairwise(curve.log_thresholds))
    # The widest step of a token in the largest linear is the smallest there is, at worst.
    step = (1 if ceiling == 4 else 2) * 60 / 120 / tokens
    for bits, value in zip(curve.average_bits, curve.log_thresholds, strict=True):
        assert abs(realised_bits(earnings, value, ceiling) - bits) <= step / 2 + 1e-6


@pytest.mark.parametrize("ceiling", [4, 8])
def test_curves_keep_their_promise_close_to_the_ends(ceiling: int) -> None:
    earnings = [Earnings(_falling(4, 2, 4000, 0), (10, 30))]
    curve = budget_curve({3.0: earnings}, ceiling)
    for bits in (2.01, 2.03, 2.0625, 2.1, ceiling - 0.1, ceiling - 0.06, ceiling - 0.01):
        found = realised_bits(earnings, curve.log_threshold(bits), ceiling)
        assert found == pytest.approx(bits, abs=0.008)


def test_one_earning_for_all_tokens_is_a_step() -> None:
    earnings = [Earnings(torch.tensor([[[2.0], [1.0]]]).expand(2, 2, 1), (10, 30))]
    found = [realised_bits(earnings, t, 4) for t in thresholds(earnings, [2.2, 2.3, 3.9], 4)]
    assert found == [2.0, 2.5, 4.0]


def test_between_settled_widths_both_count() -> None:
    # The same tokens earn half a nat more (in logarithms) where the model runs at 3.5 bits.
    at_low = [Earnings(_falling(2, 1, 640, 0), (1,))]
    at_high = [Earnings(at_low[0].log_ELT + 0.5, (1,))]
    alone = budget_curve({2.5: at_low}, 4)
    both = budget_curve({2.5: at_low, 3.5: at_high}, 4)
    moved = {
        bits: after - before
        for bits, before, after in zip(
            alone.average_bits, alone.log_thresholds, both.log_thresholds, strict=True
        )
    }
    assert moved[2.125] == moved[2.5] == 0.0
    assert moved[3.0] == pytest.approx(0.25, abs=1e-4)
    assert [moved[3.5], moved[3.875]] == pytest.approx([0.5, 0.5], abs=1e-4)
