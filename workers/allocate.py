"""From what bits are expected to earn to thresholds: one for every average between two widths.

The step of a linear from one width to the next costs its bits for every weight and token. What it
earns a token is the benefit its router expects (`route.py`) times the sensitivity of the loss to
it (`sensitivity.py`; a benefit weighs output channels by 1 on average), per bit:

    earnings = benefit * sensitivity / 2  /  (step bits * out_features * in_features)

in nats per bit. Whoever earns at least a threshold takes the step, nobody else: among mixes of two
widths that is the best use of the bits it costs. An average is a mix of the two widths around it
only, since blocks are trained at whole widths: a model at one width has errors that make up for
each other, and the further apart the widths in it are, the less they do (README, "Sharing bits").
Everything here is pure.

Legend: T tokens (or 1 where all are alike), L linears, E extra widths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbq.kernels.precision import Curve
from mbq.kernels.widths import WIDTHS

# Sensitivity or benefit of a linear that the loss does not feel at all.
_SMALLEST = 1e-30
# Points of a curve lie this far apart.
_STEP_BITS = 0.125
# How often that is halved towards the ends.
_HALVINGS = 6


@dataclass(frozen=True)
class Earnings:
    """Expected earnings of the linears of one input on some tokens.

    Attributes:
        log_ELT: logarithms of nats per bit, float32 [E, L, T].
        weights: weights (parameters) of each linear.
    """

    log_ELT: Tensor
    weights: tuple[int, ...]


def log_worth(sensitivity: float, weights: int) -> float:
    """What turns a log benefit per bit into log earnings (nats per bit)."""
    return math.log(max(sensitivity, _SMALLEST) / 2 / weights)


def thresholds(
    earnings: Sequence[Earnings], average_bits: Sequence[float], upper: int
) -> list[float]:
    """The log threshold at which these tokens get each average width, as nearly as they can.

    Args:
        upper: the width to which steps are taken, from the one below it.
    """
    low, extra = _step(upper)
    values, shares = [], []
    for input_ in earnings:
        tokens = input_.log_ELT.shape[2]
        values.append(input_.log_ELT[extra].flatten())
        weights_L = torch.tensor(input_.weights).double()
        shares.append((weights_L / tokens).repeat_interleave(tokens))
    value, order = torch.cat(values).sort(descending=True, stable=True)
    total = sum(sum(input_.weights) for input_ in earnings)
    average = low + (upper - low) * torch.cat(shares)[order].cumsum(0) / total
    # Between two values lies every threshold that reads the first and not the second; equal values
    # are read together or not at all.
    ends = torch.cat((value[1:] < value[:-1], torch.tensor([True])))
    middle = (value + torch.cat((value[1:], value[-1:]))) / 2
    average = torch.cat((average.new_tensor([float(low)]), average[ends]))
    middle = torch.cat((value[:1] + 1, middle[ends]))
    nearest = [int((average - wanted).abs().argmin()) for wanted in average_bits]
    return [float(middle[index]) for index in nearest]


def realised_bits(earnings: Sequence[Earnings], log_threshold: float, upper: int) -> float:
    """Average bits per weight and token that a threshold gives."""
    low, extra = _step(upper)
    read = 0.0
    for input_ in earnings:
        share_L = (input_.log_ELT[extra] >= log_threshold).double().mean(1)
        read += float(share_L @ share_L.new_tensor(input_.weights))
    return low + (upper - low) * read / sum(sum(i.weights) for i in earnings)


def grid(upper: int) -> tuple[float, ...]:
    """The average widths of a curve's points, from the width below to this one.

    Towards both ends they lie ever closer: there the threshold runs off to the most and the least
    that any token earns.
    """
    low, _ = _step(upper)
    steps = round((upper - low) / _STEP_BITS)
    points = {low + _STEP_BITS * step for step in range(steps + 1)}
    near = [_STEP_BITS / 2**halving for halving in range(1, _HALVINGS + 1)]
    points |= {low + bits for bits in near} | {upper - bits for bits in near}
    return tuple(sorted(points))


def budget_curve(settled: Mapping[float, Sequence[Earnings]], upper: int) -> Curve:
    """The curve of one step.

    What it earns depends a little on the width the model runs at, so a point between two averages
    is placed between what the earnings at either say.

    Args:
        settled: earnings on calibration tokens by the average width the model ran at.
    """
    points = grid(upper)
    found = {bits: thresholds(earned, points, upper) for bits, earned in settled.items()}
    values: list[float] = []
    for index, bits in enumerate(points):
        low, high = _neighbours(sorted(found), bits)
        share = (bits - low) / (high - low) if high > low else 0.0
        value = found[low][index] * (1 - share) + found[high][index] * share
        values.append(min(value, values[-1]) if values else value)
    return Curve(points, tuple(values))


def _step(upper: int) -> tuple[int, int]:
    """The width below an extra width, and its place among the extra widths."""
    extra = WIDTHS.index(upper) - 1
    return WIDTHS[extra], extra


def _neighbours(known: Sequence[float], bits: float) -> tuple[float, float]:
    """The settled widths around a width; beyond the last one, that one twice."""
    low = max((width for width in known if width <= bits), default=known[0])
    high = min((width for width in known if width >= bits), default=known[-1])
    return low, high
