"""Settled thresholds on a real small model, and the choice among methods."""

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from mbq.artifacts import keys
from mbq.artifacts.documents import RoutingRecord, SettledWidth
from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.sealed import get_document
from mbq.kernels.precision import Precision
from mbq.kernels.widths import around
from mbq.workers.allocate import realised_bits
from mbq.workers.opened import Opened, RunRef
from mbq.workers.settle import RoutedModel, Setting, choose, run_settings, settle


def _record(method: str, router_bits: float, divergences: list[float]) -> RoutingRecord:
    widths = (2.0, 2.5, 3.0, 3.5, 4.0)
    settled = tuple(
        SettledWidth(average_bits=b, realised_bits=b, divergence=d)
        for b, d in zip(widths, divergences, strict=True)
    )
    return RoutingRecord(
        method=method, blobs=(), sensitivity="", router_bits=router_bits, curves={}, settled=settled
    )


LINEAR = _record("linear", 0.0, [0.30, 0.20, 0.10, 0.05, 0.02])


def test_a_better_method_of_equal_cost_wins() -> None:
    better = _record("norm", 0.0, [0.30, 0.18, 0.09, 0.045, 0.02])
    assert choose([LINEAR, better]) is better
    assert choose([better, LINEAR]) is better


def test_what_a_router_reads_counts() -> None:
    # A tenth better at equal code bits, but half a bit dearer.
    dear = _record("token", 0.5, [0.30, 0.18, 0.09, 0.045, 0.02])
    assert choose([LINEAR, dear]) is LINEAR
    # At this price it cannot even reach the lowest total that is compared.
    assert choose([LINEAR, _record("token", 0.6, [1e-9] * 5)]) is LINEAR


def test_where_it_hardly_matters_the_cheaper_one_stays() -> None:
    assert choose([LINEAR, _record("norm", 0.0, [0.30, 0.1995, 0.0998, 0.0499, 0.02])]) is LINEAR


@pytest.mark.parametrize("method", ["linear", "norm", "token"])
def test_the_routed_model_reads_what_was_asked(finished_run: Any, method: str) -> None:
    store, run = finished_run.store, finished_run.document.run
    record = get_document(store, keys.routing_key(run, method), RoutingRecord)
    assert sorted(record.curves) == [3, 4, 6, 8]
    # A linear of the tiny model is up to a thirteenth of its weights: two bits of it, or half.
    step = 2 * 64 * 96 / 3 / (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    # Of so few tokens of a random model, a single step of a map moves hundredths of a bit.
    within = step / 2 + 1e-6 if method == "linear" else 0.05
    for width in record.settled:
        assert width.realised_bits == pytest.approx(width.average_bits, abs=within)
        assert width.divergence >= 0
    assert {width.average_bits for width in record.settled} >= {2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0}
    assert record.settled[0].divergence > record.settled[-1].divergence


def test_curves_hold_between_the_settled_widths(finished_run: Any) -> None:
    opened = Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    ids = opened.tokens(opened.document.calibration_tokens)[-4:]
    curves = opened.curves("norm")
    asked = (2.04, 2.3, 2.7, 3.3, 3.9, 4.6, 5.7, 7.2)
    settings = [Setting(bits, curves[around(bits)[1]].log_threshold(bits)) for bits in asked]
    precision = Precision(8)
    blocks = [opened.elastic_block(b, precision, "norm") for b in range(3)]
    routed = RoutedModel(opened.model, partial(list, blocks), precision, opened.router_weights)
    earned, _ = run_settings(routed, ids, 2, settings)
    for setting, earnings in zip(settings, earned, strict=True):
        found = realised_bits(earnings, setting.log_threshold, around(setting.average_bits)[1])
        # 128 tokens of a random model: a single step of a map moves hundredths of a bit.
        assert found == pytest.approx(setting.average_bits, abs=0.12)


def test_a_whole_width_is_the_model_at_that_width(finished_run: Any) -> None:
    opened = Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    ids = opened.tokens(opened.document.calibration_tokens)[:2]
    precision = Precision(8)
    blocks = [opened.elastic_block(b, precision, "token") for b in range(3)]
    routed = RoutedModel(opened.model, lambda: blocks, precision, opened.router_weights)
    _, hidden = run_settings(routed, ids, 2, [Setting(3.0), Setting(6.0)])
    for bits, found in zip((3, 6), hidden, strict=True):
        precision.set_bits(bits)
        expected = opened.model.embed(ids)
        for index, block in enumerate(blocks):
            opened.model.advance(block, index, expected, 2)
        torch.testing.assert_close(found, expected)


def test_what_is_expected_is_what_is_read(finished_run: Any) -> None:
    # The share that earnings promise and the bits that linears then read are the same number.
    opened = Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    ids = opened.tokens(opened.document.calibration_tokens)[:4]
    precision = Precision(8)
    blocks = [opened.elastic_block(b, precision, "token") for b in range(3)]
    threshold = opened.curves("token")[4].log_threshold(3.4)
    routed = RoutedModel(opened.model, lambda: blocks, precision, opened.router_weights)
    earned, hidden = run_settings(routed, ids, 2, [Setting(3.4, threshold)])
    linears = [linear for block in blocks for linear in elastic_linears(block)]
    read = sum(linear.tally[1] * linear.weights for linear in linears)
    passed = sum(linear.tally[0] * linear.weights for linear in linears)
    assert read / passed == pytest.approx(realised_bits(earned[0], threshold, 4), abs=2e-3)
    assert torch.isfinite(hidden[0]).all()


def test_what_is_told_of_the_progress_ascends_to_one(finished_run: Any) -> None:
    opened = Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    ids = opened.tokens(opened.document.calibration_tokens)[:2]
    precision = Precision(8)
    routed = RoutedModel(
        opened.model,
        lambda: (opened.elastic_block(b, precision, "norm") for b in range(3)),
        precision,
        opened.router_weights,
    )
    told: list[float] = []
    settle(routed, ids, 2, told.append)
    assert told == sorted(told)
    assert 0 < told[0] < 0.05 and told[-1] <= 1
    # Three passes of three blocks; two of them, of all settings, are most of the work.
    assert max(b - a for a, b in itertools.pairwise(told)) < 0.2
