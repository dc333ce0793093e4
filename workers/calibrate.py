"""Block-wise calibration: make one set of codes good at every width at once.

A block's linears are replaced by trainable ones that quantize their weight to b bits. The block
must reproduce, at each trained width, what the full-precision block outputs:

    loss_b = MSE(block_b(x_b), block(x)) / (running mean of that MSE) ^ balance

where tokens of massive values count less (`observe.py`).

Each step descends on the lowest width and on one of the others, drawn, one after the other, so that
only one graph is alive. Trained are, per linear (`trainable.py`): the weight, the ends of every
group's range, and a gain and a bias per output channel at every trained width.

Training starts from codes that compensate for each other's errors at all trained widths
(`gptq.py`): gradients then have less to find, and what they find for one width harms others less.
Widths are trained in stages (`stages.py`).

Legend: N out_features, K in_features, G groups, B sequences, T tokens, H hidden_size.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.artifacts.spec import Optimisation
from mbq.kernels.quantize import powers_of_two
from mbq.kernels.widths import SLICE_BITS, WIDTHS
from mbq.workers.balance import column_exponents
from mbq.workers.gptq import factor, gram_matrices
from mbq.workers.model import BlockRunner, linears
from mbq.workers.observe import Passed, Target, observe
from mbq.workers.stages import Stage, stages_of
from mbq.workers.trainable import CalibratedLinear, TrainableLinear

# By width, then by the linear's name.
Factors = dict[int, dict[str, Tensor]]

_FINAL_RATE = 0.05
_RUNNING_MEAN_DECAY = 0.9
# A block that outputs zeros is reproduced exactly; nothing is divided by its loss.
_SMALLEST_LOSS = 1e-30
# Of Adam: far below any gradient. Those of a large block are 1e-9 and less, and steps must not
# depend on that.
_EPSILON = 1e-20
# Errors before and after are a report, not a decision: a few sequences are enough.
_SHOWN_SEQUENCES = 16


@dataclass(frozen=True)
class Calibration:
    """A calibrated block and its mean squared output error by width, before and after.

    Attributes:
        outlier_overlap: of the tenth of tokens with the largest error at one width, the share
            that is among those of another.
    """

    linears: dict[str, CalibratedLinear]
    loss_before: dict[int, float]
    loss_after: dict[int, float]
    outlier_overlap: dict[int, dict[int, float]]


def calibrate_block(
    block: BlockRunner,
    inputs: Mapping[int, Tensor],
    target_inputs_BTH: Tensor,
    settings: Optimisation,
    group_size: int,
    readers: Iterable[Sequence[str]],
    seed: int,
    report: Callable[[float], None],
) -> Calibration:
    """Train one block and quantize it.

    Args:
        block: the full-precision one; its linears are replaced in place.
        inputs: hidden states [B, T, H] that enter the block, by width.
        target_inputs_BTH: hidden states of the full-precision model; the block's output on them,
            before any linear is replaced, is the target.
        readers: the linears that read each input.
        seed: of the order of sequences and of the widths drawn.
        report: called with the finished fraction after every step.

    Raises:
        NumericError: a loss, what enters a linear, or what the block outputs is not finite.
    """
    target, passed = observe(block, target_inputs_BTH)
    stages = stages_of(settings)
    exponents = _exponents(block.module, readers)
    factors = _factors(block, inputs, target_inputs_BTH, stages, exponents)
    trainables = _replace_linears(block.module, group_size, passed, exponents)
    before = _token_errors(block, trainables, inputs, target.out_BTH)
    _train(block, trainables, inputs, target, factors, passed, settings, stages, seed, report)
    finished = {name: linear.finish() for name, linear in trainables.items()}
    after = _token_errors(block, trainables, inputs, target.out_BTH)
    return Calibration(
        finished,
        {bits: error.mean().item() for bits, error in before.items()},
        {bits: error.mean().item() for bits, error in after.items()},
        outlier_overlap(after),
    )


def _factors(
    block: BlockRunner,
    inputs: Mapping[int, Tensor],
    target_inputs_BTH: Tensor,
    stages: Sequence[Stage],
    exponents: Mapping[str, Tensor],
) -> Factors:
    """`gptq.factor` of what enters each linear, for the widths that bits are chosen for.

    Widths without inputs of their own get those of full precision; shared inputs are run once.
    """
    chosen = {bits for stage in stages for bits in stage.chosen}
    streams = {bits: inputs.get(bits, target_inputs_BTH) for bits in chosen}
    found = {}
    for x_BTH in {id(x_BTH): x_BTH for x_BTH in streams.values()}.values():
        grams = gram_matrices(block.module, partial(block.forward, x_BTH))
        tokens = x_BTH[..., 0].numel()
        # Linears that share both share one factor.
        keys = {
            name: (id(gram_KK), exponents[name].cpu().numpy().tobytes())
            for name, gram_KK in grams.items()
        }
        distinct = {key: name for name, key in keys.items()}
        factors = {
            key: factor(grams[name], powers_of_two(exponents[name]), tokens)
            for key, name in distinct.items()
        }
        found[id(x_BTH)] = {name: factors[key] for name, key in keys.items()}
    return {bits: found[id(x_BTH)] for bits, x_BTH in streams.items()}


def _train(
    block: BlockRunner,
    trainables: Mapping[str, TrainableLinear],
    inputs: Mapping[int, Tensor],
    target: Target,
    factors: Factors,
    passed: Mapping[str, Passed],
    settings: Optimisation,
    stages: Sequence[Stage],
    seed: int,
    report: Callable[[float], None],
) -> None:
    """Descend on the joint loss, stage by stage. Arguments as `calibrate_block`'s."""
    usual: dict[int, float] = {}
    steps_done = 0
    sequences = len(target.out_BTH)
    batches = math.ceil(sequences / settings.batch_size)
    steps_total = batches * sum(stage.passes for stage in stages)
    for number, stage in enumerate(stages):
        for name, linear in trainables.items():
            if stage.chosen:
                linear.compensate(stage.kept_bits, {b: factors[b][name] for b in stage.chosen})
            if stage.corrected:
                linear.correct(passed[name].input_mean_K, stage.corrected)
        if not stage.passes:
            continue
        generator = torch.Generator().manual_seed(seed + number)
        optimiser = _optimiser(trainables, settings, stage)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _cosine(stage.passes * batches))
        limits = {linear: linear.limits(stage.kept_bits) for linear in trainables.values()}
        for batch in _batches(sequences, settings.batch_size, stage.passes, generator):
            optimiser.zero_grad(set_to_none=True)
            for bits in _draw(stage.trained, generator):
                _set_bits(trainables, bits)
                _descend(block, bits, inputs[bits], target, batch, usual, settings.balance)
            optimiser.step()
            schedule.step()
            _confine(limits)
            steps_done += 1
            report(steps_done / steps_total)


def _descend(
    block: BlockRunner,
    bits: int,
    inputs_BTH: Tensor,
    target: Target,
    batch: Tensor,
    usual: dict[int, float],
    balance: float,
) -> None:
    """Add the gradients of one width's loss on a batch.

    Args:
        usual: running means of the losses by width; that of this one is renewed.

    Raises:
        NumericError: the loss is not finite.
    """
    loss = 0.0
    for part in batch.split(block.microbatch):
        out_BTH = block(inputs_BTH[part])
        error = _error(out_BTH, target.out_BTH[part], target.weight_BT1[part])
        share = len(part) / len(batch)
        loss += error.item() * share
        mean = usual.setdefault(bits, max(error.item(), _SMALLEST_LOSS))
        (error * (share / mean**balance)).backward()
    if not math.isfinite(loss):
        raise NumericError(f"the loss at {bits} bits is {loss}; lower the learning rates")
    mean = _RUNNING_MEAN_DECAY * usual[bits] + (1 - _RUNNING_MEAN_DECAY) * loss
    usual[bits] = max(mean, _SMALLEST_LOSS)


@torch.no_grad()
def _confine(limits: Mapping[TrainableLinear, tuple[Tensor, Tensor]]) -> None:
    """Move every weight back between its limits (`TrainableLinear.limits`)."""
    for linear, (low_NK, high_NK) in limits.items():
        linear.value.copy_(linear.value.maximum(low_NK).minimum(high_NK))


def _replace_linears(
    block: nn.Module,
    group_size: int,
    passed: Mapping[str, Passed],
    exponents: Mapping[str, Tensor],
) -> dict[str, TrainableLinear]:
    trainables = {
        name: TrainableLinear(linear, group_size, passed[name].output_rms, exponents[name])
        for name, linear in linears(block).items()
    }
    for name, trainable in trainables.items():
        block.set_submodule(name, trainable)
    return trainables


def _exponents(block: nn.Module, readers: Iterable[Sequence[str]]) -> dict[str, Tensor]:
    """Exponents of every linear's columns, one tensor for those that read the same input."""
    found: dict[str, Tensor] = {}
    for names in readers:
        weights = [block.get_parameter(f"{name}.weight") for name in names]
        found |= dict.fromkeys(names, column_exponents(weights))
    return found


def _optimiser(
    trainables: Mapping[str, TrainableLinear], settings: Optimisation, stage: Stage
) -> torch.optim.Optimizer:
    modules = list(trainables.values())
    groups: list[dict[str, Any]] = []
    if not stage.kept_bits:
        clips = [p for m in modules for p in (m.low_logit, m.high_logit)]
        groups.append({"params": clips, "lr": settings.clip_rate})
    if settings.method == "joint":
        groups.append({"params": [m.value for m in modules], "lr": settings.weight_rate})
        for bits in stage.trained:
            row = WIDTHS.index(bits)
            rows = [rows[row] for m in modules for rows in (m.gain, m.bias)]
            # In proportion to the bins: Adam's noise would be larger than the error of fine codes.
            groups.append({"params": rows, "lr": settings.gain_rate * 2.0 ** (SLICE_BITS - bits)})
    trained = {id(p) for group in groups for p in group["params"]}
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
    return torch.optim.Adam(groups, betas=(0.9, 0.95), eps=_EPSILON)


def _cosine(steps: int) -> Callable[[int], float]:
    """Learning rate factor: cosine from 1 to `_FINAL_RATE`."""
    return lambda step: (
        _FINAL_RATE + (1 - _FINAL_RATE) * (0.5 + 0.5 * math.cos(math.pi * min(step / steps, 1.0)))
    )


def _batches(count: int, size: int, passes: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(passes):
        yield from torch.randperm(count, generator=generator).split(size)


def _draw(widths: tuple[int, ...], generator: torch.Generator) -> list[int]:
    """The lowest width, which has the most to gain, and one of the others."""
    lowest, *others = widths
    if not others:
        return [lowest]
    return [lowest, others[int(torch.randint(len(others), (1,), generator=generator))]]


def _set_bits(trainables: Mapping[str, TrainableLinear], bits: int) -> None:
    for trainable in trainables.values():
        trainable.bits = bits


def _error(out: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return ((out.float() - target.float()).square() * weight).mean()


def outlier_overlap(errors: Mapping[int, Tensor]) -> dict[int, dict[int, float]]:
    """How far the worst tokens of one width are the worst of another.

    Args:
        errors: error of every token [T], by width.

    Returns, for every two widths, the share of the tenth of tokens with the largest error at
    the first that is among the tenth at the second.
    """
    worst = {
        bits: set(error.topk(max(len(error) // 10, 1)).indices.tolist())
        for bits, error in errors.items()
    }
    return {
        one: {other: len(worst[one] & worst[other]) / len(worst[one]) for other in worst}
        for one in worst
    }


@torch.no_grad()
def _token_errors(
    block: BlockRunner,
    trainables: Mapping[str, TrainableLinear],
    inputs: Mapping[int, Tensor],
    target_BTH: Tensor,
) -> dict[int, Tensor]:
    """Mean squared output error of every token [T] of the first sequences, by width."""
    shown = slice(0, _SHOWN_SEQUENCES)
    errors = {}
    for bits, inputs_BTH in sorted(inputs.items()):
        _set_bits(trainables, bits)
        out = block.forward(inputs_BTH[shown])
        squared = (out.float() - target_BTH[shown].float()).square()
        errors[bits] = squared.mean(2).flatten()
    return errors
