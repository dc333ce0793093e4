"""Block-wise calibration: make one set of codes good at every slice count at once.

A block's linears are replaced by trainable ones that quantize their weight as k slices would. The
block must reproduce, at each trained slice count, what the full-precision block outputs:

    loss_k = MSE(block_k(x_k), block(x)) / (running mean of that MSE) ^ balance

Each step draws two of the trained slice counts and descends on both, one after the other, so that
only one graph is alive. Trained are, per linear (`trainable.py`): the weight, the ends of every
group's range, and a gain and a bias per output channel at every trained slice count but the
highest.

Training starts from digits that compensate for each other's errors at all trained slice counts
(`gptq.py`): gradients then have less to find, and what they find for one width harms others less.
Low widths weigh more in that loss than high ones, because high ones can be mended afterwards at no
cost to them: every further trained width is refined alone, with the digits of the width before it
and all ranges kept, so that only its own digits and its gain and bias move.

What training changes for the sake of low widths it also changes, without need, in the digits that
only high widths show. So in the end the digits of the trained low widths are kept, and those below
them are chosen anew, compensating for what the kept ones cost.

Method `joint` is that. Method `clip` is MoBiQuant's recipe (arXiv 2602.20191, algorithm 1): weights
frozen, no gains, ranges trained first for one slice alone, then for all slice counts together.

Legend: N out_features, K in_features, G groups, S slices, B sequences, T tokens, H hidden_size.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mbq.artifacts.spec import Optimisation
from mbq.kernels.quantize import MAX_SLICES
from mbq.workers.gptq import gram_matrices
from mbq.workers.model import linears
from mbq.workers.trainable import CalibratedLinear, TrainableLinear

Run = Callable[[nn.Module, Tensor], Tensor]

_FINAL_RATE = 0.05
_RUNNING_MEAN_DECAY = 0.9
# A block that outputs zeros is reproduced exactly; nothing is divided by its loss.
_SMALLEST_LOSS = 1e-30
# Errors before and after are a report, not a decision: a few sequences are enough.
_SHOWN_SEQUENCES = 16


@dataclass(frozen=True)
class _Stage:
    """A part of training: the slice counts drawn, for how many passes.

    Attributes:
        kept_slices: digits that do not change any more, and with them the ranges; 0 for none.
    """

    slice_counts: tuple[int, ...]
    passes: int
    kept_slices: int = 0


@dataclass(frozen=True)
class Calibration:
    """A calibrated block and its mean squared output error by slice count, before and after.

    Attributes:
        outlier_overlap: of the tenth of tokens with the largest error at one slice count, the share
            that is among those of another.
    """

    linears: dict[str, CalibratedLinear]
    loss_before: dict[int, float]
    loss_after: dict[int, float]
    outlier_overlap: dict[int, dict[int, float]]


def calibrate_block(
    block: nn.Module,
    run: Run,
    inputs: Mapping[int, Tensor],
    target_inputs_BTH: Tensor,
    settings: Optimisation,
    group_size: int,
    microbatch: int,
    seed: int,
    report: Callable[[float], None],
) -> Calibration:
    """Train one block and quantize it.

    Args:
        block: the full-precision block; its linears are replaced in place.
        run: forward pass of the block.
        inputs: hidden states [B, T, H] that enter the block, by slice count.
        target_inputs_BTH: hidden states of the full-precision model; the block's output on them,
            before any linear is replaced, is the target.
        microbatch: sequences per forward pass.
        seed: of the order of sequences and of the slice counts drawn.
        report: called with the finished fraction after every step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    target_BTH = _forward(block, run, target_inputs_BTH, microbatch)
    tokens = target_BTH[..., 0].numel()
    kept_slices = max((k for k in settings.slice_counts if k < MAX_SLICES), default=MAX_SLICES)
    grams: dict[int, dict[str, Tensor]] = {}
    if settings.method == "joint":
        chosen = {k: inputs[k] for k in settings.slice_counts if k <= kept_slices}
        grams = _gram_matrices(block, run, {MAX_SLICES: target_inputs_BTH} | chosen, microbatch)
    trainables = _replace_linears(block, group_size)
    before = _token_errors(block, trainables, run, inputs, target_BTH, microbatch)
    for name, linear in trainables.items():
        first = {k: found[name] for k, found in grams.items() if k <= kept_slices}
        if first:
            linear.compensate(first, tokens)
    _train(block, trainables, run, inputs, target_BTH, settings, microbatch, seed, report)
    low = grams.get(MAX_SLICES, {}) if kept_slices < MAX_SLICES else {}
    finished = {
        name: linear.finish(kept_slices, low.get(name), tokens)
        for name, linear in trainables.items()
    }
    after = _token_errors(block, trainables, run, inputs, target_BTH, microbatch)
    return Calibration(
        finished,
        {slices: error.mean().item() for slices, error in before.items()},
        {slices: error.mean().item() for slices, error in after.items()},
        outlier_overlap(after),
    )


def _gram_matrices(
    block: nn.Module, run: Run, inputs: Mapping[int, Tensor], microbatch: int
) -> dict[int, dict[str, Tensor]]:
    """Of what enters each linear, by slice count; inputs that several share are run once."""
    streams = {id(x_BTH): x_BTH for x_BTH in inputs.values()}
    found = {
        key: gram_matrices(block, partial(_forward, block, run, x_BTH, microbatch))
        for key, x_BTH in streams.items()
    }
    return {slices: found[id(x_BTH)] for slices, x_BTH in inputs.items()}


def _train(
    block: nn.Module,
    trainables: Mapping[str, TrainableLinear],
    run: Run,
    inputs: Mapping[int, Tensor],
    target_BTH: Tensor,
    settings: Optimisation,
    microbatch: int,
    seed: int,
    report: Callable[[float], None],
) -> None:
    """Descend on the joint loss, stage by stage. Arguments as `calibrate_block`'s."""
    running: dict[int, float] = {}
    stages = _stages(settings)
    steps_done = 0
    batches = math.ceil(len(target_BTH) / settings.batch_size)
    steps_total = batches * sum(stage.passes for stage in stages)
    for number, stage in enumerate(stages):
        generator = torch.Generator().manual_seed(seed + number)
        optimiser = _optimiser(trainables, settings, stage)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(stage.passes * batches))
        bins = {m: m.bins(stage.kept_slices) for m in trainables.values() if stage.kept_slices}
        for batch in _batches(len(target_BTH), settings.batch_size, stage.passes, generator):
            optimiser.zero_grad(set_to_none=True)
            for slices in _draw(stage.slice_counts, generator):
                _set_slices(trainables, slices)
                loss = 0.0
                for part in batch.split(microbatch):
                    error = _error(run(block, inputs[slices][part]), target_BTH[part])
                    share = len(part) / len(batch)
                    loss += error.item() * share
                    usual = running.setdefault(slices, max(error.item(), _SMALLEST_LOSS))
                    (error * (share / usual**settings.balance)).backward()
                if not math.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss at {slices} slices is {loss}; lower the learning rates"
                    )
                usual = _RUNNING_MEAN_DECAY * usual + (1 - _RUNNING_MEAN_DECAY) * loss
                running[slices] = max(usual, _SMALLEST_LOSS)
            optimiser.step()
            schedule.step()
            _keep(bins)
            steps_done += 1
            report(steps_done / steps_total)


@torch.no_grad()
def _keep(bins: Mapping[TrainableLinear, tuple[Tensor, Tensor]]) -> None:
    """Move every weight back between the values at which its first digits are the kept ones."""
    for linear, (low_NK, high_NK) in bins.items():
        linear.value.copy_(linear.value.maximum(low_NK).minimum(high_NK))


def _replace_linears(block: nn.Module, group_size: int) -> dict[str, TrainableLinear]:
    trainables = {name: TrainableLinear(m, group_size) for name, m in linears(block).items()}
    for name, trainable in trainables.items():
        block.set_submodule(name, trainable)
    return trainables


def _stages(settings: Optimisation) -> list[_Stage]:
    counts = settings.slice_counts
    if settings.method == "clip":
        first = settings.passes // 2
        return [_Stage((1,), first), _Stage(counts, settings.passes - first)]
    # All slices need no refining: their digits are chosen anew in the end.
    low = sorted(k for k in counts if k < MAX_SLICES)
    refined = [_Stage((k,), settings.passes, kept) for kept, k in pairwise(low)]
    return [_Stage(counts, settings.passes), *refined]


def _optimiser(
    trainables: Mapping[str, TrainableLinear], settings: Optimisation, stage: _Stage
) -> torch.optim.Optimizer:
    modules = list(trainables.values())
    groups: list[dict[str, Any]] = []
    if not stage.kept_slices:
        clips = [p for m in modules for p in (m.low_logit, m.high_logit)]
        groups.append({"params": clips, "lr": settings.clip_rate})
    if settings.method == "joint":
        groups.append({"params": [m.value for m in modules], "lr": settings.weight_rate})
        # The highest width has nothing left to correct: Adam's noise in a row of gains would be
        # larger than the error of the codes.
        corrected = sorted(stage.slice_counts)[:-1]
        rows = [row[k - 1] for m in modules for row in (m.gain, m.bias) for k in corrected]
        groups.append({"params": rows, "lr": settings.gain_rate})
    trained = {id(p) for group in groups for p in group["params"]}
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def _cosine(steps: int) -> Callable[[int], float]:
    """Learning rate factor: cosine from 1 to `_FINAL_RATE`."""
    return lambda step: (
        _FINAL_RATE + (1 - _FINAL_RATE) * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))
    )


def _batches(count: int, size: int, passes: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(passes):
        yield from torch.randperm(count, generator=generator).split(size)


def _draw(slice_counts: tuple[int, ...], generator: torch.Generator) -> list[int]:
    order = torch.randperm(len(slice_counts), generator=generator)[:2]
    return [slice_counts[i] for i in order.tolist()]


def _set_slices(trainables: Mapping[str, TrainableLinear], slices: int) -> None:
    for trainable in trainables.values():
        trainable.slices = slices


def _error(out: Tensor, target: Tensor) -> Tensor:
    return (out.float() - target.float()).square().mean()


@torch.no_grad()
def _forward(block: nn.Module, run: Run, inputs_BTH: Tensor, microbatch: int) -> Tensor:
    return torch.cat([run(block, part) for part in inputs_BTH.split(microbatch)])


def outlier_overlap(errors: Mapping[int, Tensor]) -> dict[int, dict[int, float]]:
    """How far the worst tokens of one slice count are the worst of another.

    Args:
        errors: error of every token [T], by slice count.

    Returns, for every two slice counts, the share of the tenth of tokens with the largest error at
    the first that is among the tenth at the second.
    """
    worst = {
        slices: set(error.topk(max(len(error) // 10, 1)).indices.tolist())
        for slices, error in errors.items()
    }
    return {
        one: {other: len(worst[one] & worst[other]) / len(worst[one]) for other in worst}
        for one in worst
    }


@torch.no_grad()
def _token_errors(
    block: nn.Module,
    trainables: Mapping[str, TrainableLinear],
    run: Run,
    inputs: Mapping[int, Tensor],
    target_BTH: Tensor,
    microbatch: int,
) -> dict[int, Tensor]:
    """Mean squared output error of every token [T] of the first sequences, by slice count."""
    shown = slice(0, _SHOWN_SEQUENCES)
    errors = {}
    for slices, inputs_BTH in sorted(inputs.items()):
        _set_slices(trainables, slices)
        out = _forward(block, run, inputs_BTH[shown], microbatch)
        squared = (out.float() - target_BTH[shown].float()).square()
        errors[slices] = squared.mean(2).flatten()
    return errors
