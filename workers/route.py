"""What a token says about its own error: fit the routers of one calibrated block.

Per linear and extra width, the *benefit* of a token is how much of the linear's squared output
error the step to that width removes, each output channel counting as much as the loss is sensitive
to it (`sensitivity.py`). Everything is fitted on calibration tokens: the true benefits of 3 tokens
in 4 train a router (`kernels/router.py`), the rest, which it has not seen, tell what its scores
mean: the mean benefit, per bit, of tokens with such a score, made monotone. Three ways to score a
token are kept for every input, so that they can be compared on the whole model:

    linear   every token alike: only linears differ, nothing is computed at run time
    norm     the logarithm of the token's mean square, nothing is stored
    learned  a trunk of a few rows beside it; the run's method says how it is trained:

        token    regress the logarithm of the benefit
        gates    soft nested gates at prices drawn at random: sigmoids that harden while training
                 and are hard, with straight-through gradients, in its last third
        target   such gates and one average width for each linear, approached from full width: the
                 paper's budget-aware loss (MoBiQuant, arXiv 2602.20191, section 4.2), with the
                 local error in place of the block's

`target` maps its scores to ranks instead of benefits, so that one threshold gives every linear the
same average width, as the paper does.

Legend: T tokens, K in_features, L linears of an input, E extra widths, H rows of
the trunk, F features (H + 2), Q knots, C bins; N out_features, B sequences.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.checkpoint import KNOTS
from mbq.artifacts.spec import Routing
from mbq.kernels.quantize import reconstruct, unpack_pair
from mbq.kernels.router import features, pack_halves, score, unpack_halves
from mbq.kernels.widths import SLICE_BITS, WIDTHS, steps_up_to, widths_up_to
from mbq.workers.model import BlockRunner, hooked
from mbq.workers.trainable import CalibratedLinear

# One token in four is kept for the maps.
_HELD_OUT = 4
_BATCH_TOKENS = 1024
# How steep the gates' sigmoids are at first and at last.
_FIRST_STEEPNESS, _LAST_STEEPNESS = 2.0, 50.0
# Weight of the paper's budget term against the relative error.
_BUDGET_WEIGHT = 1.0
# Slope added to every map: a flat piece would take or lose a step for all its tokens at once, and
# no threshold could give an average in between.
_TILT = 0.02
# Benefits below this share of the mean count as this much: a step may even hurt a token.
_SMALLEST_BENEFIT = 1e-6


@dataclass(frozen=True)
class Trunk:
    """Learned part of a router: float32 `trunk` [H, K], `offset` [H] and `head` [E, L, F]."""

    trunk_HK: Tensor
    offset_H: Tensor
    head_ELF: Tensor


@dataclass(frozen=True)
class FittedInput:
    """Everything fitted for one input.

    Attributes:
        learned: the trained router.
        knots: per method, scores and log benefits per bit, float32 [E, L, 2, Q].
    """

    learned: Trunk
    knots: dict[str, Tensor]


def norm_head(extra: int, linears: int) -> Tensor:
    """Head [E, L, 2] of the router that sees the norm only."""
    return torch.tensor([1.0, 0.0]).expand(extra, linears, 2)


def fit_routers(
    block: BlockRunner,
    inputs: Mapping[str, Sequence[str]],
    calibrated: Mapping[str, CalibratedLinear],
    importance: Mapping[str, Tensor],
    hidden_BTH: Tensor,
    settings: Routing,
    max_bits: int,
    seed: int,
) -> dict[str, FittedInput]:
    """Fit every input of a block.

    Args:
        block: the full-precision one.
        inputs: the linears that read each input, by the input's name.
        calibrated: the block's linears as they were quantized.
        importance: of their output channels (`sensitivity.importance`).
        hidden_BTH: hidden states of the full-precision model that enter the block, of the first
            sequences that hold enough tokens.
        seed: of everything drawn.
    """
    leaders = {name: linears[0] for name, linears in inputs.items()}
    x = _collect(block, leaders, hidden_BTH, settings.tokens)
    fitted = {}
    for number, (name, linears) in enumerate(inputs.items()):
        benefit_ELT = torch.stack(
            [
                _benefits(
                    block.module.get_submodule(n), calibrated[n], importance[n], x[name], max_bits
                )
                for n in linears
            ],
            1,
        )
        generator = torch.Generator().manual_seed(seed + number)
        fitted[name] = fit_input(x.pop(name), benefit_ELT, settings, generator)
    return fitted


def fit_input(
    x_TK: Tensor, benefit_ELT: Tensor, settings: Routing, generator: torch.Generator
) -> FittedInput:
    """Fit one input from tokens and their true benefits."""
    x_TK, benefit_ELT = x_TK.float(), benefit_ELT.float()
    order = torch.randperm(len(x_TK), generator=generator)
    held = order[: max(len(order) // _HELD_OUT, 1)].to(x_TK.device)
    rest = order[len(held) :].to(x_TK.device) if len(order) > 1 else held
    learned = _train(x_TK[rest], benefit_ELT[..., rest], settings, generator)
    score_ELT = score(x_TK[held], learned.trunk_HK, learned.offset_H, learned.head_ELF)
    held_ELT = benefit_ELT[..., held] / _steps(benefit_ELT)
    norm_ELT = features(x_TK[held], learned.trunk_HK, learned.offset_H)[:, -2].expand_as(held_ELT)
    method = settings.learned
    by_rank = method == "target"
    knots = {
        "linear": fit_knots(torch.zeros_like(held_ELT), held_ELT, 1),
        "norm": fit_knots(norm_ELT, held_ELT, KNOTS),
        method: rank_knots(score_ELT, KNOTS) if by_rank else fit_knots(score_ELT, held_ELT, KNOTS),
    }
    placed = Trunk(learned.trunk_HK.cpu(), learned.offset_H.cpu(), learned.head_ELF.cpu())
    return FittedInput(placed, {name: value.cpu() for name, value in knots.items()})


def fit_knots(score_ELT: Tensor, benefit_ELT: Tensor, bins: int) -> Tensor:
    """A monotone map from score to log of the mean benefit per bit: [E, L, 2, C].

    Tokens are cut into bins of equal counts by score; a knot is a bin's mean score and mean
    benefit, the latter pooled with its neighbours where it would fall (isotonic regression), then
    tilted a little so that it rises everywhere. With fewer tokens than bins the last knot is
    repeated.
    """
    filled = min(bins, score_ELT.shape[2])
    order = score_ELT.argsort(dim=2, stable=True)
    cuts = [part.shape[0] for part in torch.arange(order.shape[2]).tensor_split(filled)]
    means = [
        torch.stack([part.mean(2) for part in values.gather(2, order).split(cuts, dim=2)], 2)
        for values in (score_ELT, benefit_ELT)
    ]
    smallest = _SMALLEST_BENEFIT * benefit_ELT.mean(2, keepdim=True).clamp(min=1e-30)
    rising = torch.tensor(
        [[isotonic(row) for row in rows] for rows in means[1].tolist()], device=score_ELT.device
    )
    tilt = _TILT * (means[0] - means[0].mean(2, keepdim=True))
    knots = torch.stack((means[0], rising.clamp(min=smallest).log() + tilt), 2)
    return torch.cat((knots, knots[..., -1:].expand(-1, -1, -1, bins - filled)), 3)


def rank_knots(score_ELT: Tensor, bins: int) -> Tensor:
    """Scores and minus the share of the linear's tokens that score as much: [E, L, 2, C].

    So one threshold gives all linears the same average bits.
    """
    share_C = torch.linspace(0, 1, bins, device=score_ELT.device)
    threshold_ELC = torch.quantile(score_ELT, share_C, dim=2).permute(1, 2, 0).contiguous()
    taken_ELCT = score_ELT[..., None, :] >= threshold_ELC[..., None]
    return torch.stack((threshold_ELC, -taken_ELCT.float().mean(3)), 2)


def isotonic(values: Sequence[float]) -> list[float]:
    """The closest sequence (least squares) that never falls, by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (high, many), (low, few) = pools[-2:]
            pools[-2:] = [((high * many + low * few) / (many + few), many + few)]
    return [value for value, count in pools for _ in range(count)]


def _collect(
    block: BlockRunner, leaders: Mapping[str, str], hidden_BTH: Tensor, tokens: int
) -> dict[str, Tensor]:
    """The first tokens [T, K] that enter each input."""
    found: dict[str, list[Tensor]] = {name: [] for name in leaders}

    def note(name: str, leader: nn.Module, arguments: tuple[Tensor]) -> None:
        found[name].append(arguments[0].flatten(0, 1))

    hooks = (
        block.module.get_submodule(leader).register_forward_pre_hook(partial(note, name))
        for name, leader in leaders.items()
    )
    with hooked(hooks):
        block.forward(hidden_BTH)
    return {name: torch.cat(parts)[:tokens] for name, parts in found.items()}


def first_sequences(hidden_BTH: Tensor, tokens: int) -> Tensor:
    """As many as hold so many tokens, or all."""
    return hidden_BTH[: math.ceil(tokens / hidden_BTH.shape[1])]


@torch.no_grad()
def _benefits(
    linear: nn.Module,
    calibrated: CalibratedLinear,
    importance_N: Tensor,
    x_TK: Tensor,
    max_bits: int,
) -> Tensor:
    """Squared output error that the step to each extra width removes, per token: [E, T]."""
    source_NK = linear.weight
    assert isinstance(source_NK, Tensor)
    code_NK = calibrated.code_NK.to(x_TK.device)
    exponent_K = calibrated.exponent_K.to(x_TK.device)
    scale_zero_NG = calibrated.scale_zero_NG.to(x_TK.device)
    gain_bias_WN = calibrated.gain_bias_WN.to(x_TK.device)
    _, bias_WN = unpack_pair(gain_bias_WN)
    errors = []
    for row, bits in enumerate(widths_up_to(max_bits)):
        weight_NK = reconstruct(code_NK, exponent_K, scale_zero_NG, gain_bias_WN[row], bits)
        off_NK = (weight_NK - source_NK.float()).to(x_TK.dtype)
        off_TN = F.linear(x_TK, off_NK, bias_WN[row].to(x_TK.dtype))
        errors.append(off_TN.float().square() @ importance_N)
    return -torch.stack(errors).diff(dim=0)


def _train(
    x_TK: Tensor, benefit_ELT: Tensor, settings: Routing, generator: torch.Generator
) -> Trunk:
    """Train the router of one input on benefits relative to their mean over tokens."""
    method = settings.learned
    usual_EL1 = benefit_ELT.mean(2, keepdim=True).clamp(min=1e-30)
    # The paper's loss is one error, not one per step: the first step matters most.
    relative_ELT = benefit_ELT / (usual_EL1[:1] if method == "target" else usual_EL1)
    log_ELT = relative_ELT.clamp(min=_SMALLEST_BENEFIT).log()
    learned = _start(x_TK, log_ELT, settings.width, generator)
    parameters = [learned.trunk_HK, learned.offset_H, learned.head_ELF]
    optimiser = torch.optim.Adam([p.requires_grad_() for p in parameters], lr=settings.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    for step in range(settings.steps):
        drawn = torch.randint(len(x_TK), (_BATCH_TOKENS,), generator=generator).to(x_TK.device)
        score_ELT = score(x_TK[drawn], learned.trunk_HK, learned.offset_H, learned.head_ELF)
        if method == "token":
            loss = (score_ELT - log_ELT[..., drawn]).square().mean()
        else:
            share = torch.rand(1, generator=generator).item()
            done = step / settings.steps
            target = settings.target_bits if method == "target" else None
            loss = _gate_loss(score_ELT, relative_ELT[..., drawn], done, share, target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    # As it will be stored, so that the maps are fitted to the scores there will be.
    stored_HK = unpack_halves(pack_halves(learned.trunk_HK.detach()))
    return Trunk(stored_HK, learned.offset_H.detach(), learned.head_ELF.detach())


def _start(x_TK: Tensor, log_ELT: Tensor, width: int, generator: torch.Generator) -> Trunk:
    """A router that begins as the norm: the benefit of a fixed direction grows with its square."""
    extra, linears = log_ELT.shape[:2]
    trunk_HK = torch.randn(width, x_TK.shape[1], generator=generator) / math.sqrt(x_TK.shape[1])
    head_ELF = torch.randn(extra, linears, width + 2, generator=generator) * 0.1
    trunk_HK, head_ELF = trunk_HK.to(x_TK.device), head_ELF.to(x_TK.device)
    offset_H = torch.zeros(width, device=x_TK.device)
    head_ELF[..., -2:] = torch.tensor([1.0, 0.0])
    score_ELT = score(x_TK, trunk_HK, offset_H, head_ELF)
    head_ELF[..., -1] = (log_ELT - score_ELT).mean(2)
    return Trunk(trunk_HK, offset_H, head_ELF)


def _steps(value_ELT: Tensor) -> Tensor:
    """Bits of the step to each extra width: [E, 1, 1]."""
    steps = steps_up_to(WIDTHS[len(value_ELT)])
    return torch.tensor(steps, device=value_ELT.device)[:, None, None]


def _gate_loss(
    score_ELT: Tensor, relative_ELT: Tensor, done: float, share: float, target: float | None
) -> Tensor:
    """Relative error that soft nested gates leave, plus what the bits they spend cost.

    Args:
        done: finished fraction of the training.
        share: where among the batch's scores this step's threshold lies, 0..1.
        target: average bits of each linear; None draws a price instead.
    """
    steepness = _FIRST_STEEPNESS * (_LAST_STEEPNESS / _FIRST_STEEPNESS) ** done
    if target is None:
        threshold = torch.quantile(score_ELT.detach(), share, dim=2, keepdim=True)
    else:
        threshold = torch.zeros_like(score_ELT[..., :1])
    soft_ELT = (steepness * (score_ELT - threshold)).sigmoid()
    if done > 2 / 3:
        soft_ELT = soft_ELT + ((score_ELT > threshold).float() - soft_ELT).detach()
    gates = [soft_ELT[0]]
    for soft_LT in soft_ELT[1:]:
        # Not cumprod: its gradient is not deterministic on a GPU, and refused there.
        gates.append(gates[-1] * soft_LT)
    gate_ELT = torch.stack(gates)
    left = ((1 - gate_ELT) * relative_ELT).mean(2)
    if target is None:
        # At this price a step pays for itself exactly where its score is the threshold.
        price: Tensor = (left + (gate_ELT * threshold.exp()).mean(2)).sum()
        return price
    steps_E11 = _steps(gate_ELT)
    bits_L = SLICE_BITS + (steps_E11[..., 0] * gate_ELT.mean(2)).sum(0)
    full = SLICE_BITS + float(steps_E11.sum())
    wanted = target + (full - target) * max(0.0, 1 - 1.5 * done)
    loss: Tensor = left.sum() + _BUDGET_WEIGHT * (bits_L - wanted).square().sum()
    return loss
