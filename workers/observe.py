"""What a full-precision block outputs, and what passes its linears: what training needs to know.

A token counts as one of ten times the usual energy at most: large models give the first token, and
few others, values of thousands (massive activations, arXiv 2402.17762), and their errors would be
all that is trained.

Legend: B sequences, T tokens, H hidden_size, K in_features.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.workers.model import BlockRunner, hooked, linears, remedy_for_infinities

# Energy of a token, in medians, above which its errors count less.
_MOST_ENERGY = 10.0


@dataclass(frozen=True)
class Target:
    """What a block is to output, and how much the error of each token counts (`token_weights`)."""

    out_BTH: Tensor
    weight_BT1: Tensor


@dataclass(frozen=True)
class Passed:
    """Mean of what enters a linear, and root mean square of what it outputs."""

    input_mean_K: Tensor
    output_rms: float


def observe(block: BlockRunner, inputs_BTH: Tensor) -> tuple[Target, dict[str, Passed]]:
    """What the full-precision block outputs, and what passes each of its linears.

    Raises:
        NumericError: an output is not finite.
    """
    by_name = linears(block.module)
    entered: dict[str, list[Tensor]] = {name: [] for name in by_name}
    squares: dict[str, list[Tensor]] = {name: [] for name in by_name}

    def note(name: str, linear: nn.Module, arguments: tuple[Tensor], out: Tensor) -> None:
        entered[name].append(arguments[0].flatten(0, -2).sum(0, dtype=torch.float32))
        squares[name].append(out.float().square().sum())

    hooks = (m.register_forward_hook(partial(note, name)) for name, m in by_name.items())
    with hooked(hooks):
        out_BTH = block.forward(inputs_BTH)
    if not out_BTH.isfinite().all():
        remedy = remedy_for_infinities(block.module)
        raise NumericError(f"what the block outputs is not finite; {remedy}")
    tokens = out_BTH[..., 0].numel()
    passed = {}
    for name, linear in by_name.items():
        square = torch.stack(squares[name]).sum() / (tokens * linear.out_features)
        passed[name] = Passed(torch.stack(entered[name]).sum(0) / tokens, square.sqrt().item())
    return Target(out_BTH, token_weights(out_BTH)), passed


def token_weights(out_BTH: Tensor) -> Tensor:
    """How much the squared error of each token counts: float32 [B, T, 1].

    1 up to ten times the median energy (mean square over channels), above it that by energy.
    """
    energy_BT = torch.stack([out_TH.float().square().mean(1) for out_TH in out_BTH])
    most = _MOST_ENERGY * energy_BT.cpu().median().item()
    if most == 0:
        return torch.ones_like(energy_BT)[..., None]
    return (most / energy_BT).clamp(max=1.0)[..., None]
