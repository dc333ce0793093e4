"""Codes by error compensation: what rounding one input loses, the inputs after it make up for.

GPTQ (arXiv 2210.17323, algorithm 1) for nested bits. A linear's error on its inputs is
`|x (w - w_b)|^2 = (w - w_b) H (w - w_b)` with the Gram matrix H = x^T x. Inputs are rounded one
after the other; with L, the upper Cholesky factor of H's inverse, the best use of the inputs j' > j
that are not rounded yet is

    w[j'] -= (w[j] - w_b[j]) / L[j, j] * L[j, j']

One code must serve several widths, whose errors differ. So each width b has a weight of its own
that is compensated for the errors of its own reconstruction, and of all codes the one is taken
whose positions are nearest to all of them: squared distances are added with weight 2^(b-2), half
way (in logarithms) between absolute errors and errors relative to the bin at that width.
Widths beyond those need the source weight itself, so the distance from it to the code's bin counts,
too.

Legend: N out_features, K in_features, G groups, g inputs per group, C candidate codes.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.kernels.widths import CODE_BITS
from mbq.workers.model import hooked, linears, remedy_for_infinities

# Least that is added to the Gram matrix, as a share of its mean diagonal (GPTQ's default).
_DAMPING = 0.01
# How far inside its bin a weight lies at least, in bins: so that `quantize` finds that bin.
MARGIN = 0.02
# How much more the squared error of one more bit counts (benchmarks/README.md).
_FINER = 2.0
# How much the squared distance from the source weight to its code's bin counts (same place).
_STAY = 4.0


def gram_matrices(block: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Sum over tokens of x^T x for what enters each linear: float32 [K, K] by name.

    Linears that are given the same tensor share one sum.

    Args:
        run: passes the tokens through the block.

    Raises:
        NumericError: what enters a linear is not finite.
    """
    found: dict[str, Tensor] = {}
    # What entered the linear before, and its name.
    latest: tuple[Tensor, str] | None = None

    def add(name: str, linear: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal latest
        if latest is not None and latest[0] is arguments[0]:
            found[name] = found[latest[1]]
            return
        latest = arguments[0], name
        x_TK = arguments[0].flatten(0, -2).float()
        gram_KK = x_TK.T @ x_TK
        found[name] = found[name].add_(gram_KK) if name in found else gram_KK

    hooks = (m.register_forward_pre_hook(partial(add, n)) for n, m in linears(block).items())
    with hooked(hooks), torch.no_grad():
        run()
    for name, gram_KK in found.items():
        if not gram_KK.isfinite().all():
            raise NumericError(f"what enters {name} is not finite; {remedy_for_infinities(block)}")
    return found


def factor(gram_KK: Tensor, power_K: Tensor, tokens: int) -> Tensor:
    """Upper Cholesky factor of the damped Gram matrix's inverse: float32 [K, K].

    Damping grows with K / tokens: correlations that few tokens show are partly chance.

    Args:
        power_K: what each input is multiplied by, as the weight is quantized for that.
    """
    damped = gram_KK.double().mul_(power_K).mul_(power_K[:, None])
    mean = damped.diagonal().mean()
    # Inputs that are always zero, and those of a linear that no token reached, compensate nothing.
    share = _DAMPING + len(damped) / tokens
    damped.diagonal().add_(torch.where(mean > 0, share * mean, 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper_KK: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper_KK.float()


def round_compensated(
    weight_NK: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor,
    factors: Mapping[int, Tensor],
    kept_NK: Tensor | None = None,
    kept_bits: int = 0,
) -> Tensor:
    """Choose bits so that every width of `factors` reproduces the linear's outputs.

    Args:
        factors: `factor` of the inputs [K, K] by width; bits are chosen for the highest.
        kept_NK: codes uint8 [N, K] whose first `kept_bits` bits are not to be changed.

    Returns the compensated weight, float32 [N, K], moved into the bin that was chosen for it at the
    highest width: `quantize` finds its code.
    """
    highest = max(factors)
    below = highest - kept_bits
    candidates = torch.arange(1 << below, device=weight_NK.device)
    size = weight_NK.shape[1] // scale_NG.shape[1]
    targets = {bits: weight_NK.float().clone() for bits in factors}
    rounded_NK = torch.empty_like(weight_NK, dtype=torch.float32)
    for group, start in enumerate(range(0, weight_NK.shape[1], size)):
        scale_N1, zero_N1 = scale_NG[:, group, None], zero_NG[:, group, None]
        stop = start + size
        errors = {bits: weight_NK.new_empty(len(weight_NK), size).float() for bits in factors}
        for j in range(start, stop):
            codes_NC = candidates[None]
            if kept_NK is not None:
                first_N1 = kept_NK[:, j, None].long() >> (CODE_BITS - kept_bits)
                codes_NC = codes_NC + (first_N1 << below)
            exact = {b: target[:, j, None] / scale_N1 + zero_N1 for b, target in targets.items()}
            costs = [
                (exact_N1 - _positions(codes_NC, highest, bits)).square() * _FINER ** (bits - 2)
                for bits, exact_N1 in exact.items()
            ]
            source_N1 = weight_NK[:, j, None].float() / scale_N1 + zero_N1
            away_NC = source_N1 - _inside(source_N1, codes_NC, highest, 0.0)
            cost_NC = torch.stack([*costs, _STAY * away_NC.square()]).sum(0)
            chosen_N1 = cost_NC.argmin(1, keepdim=True)
            bin_N1 = codes_NC.expand_as(cost_NC).gather(1, chosen_N1)
            rounded_NK[:, j] = _inside(exact[highest], bin_N1, highest, MARGIN)[:, 0]
            for bits, target in targets.items():
                error_N1 = (exact[bits] - _positions(bin_N1, highest, bits)) / factors[bits][j, j]
                error_N1 *= scale_N1
                target[:, j + 1 : stop] -= error_N1 * factors[bits][j, j + 1 : stop]
                errors[bits][:, j - start] = error_N1[:, 0]
        # Later groups hear of a whole group's errors at once: one product instead of many.
        for bits, target in targets.items():
            target[:, stop:] -= errors[bits] @ factors[bits][start:stop, stop:]
        part = rounded_NK[:, start:stop]
        part.sub_(zero_N1).mul_(scale_N1)
    return rounded_NK


def _positions(code: Tensor, highest: int, bits: int) -> Tensor:
    """Where the first `bits` bits put a code of `highest` bits, in 2-bit bins."""
    return ((code >> (highest - bits)) + 0.5) * 2.0 ** (2 - bits)


def _inside(exact: Tensor, code: Tensor, bits: int, margin: float) -> Tensor:
    """The position nearest to `exact` that is inside a code's bin by a margin, in bins."""
    low, high = bin_ends(code, bits, margin)
    return exact.maximum(low).minimum(high)


def bin_ends(code: Tensor, bits: int, margin: float) -> tuple[Tensor, Tensor]:
    """Where the bins of codes of some bits begin and end, less a margin, in 2-bit bins."""
    return (code + margin) * 2.0 ** (2 - bits), (code + 1 - margin) * 2.0 ** (2 - bits)
