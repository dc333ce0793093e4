"""The run-time router against its token-by-token definition, and the curve of thresholds."""

import copy
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq.kernels.precision import Curve, Precision
from mbq.kernels.reference import route
from mbq.kernels.router import (
    Gates,
    Router,
    bits_taken,
    interpolate,
    invert,
    pack_halves,
    unpack_halves,
)
from mbq.kernels.widths import WIDTHS
from tests.support.routers import as_bits, random_router

K, LINEARS, BITS, EXTRA, WIDTH, KNOTS = 96, 3, 8, 4, 5, 6
CURVES = {
    3: Curve((2.0, 2.5, 3.0), (10.0, 4.0, -6.0)),
    4: Curve((3.0, 4.0), (5.0, 1.0)),
    6: Curve((4.0, 6.0), (3.0, -3.0)),
    8: Curve((6.0, 8.0), (2.0, -8.0)),
}


def _router(width: int | None, knots: int = KNOTS) -> tuple[Router, Precision]:
    precision = Precision(BITS)
    precision.bits = None
    return random_router(precision, K, LINEARS, width, knots), precision


def _reference(router: Router, x: torch.Tensor, log_threshold: float) -> torch.Tensor:
    """Widths from the buffers' raw values; the map of `random_router` is inverted by hand."""
    head = router.get_buffer("head").view(torch.float32)
    trunk, offset = torch.zeros(0, K), torch.zeros(0)
    if router.width:
        halves = router.get_buffer("trunk").view(torch.float16)
        trunk, offset = halves.float(), router.get_buffer("offset").view(torch.float32)
    threshold = torch.empty(EXTRA, LINEARS)
    for linear in range(LINEARS):
        earning = log_threshold - linear / 4
        # Slope 2 between the knots at -3 and 3, slope 1 beyond them.
        inside = min(max(earning, -6.0), 6.0)
        threshold[:, linear] = inside / 2 + (earning - inside)
    return route(x, trunk, offset, head, threshold)


@pytest.mark.parametrize("log_threshold", [-9.0, -1.0, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("width", [0, WIDTH])
def test_widths_equal_the_definition(width: int, log_threshold: float) -> None:
    router, precision = _router(width)
    precision.log_threshold = log_threshold
    x = torch.randn(2, 7, K) * torch.rand(2, 7, 1).exp()
    expected = _reference(router, x.flatten(0, 1), log_threshold)
    for linear in range(LINEARS):
        assert torch.equal(router(x, linear), expected[linear])


def test_gates_are_nested() -> None:
    # All steps but the first earn enough everywhere, the first nowhere: none is taken.
    router, precision = _router(0)
    head = torch.zeros(EXTRA, LINEARS, 2)
    head[0, :, 1], head[1:, :, 1] = -2.0, 2.0
    router.get_buffer("head").copy_(as_bits(head))
    precision.log_threshold = 0.5
    assert router(torch.randn(4, K), 0).tolist() == [2, 2, 2, 2]


def test_gates_take_known_bits() -> None:
    # One column a token: the steps to 3, 4, 6 and 8 bits. What follows a closed gate is not taken.
    gates = torch.tensor(
        [
            [0, 1, 1, 1, 1, 0, 1, 1],
            [0, 0, 1, 1, 1, 1, 0, 1],
            [0, 0, 0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 1, 1, 1, 1],
        ]
    ).bool()
    assert bits_taken(gates).tolist() == [2, 3, 4, 6, 8, 2, 3, 4]
    assert bits_taken(gates[:3]).tolist() == [2, 3, 4, 6, 6, 2, 3, 4]
    assert bits_taken(gates[:2]).tolist() == [2, 3, 4, 4, 4, 2, 3, 4]
    assert bits_taken(gates[:0]).tolist() == [2] * 8
    assert bits_taken(gates.view(4, 2, 4)).tolist() == [[2, 3, 4, 6], [8, 2, 3, 4]]


def test_without_scores_every_token_is_alike() -> None:
    router, precision = _router(None, knots=1)
    # One knot: score -3 stands for log earnings of -6 + linear / 4, so score 0 for 3 more.
    for log_threshold, expected in ((-4.0, [8, 8, 8]), (-2.9, [2, 8, 8]), (0.0, [2, 2, 2])):
        precision.log_threshold = log_threshold
        x = torch.randn(5, K)
        assert [router(x, linear) for linear in range(LINEARS)] == expected


@pytest.mark.parametrize(("width", "knots"), [(WIDTH, KNOTS), (0, KNOTS), (None, 1)])
def test_a_ceiling_hides_the_widths_above_it(width: int | None, knots: int) -> None:
    x = torch.randn(5, K)
    for ceiling in (8, 6, 4, 2):
        router, precision = _router(width, knots=knots)
        precision.log_threshold, precision.max_bits = -100.0, ceiling
        found = router(x, 0)
        assert found == ceiling if width is None else found.tolist() == [ceiling] * 5


def test_linears_of_one_input_share_one_computation() -> None:
    router, precision = _router(WIDTH)
    precision.log_threshold = 0.0
    x = torch.randn(6, K)
    seen = []
    real = router.scores
    router.scores = lambda x: seen.append(1) or real(x)  # type: ignore[func-returns-value]
    for linear in range(LINEARS):
        router(x, linear)
    assert len(seen) == 1
    # The same memory with other values, as a captured graph would use it: looked at again.
    expected = _reference(router, -2 * x, 0.0)
    assert not torch.equal(router(x, 0), expected[0])
    x.mul_(-2.0)
    assert torch.equal(router(x, 0), expected[0])


def test_threads_do_not_get_each_others_widths() -> None:
    router, precision = _router(WIDTH)
    precision.log_threshold = 0.0
    ours, theirs = torch.randn(3, K), torch.randn(7, K)
    expected = _reference(router, theirs, 0.0)

    def ask(frame: Any, event: str, argument: object) -> Any:
        """Before every line of ours, another thread may ask for any of its linears."""
        for linear in (1, 2):
            assert torch.equal(router(theirs, linear), expected[linear])
        return ask

    router(theirs, 0)
    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: ask if frame.f_code is code else None)
    code = Router.forward.__code__
    try:
        found = [router(ours, linear) for linear in range(LINEARS)]
    finally:
        sys.settrace(before)
    assert torch.equal(torch.stack(found), _reference(router, ours, 0.0))


def test_the_threshold_changes_in_place() -> None:
    router, precision = _router(WIDTH)
    precision.log_threshold = 0.0
    router(torch.randn(2, K), 0)
    assert router._threshold_EL is not None
    place = router._threshold_EL.data_ptr()
    precision.log_threshold = 1.0
    router(torch.randn(2, K), 0)
    assert router._threshold_EL.data_ptr() == place


@pytest.mark.parametrize("width", [WIDTH, 0, None])
def test_what_kernels_read_changes_in_place(width: int | None) -> None:
    router, precision = _router(width, knots=KNOTS if width is not None else 1)
    held = router.on_device()
    for bits in (2, 4, 8):
        precision.bits = bits
        router.refresh()
        if isinstance(held, torch.Tensor):
            assert held.tolist() == [[bits]] * LINEARS
        else:
            taken = bits_taken(held.threshold_EL == -math.inf)
            assert taken.tolist() == [bits] * LINEARS
            assert held.threshold_EL.isinf().all()
    precision.bits, precision.log_threshold = None, -2.9
    router.refresh()
    again = router.on_device()
    if isinstance(held, torch.Tensor):
        assert held.tolist() == [[2], [8], [8]]
    else:
        assert isinstance(again, Gates)
        assert held.threshold_EL.isfinite().all()
        assert torch.equal(held.threshold_EL, again.threshold_EL)


@pytest.mark.parametrize("change", [lambda r: r.to(torch.bfloat16), copy.deepcopy])
def test_casting_and_copying_change_no_decision(change: Any) -> None:
    router, precision = _router(WIDTH)
    precision.log_threshold = 0.4
    x = torch.randn(20, K)
    expected = router(x, 1).clone()
    assert torch.equal(change(router)(x, 1), expected)


def test_interpolates_between_knots_and_goes_on_with_slope_one() -> None:
    x, y = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 10.0, 12.0])
    at = torch.tensor([-2.0, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0])
    assert interpolate(x, y, at).tolist() == [-2.0, 0.0, 5.0, 10.0, 11.0, 12.0, 14.0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    st.lists(st.integers(-3, 3), min_size=6, max_size=6),
    st.integers(-10, 10),
)
def test_a_score_above_the_inverse_earns_the_threshold(
    xs: list[int], ys: list[int], quarter: int
) -> None:
    # Flat pieces and jumps on purpose: the gate must decide as the map does, for every score.
    x = torch.tensor(sorted(xs), dtype=torch.float64)
    y = torch.tensor(sorted(ys[: len(xs)]), dtype=torch.float64)
    threshold = torch.tensor([quarter / 2], dtype=torch.float64)
    score = torch.linspace(-12, 12, 193, dtype=torch.float64)
    earns = interpolate(x, y, score) >= threshold - 1e-9
    gate = score >= invert(x, y, threshold) - 1e-9
    assert torch.equal(gate, earns)


@given(
    st.lists(st.floats(0.01, 5), min_size=1, max_size=8),
    st.lists(st.floats(0.01, 5), min_size=8, max_size=8),
    st.floats(-20, 60),
)
def test_the_inverse_of_a_rising_map_undoes_it(
    steps: list[float], rises: list[float], at: float
) -> None:
    x = torch.tensor(steps, dtype=torch.float64).cumsum(0)
    y = torch.tensor(rises[: len(steps)], dtype=torch.float64).cumsum(0)
    point = torch.tensor([at], dtype=torch.float64)
    back = invert(x, y, interpolate(x, y, point))
    assert back.item() == pytest.approx(at, abs=1e-6)


@pytest.mark.parametrize(
    ("bits", "threshold"), [(2.0, 10.0), (2.25, 7.0), (2.5, 4.0), (2.75, -1.0), (3.0, -6.0)]
)
def test_the_curve_is_linear_between_its_points(bits: float, threshold: float) -> None:
    assert CURVES[3].log_threshold(bits) == pytest.approx(threshold)


@pytest.mark.parametrize("bits", [1.99, 6.01, -1.0, math.nan])
def test_averages_end_at_the_loaded_widths(bits: float) -> None:
    with pytest.raises(ValueError, match=r"average bits .* must lie between 2 and 6"):
        Precision(6).set_average_bits(bits, CURVES)


@pytest.mark.parametrize(
    ("average", "wanted"),
    [
        (2.25, (7.0, math.inf, math.inf, math.inf)),
        (3.5, (-math.inf, 3.0, math.inf, math.inf)),
        (5.0, (-math.inf, -math.inf, 0.0, math.inf)),
        (7.5, (-math.inf, -math.inf, -math.inf, -5.5)),
    ],
)
def test_an_average_mixes_the_widths_around_it(average: float, wanted: tuple[float, ...]) -> None:
    precision = Precision(8)
    precision.set_average_bits(average, CURVES)
    assert precision.bits is None
    assert precision.log_thresholds() == pytest.approx(wanted)


@pytest.mark.parametrize("bits", WIDTHS)
def test_at_a_width_all_tokens_are_alike(bits: int) -> None:
    precision = Precision(8)
    precision.set_average_bits(2.5, CURVES)
    precision.set_average_bits(float(bits), {})
    assert precision.bits == bits
    wanted = [-math.inf if step <= bits else math.inf for step in WIDTHS[1:]]
    assert precision.log_thresholds() == tuple(wanted)


@pytest.mark.parametrize(("width", "knots"), [(WIDTH, KNOTS), (0, KNOTS), (None, 1)])
def test_only_the_two_widths_around_an_average_are_given(width: int | None, knots: int) -> None:
    router, precision = _router(width, knots=knots)
    x = torch.randn(40, K)
    for between in ((2, 3), (3, 4), (4, 6), (6, 8)):
        precision.between = between
        seen = set()
        for threshold in (-100.0, -2.9, 0.0, 100.0):
            precision.log_threshold = threshold
            for linear in range(LINEARS):
                found = router(x, linear)
                seen |= {found} if isinstance(found, int) else set(found.tolist())
        assert seen == set(between)


def test_halves_round_trip() -> None:
    value = torch.randn(3, 10).half().float()
    assert torch.equal(unpack_halves(pack_halves(value)), value)
