"""Correct the thresholds on the routed model, and measure what each average width costs.

Thresholds found on the tokens of the full-precision model miss a little once every linear sees what
quantized linears before it made. So calibration text is run through the routed model three times:
with all bits read, to find a first threshold for each settled average; at these, to correct them;
at the corrected ones, and at the whole widths, to measure. A pass takes all its averages through a
block before it goes to the next one, so a block is made once a pass. Between the settled
averages, thresholds are interpolated from what steps earned at the two around them.

What a width costs is the divergence from the full-precision model: mean Kullback-Leibler divergence
of the next token's distribution, in nats, far less noisy than a difference of perplexities.
`choose` compares methods by it at equal total bits.

Legend: B sequences, T tokens, H hidden_size, E extra widths, L linears of an input.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.config import StoredCurve
from mbq.artifacts.documents import RoutingRecord, SettledWidth
from mbq.artifacts.elastic import elastic_linears
from mbq.kernels.precision import Precision
from mbq.kernels.router import Router
from mbq.kernels.widths import around, widths_up_to
from mbq.workers.allocate import Earnings, budget_curve, realised_bits, thresholds
from mbq.workers.evaluate import sequences_at_once
from mbq.workers.model import Model, hooked
from mbq.workers.rivals import OracleRouter

# Averages that are settled, by the upper of the two widths they mix; others are interpolated.
_SETTLED = {3: (2.25, 2.5, 2.75), 4: (3.25, 3.5), 6: (5.0,), 8: (7.0,)}
# Total bits at which methods are compared: where sharing matters most.
_COMPARED = (2.5, 3.0, 3.5)
# A method that computes more at run time must lose at least this share less.
_WORTH_IT = 0.01


@dataclass(frozen=True)
class Setting:
    """One way to run the model: what is spent on average, and who takes the step.

    At a whole width nobody is asked, and the threshold says nothing.
    """

    average_bits: float
    log_threshold: float = math.inf


@dataclass(frozen=True)
class RoutedModel:
    """A model whose blocks have routers.

    Attributes:
        blocks: makes the blocks, in order, anew for every pass; all share `precision`.
        weights: parameters of the linears of each router, by the router's name inside its block.
    """

    model: Model
    blocks: Callable[[], Iterable[nn.Module]]
    precision: Precision
    weights: Mapping[str, tuple[int, ...]]


_SCORING = (Router, OracleRouter)


def settle(
    routed: RoutedModel, ids_BT: Tensor, microbatch: int, report: Callable[[float], None]
) -> tuple[dict[int, StoredCurve], tuple[SettledWidth, ...]]:
    """A curve for the step to every extra width, and what averages and whole widths cost.

    Args:
        report: called with the finished fraction after every block.
    """
    most = routed.precision.max_bits
    uppers = [bits for bits in _SETTLED if bits <= most]
    wanted = [(upper, bits) for upper in uppers for bits in _SETTLED[upper]]
    whole = [Setting(float(bits)) for bits in widths_up_to(most)]
    # Settings that the three passes run, and the full-precision model.
    work = 1 + len(wanted) + len(wanted) + len(whole) + 1
    first = _telling(routed, report, 0.0, 1 / work)
    with_all_bits, _ = run_settings(first, ids_BT, microbatch, [Setting(float(most))])
    earned = with_all_bits * len(wanted)
    # Where tokens are alike, nothing depends on what a linear sees.
    if any(earnings.log_ELT.shape[2] > 1 for earnings in with_all_bits[0]):
        second = _telling(routed, report, 1 / work, len(wanted) / work)
        earned, _ = run_settings(second, ids_BT, microbatch, _solve(wanted, earned))
    settings = _solve(wanted, earned) + whole
    done = (1 + len(wanted)) / work
    third = _telling(routed, report, done, len(settings) / work)
    measured, hidden = run_settings(third, ids_BT, microbatch, settings)
    costs = _divergences(routed.model, _full_hidden(routed.model, ids_BT, microbatch), hidden)
    settled = [
        SettledWidth(
            average_bits=setting.average_bits,
            realised_bits=_read(setting, earnings),
            divergence=cost,
        )
        for setting, earnings, cost in zip(settings, measured, costs, strict=True)
    ]
    curves = {upper: _curve(upper, wanted, earned) for upper in uppers}
    return curves, tuple(sorted(settled, key=lambda width: width.average_bits))


def _read(setting: Setting, earnings: Sequence[Earnings]) -> float:
    low, high = around(setting.average_bits)
    return float(low) if low == high else realised_bits(earnings, setting.log_threshold, high)


def _telling(
    routed: RoutedModel, report: Callable[[float], None], done: float, share: float
) -> RoutedModel:
    """The same model, whose blocks tell how much is done: a pass is a share of the work."""

    def blocks() -> Iterator[nn.Module]:
        for index, block in enumerate(routed.blocks()):
            yield block
            report(done + share * (index + 1) / routed.model.block_count)

    return replace(routed, blocks=blocks)


def _curve(
    upper: int, wanted: Sequence[tuple[int, float]], earned: Sequence[Sequence[Earnings]]
) -> StoredCurve:
    """The curve of one step, from what it earns at each of its settled averages."""
    of_step = {
        bits: earnings
        for (other, bits), earnings in zip(wanted, earned, strict=True)
        if other == upper
    }
    curve = budget_curve(of_step, upper)
    return StoredCurve(average_bits=curve.average_bits, log_thresholds=curve.log_thresholds)


def choose(records: Sequence[RoutingRecord]) -> RoutingRecord:
    """The method that diverges least at equal total bits; a cheaper one where it hardly matters.

    Args:
        records: from the cheapest method at run time to the dearest.
    """
    best = records[0]
    for record in records[1:]:
        if _log_cost(record) < _log_cost(best) + math.log1p(-_WORTH_IT):
            best = record
    return best


def _log_cost(record: RoutingRecord) -> float:
    """Mean log divergence at the compared totals; infinite where one is out of reach."""
    # What is read need not ascend with what was asked.
    points = sorted(
        (width.realised_bits + record.router_bits, math.log(max(width.divergence, 1e-30)))
        for width in record.settled
    )
    totals, logs = zip(*points, strict=True)
    if totals[0] > _COMPARED[0]:
        return math.inf
    return statistics.fmean(np.interp(_COMPARED, totals, logs).tolist())


def _solve(
    wanted: Sequence[tuple[int, float]], earned: Sequence[Sequence[Earnings]]
) -> list[Setting]:
    return [
        Setting(bits, thresholds(earnings, [bits], upper)[0])
        for (upper, bits), earnings in zip(wanted, earned, strict=True)
    ]


@torch.no_grad()
def run_settings(
    routed: RoutedModel,
    ids_BT: Tensor,
    microbatch: int,
    settings: Sequence[Setting],
) -> tuple[list[list[Earnings]], list[Tensor]]:
    """Run text through the routed model in several settings.

    Returns, by setting, what steps were expected to earn, and the hidden states that leave the
    last block.
    """
    model, precision = routed.model, routed.precision
    embedded = model.embed(ids_BT)
    hidden = [embedded.clone() for _ in settings]
    earned: list[list[Earnings]] = [[] for _ in settings]
    precision.bits = None
    for index, block in enumerate(routed.blocks()):
        routers = {name: m for name, m in block.named_modules() if isinstance(m, _SCORING)}
        # Kernels do not call routers, but every input passes the first of its linears.
        leaders = {m.shared.router: m for m in elastic_linears(block) if m.number == 0}
        for number, setting in enumerate(settings):
            precision.between = around(setting.average_bits)
            precision.log_threshold = setting.log_threshold
            seen: dict[str, list[Tensor]] = {name: [] for name in routers}
            hooks = (
                leaders[router].register_forward_pre_hook(_watch(router, seen[name]))
                for name, router in routers.items()
            )
            with hooked(hooks):
                model.advance(block, index, hidden[number], microbatch)
            earned[number] += [Earnings(_joined(seen[n]), routed.weights[n]) for n in routers]
    return earned, hidden


def _watch(router: nn.Module, seen: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def note(linear: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(router, _SCORING)
        seen.append(router.log_earnings(arguments[0]).cpu())

    return note


def _joined(parts: list[Tensor]) -> Tensor:
    """Earnings of all tokens; where tokens are alike, those of one."""
    return parts[0] if parts[0].shape[2] == 1 else torch.cat(parts, dim=2)


@torch.no_grad()
def _full_hidden(model: Model, ids_BT: Tensor, microbatch: int) -> Tensor:
    hidden_BTH = model.embed(ids_BT)
    for index in range(model.block_count):
        model.advance(model.block(index), index, hidden_BTH, microbatch)
    return hidden_BTH


@torch.no_grad()
def _divergences(model: Model, full_BTH: Tensor, hidden: Sequence[Tensor]) -> list[float]:
    """Mean divergences (nats) of the next token's distribution from the full-precision model's."""
    head = model.head()
    size = sequences_at_once(full_BTH.shape[1], int(model.config.vocab_size))
    totals = [0.0 for _ in hidden]
    for full, *parts in zip(full_BTH.split(size), *(h.split(size) for h in hidden), strict=True):
        expected = F.log_softmax(head(full).float(), dim=-1)
        for number, part in enumerate(parts):
            found = F.log_softmax(head(part).float(), dim=-1)
            totals[number] += F.kl_div(found, expected, reduction="sum", log_target=True).item()
    return [total / (full_BTH.shape[0] * full_BTH.shape[1]) for total in totals]
