"""Sharing a budget: known values, the best possible sharing, and what curves promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.kernels.widths import WIDTHS
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
    # One linear, four tokens: the step to 3 bits earns 1, 2, 3 and 4, that to 4 bits 5 less.
    first = torch.tensor([[[4.0, 1.0, 3.0, 2.0]]])
    earnings = [Earnings(torch.cat((first, first - 5)), (10,))]
    found = thresholds(earnings, [2.0, 2.25, 2.5, 3.0], 3)
    assert found[0] > 4.0
    assert found[1:3] == [3.5, 2.5]
    assert found[3] <= 1.0
    assert [realised_bits(earnings, value, 3) for value in found] == [2.0, 2.25, 2.5, 3.0]
    assert thresholds(earnings, [3.25, 3.5], 4) == [-1.5, -2.5]
    assert [realised_bits(earnings, value, 4) for value in (-1.5, -2.5)] == [3.25, 3.5]


def test_steps_cost_their_own_bits() -> None:
    # Two tokens of one linear, one of which takes the step: to 3 bits, to 4, to 6, to 8.
    log = torch.tensor([4.0, 3.0, 2.0, 1.0]).view(4, 1, 1) + torch.tensor([0.0, -1.0])
    earnings = [Earnings(log, (7,))]
    for upper, halfway, threshold in ((3, 2.5, 3.5), (4, 3.5, 2.5), (6, 5.0, 1.5), (8, 7.0, 0.5)):
        assert thresholds(earnings, [halfway], upper) == [threshold]
        assert realised_bits(earnings, threshold, upper) == halfway
    # In place of a width that no threshold gives stands the nearest one that some threshold does.
    assert thresholds(earnings, [4.4, 4.6, 5.4, 5.6], 6)[1:3] == [1.5, 1.5]
    assert [realised_bits(earnings, t, 6) for t in thresholds(earnings, [4.4, 5.6], 6)] == [4, 6]


def test_unequal_linears_average_over_tokens() -> None:
    # A linear of 30 weights: one of two tokens at 6 bits. One of 10: both, then none.
    large = torch.zeros(4, 1, 2)
    large[2, 0] = torch.tensor([1.0, -1.0])
    for value, bits in ((1.0, 6.0), (-1.0, 4.0)):
        earnings = [Earnings(large, (30,)), Earnings(torch.full((4, 1, 1), value), (10,))]
        expected = (30 * (6 + 4) / 2 + 10 * bits) / 40
        assert realised_bits(earnings, 0.5, 6) == pytest.approx(expected)


def test_equal_earnings_are_read_together() -> None:
    log = torch.tensor([[[5.0, 3.0, 3.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0]]])
    earnings = [Earnings(log, (7,))]
    found = [realised_bits(earnings, t, 3) for t in thresholds(earnings, [2.15, 2.2, 2.4], 3)]
    assert found == pytest.approx([2.1, 2.1, 2.5])


def test_linears_count_by_their_weights() -> None:
    # A linear of 30 weights beside one of 10: all its tokens are three quarters of the bits.
    large, small = torch.full((2, 1, 2), 1.0), torch.full((2, 1, 2), 0.0)
    earnings = [Earnings(large, (30,)), Earnings(small, (10,))]
    assert thresholds(earnings, [3.75], 4) == [0.5]
    assert realised_bits(earnings, 0.5, 4) == 3.75


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(3, 2.5), (4, 3.25), (6, 5.0), (8, 7.5)]))
def test_no_mix_of_the_same_bits_earns_more(seed: int, asked: tuple[int, float]) -> None:
    upper, average = asked
    log = _falling(4, 2, 3, seed)
    earnings = [Earnings(log, (1, 1))]
    threshold = thresholds(earnings, [average], upper)[0]
    spent = realised_bits(earnings, threshold, upper)
    step = log[WIDTHS.index(upper) - 1].flatten()
    earned = float(step[step >= threshold].exp().sum())
    low = WIDTHS[WIDTHS.index(upper) - 1]
    # Every way to give six (token, linear) pairs the lower or the upper width.
    for taken in itertools.product((False, True), repeat=6):
        if low + (upper - low) * sum(taken) / 6 <= spent + 1e-9:
            assert float(step[torch.tensor(taken)].exp().sum()) <= earned + 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 4, 6, 8]), st.integers(1, 50))
def test_curves_fall_and_keep_their_promise(seed: int, upper: int, tokens: int) -> None:
    earnings = [
        Earnings(_falling(4, 3, tokens, seed), (40, 10, 10)),
        Earnings(_falling(4, 1, tokens, seed + 1), (60,)),
    ]
    curve = budget_curve({2.5: earnings}, upper)
    assert curve.average_bits == grid(upper)
    assert all(b <= a for a, b in itertools.pairwise(curve.log_thresholds))
    # The step of a token in the largest linear is the smallest there is, at worst.
    step = (1 if upper < 6 else 2) * 60 / 120 / tokens
    for bits, value in zip(curve.average_bits, curve.log_thresholds, strict=True):
        assert abs(realised_bits(earnings, value, upper) - bits) <= step / 2 + 1e-6


@pytest.mark.parametrize(("low", "upper"), [(2, 3), (6, 8)])
def test_curves_keep_their_promise_close_to_the_ends(low: int, upper: int) -> None:
    earnings = [Earnings(_falling(4, 2, 4000, 0), (10, 30))]
    curve = budget_curve({2.5: earnings}, upper)
    assert (curve.average_bits[0], curve.average_bits[-1]) == (low, upper)
    for bits in (low + 0.01, low + 0.03, low + 0.0625, low + 0.1, upper - 0.1, upper - 0.01):
        found = realised_bits(earnings, curve.log_threshold(bits), upper)
        assert found == pytest.approx(bits, abs=0.008)


def test_one_earning_for_all_tokens_is_a_step() -> None:
    earnings = [Earnings(torch.tensor([[[2.0], [1.0]]]), (10, 30))]
    found = [realised_bits(earnings, t, 3) for t in thresholds(earnings, [2.1, 2.15, 2.9], 3)]
    assert found == [2.0, 2.25, 3.0]


def test_between_settled_widths_both_count() -> None:
    # The same tokens earn half a nat more (in logarithms) where the model runs at 2.75 bits.
    at_low = [Earnings(_falling(2, 1, 640, 0), (1,))]
    at_high = [Earnings(at_low[0].log_ELT + 0.5, (1,))]
    alone = budget_curve({2.25: at_low}, 3)
    both = budget_curve({2.25: at_low, 2.75: at_high}, 3)
    moved = {
        bits: after - before
        for bits, before, after in zip(
            alone.average_bits, alone.log_thresholds, both.log_thresholds, strict=True
        )
    }
    assert moved[2.125] == moved[2.25] == 0.0
    assert moved[2.5] == pytest.approx(0.25, abs=1e-4)
    assert [moved[2.75], moved[2.875]] == pytest.approx([0.5, 0.5], abs=1e-4)
