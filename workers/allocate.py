"""From what bits are expected to earn to thresholds: one for every average width.

The step of a linear from one width to the next costs its bits for every weight and token. What it
earns a token is the benefit its router expects (`route.py`) times the sensitivity of the loss to
it (`sensitivity.py`; a benefit weighs output channels by 1 on average), per bit:

    earnings = benefit * sensitivity / 2  /  (step bits * out_features * in_features)

in nats per bit. Taking every step that earns at least a threshold, and nothing else, is the best
use of the bits it costs; so a whole model needs one number for each average width, and a curve of
them for every ceiling, since a checkpoint cut to 4 bits cannot spend more on any token. Everything
here is pure.

Legend: T tokens (or 1 where all are alike), L linears, E extra widths.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mbq.kernels.precision import Curve
from mbq.kernels.widths import SLICE_BITS, steps_up_to

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
    earnings: Sequence[Earnings], average_bits: Sequence[float], ceiling_bits: int
) -> list[float]:
    """The log threshold at which these tokens get each average width, as nearly as they can."""
    steps = torch.tensor(steps_up_to(ceiling_bits)).double()
    values, costs = [], []
    for input_ in earnings:
        # Nested: a step is taken only where all steps before it earn enough, too.
        nested_ELT = input_.log_ELT[: len(steps)].cummin(0).values
        tokens = nested_ELT.shape[2]
        for linear, weights in enumerate(input_.weights):
            values.append(nested_ELT[:, linear].flatten())
            costs.append((steps * weights / tokens).repeat_interleave(tokens))
    value, order = torch.cat(values).sort(descending=True, stable=True)
    total = sum(sum(input_.weights) for input_ in earnings)
    average = SLICE_BITS + torch.cat(costs)[order].cumsum(0) / total
    # Between two values lies every threshold that reads the first and not the second; equal values
    # are read together or not at all.
    ends = torch.cat((value[1:] < value[:-1], torch.tensor([True])))
    middle = (value + torch.cat((value[1:], value[-1:]))) / 2
    average = torch.cat((average.new_tensor([float(SLICE_BITS)]), average[ends]))
    middle = torch.cat((value[:1] + 1, middle[ends]))
    nearest = [int((average - wanted).abs().argmin()) for wanted in average_bits]
    return [float(middle[index]) for index in nearest]


def realised_bits(earnings: Sequence[Earnings], log_threshold: float, ceiling_bits: int) -> float:
    """Average bits per weight and token that a threshold gives."""
    steps = torch.tensor(steps_up_to(ceiling_bits)).double()
    read = 0.0
    for input_ in earnings:
        gates_ELT = (input_.log_ELT[: len(steps)] >= log_threshold).double().cumprod(0)
        bits_L = steps @ gates_ELT.mean(2)
        read += float((bits_L * bits_L.new_tensor(input_.weights)).sum())
    return SLICE_BITS + read / sum(sum(i.weights) for i in earnings)


def grid(ceiling_bits: int) -> tuple[float, ...]:
    """The average widths of a curve's points, from 2 bits to the ceiling.

    Towards both ends they lie ever closer: there the threshold runs off to the most and the least
    that any token earns.
    """
    steps = round((ceiling_bits - SLICE_BITS) / _STEP_BITS)
    points = {SLICE_BITS + _STEP_BITS * step for step in range(steps + 1)}
    near = [_STEP_BITS / 2**halving for halving in range(1, _HALVINGS + 1)]
    points |= {SLICE_BITS + bits for bits in near} | {ceiling_bits - bits for bits in near}
    return tuple(sorted(points))


def budget_curve(settled: Mapping[float, Sequence[Earnings]], ceiling_bits: int) -> Curve:
    """The curve of one ceiling.

    What steps earn depends a little on the width the model runs at, so a point between two widths
    is placed between what the earnings at either say.

    Args:
        settled: earnings on calibration tokens by the average width the model ran at.
    """
    points = grid(ceiling_bits)
    found = {bits: thresholds(earned, points, ceiling_bits) for bits, earned in settled.items()}
    values: list[float] = []
    for index, bits in enumerate(points):
        low, high = _neighbours(sorted(found), bits)
        share = (bits - low) / (high - low) if high > low else 0.0
        value = found[low][index] * (1 - share) + found[high][index] * share
        values.append(min(value, values[-1]) if values else value)
    return Curve(points, tuple(values))


def _neighbours(known: Sequence[float], bits: float) -> tuple[float, float]:
    """The settled widths around a width; beyond the last one, that one twice."""
    low = max((width for width in known if width <= bits), default=known[0])
    high = min((width for width in known if width >= bits), default=known[-1])
    return low, high
