"""How sensitive the loss is to errors at a linear's output, channel by channel.

    sensitivity = mean over tokens of (d loss / d output)^2

where the loss is the summed negative log likelihood (nats) of a few calibration sequences under the
full-precision model: the diagonal of the empirical Fisher information. An output error that is
independent of the gradient then costs the sum over channels of `sensitivity / 2 * error^2` nats a
token. Means over channels differ by a factor of a thousand between linears, which is why bits are
shared across all of them; within a linear, channels differ where one is large and hardly read, or
small and multiplied up later, so errors are counted by channel (`importance`).

One pass forward that keeps what enters each block in host memory, one pass backward, both block by
block: never more than one block's weights at a time.

Legend: B sequences, T tokens, H hidden_size, N out_features.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.checkpoint import block_prefix
from mbq.artifacts.errors import NumericError
from mbq.workers.model import Model, hooked, linears, remedy_for_infinities


def measure_sensitivity(
    model: Model, ids_BT: Tensor, microbatch: int, report: Callable[[float], None]
) -> dict[str, Tensor]:
    """Sensitivity (nats per squared unit of output) of every linear, by its name in the model.

    Float32 [N] in host memory, an output channel each.

    Args:
        report: called with the finished fraction after every block.

    Raises:
        NumericError: a gradient is not finite.
    """
    entering = [model.embed(ids_BT)]
    steps = 3 * model.block_count
    for index in range(model.block_count):
        block = model.block(index)
        with torch.no_grad():
            parts = [model.run(block, index, p) for p in _placed(model, entering[-1], microbatch)]
        entering.append(torch.cat([part.cpu() for part in parts]))
        report((index + 1) / steps)
    gradient_BTH = _head_gradient(model, entering.pop(), ids_BT)
    found: dict[str, Tensor] = {}
    for index in reversed(range(model.block_count)):
        by_name, gradient_BTH = backward_block(
            model, index, entering.pop(), gradient_BTH, microbatch
        )
        for name, sensitivity_N in by_name.items():
            found[block_prefix(index) + name] = sensitivity_N
        report((steps - 2 * index) / steps)
    return dict(sorted(found.items()))


def importance(sensitivity_N: Tensor) -> Tensor:
    """How much an output channel counts among those of a linear: float32 [N], 1 on average."""
    mean = sensitivity_N.mean()
    return sensitivity_N / mean if mean > 0 else torch.ones_like(sensitivity_N)


def backward_block(
    model: Model, index: int, entering_BTH: Tensor, gradient_BTH: Tensor, microbatch: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Sensitivities of one block's linears, float32 [N], and the gradient of what enters it.

    Of a linear that is called more than once it is the sum over its calls.

    Args:
        entering_BTH: hidden states that enter the block.
        gradient_BTH: gradient of the loss with respect to those that leave it.

    Raises:
        NumericError: a gradient is not finite.
    """
    block = model.block(index)
    by_name = linears(block)
    sums = {n: m.weight.new_zeros(m.out_features, dtype=torch.float32) for n, m in by_name.items()}

    def add(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.float().square().flatten(0, -2).sum(0)

    def note(name: str, module: nn.Module, arguments: object, out: Tensor) -> None:
        out.register_hook(partial(add, name))

    left = []
    parts = zip(
        _placed(model, entering_BTH, microbatch),
        _placed(model, gradient_BTH, microbatch),
        strict=True,
    )
    hooks = (m.register_forward_hook(partial(note, name)) for name, m in by_name.items())
    with hooked(hooks):
        for part, gradient in parts:
            leaf = part.detach().requires_grad_(True)
            model.run(block, index, leaf).backward(gradient)
            assert leaf.grad is not None
            left.append(leaf.grad.cpu())
    for name, sum_N in sums.items():
        if not sum_N.isfinite().all():
            raise NumericError(
                f"gradients at what {name} outputs are not finite; {remedy_for_infinities(block)}"
            )
    tokens = entering_BTH[..., 0].numel()
    return {name: sum_N.cpu() / tokens for name, sum_N in sums.items()}, torch.cat(left)


def _head_gradient(model: Model, hidden_BTH: Tensor, ids_BT: Tensor) -> Tensor:
    """Gradient of the summed loss with respect to the hidden states that enter the head."""
    head = model.head()
    gradients = []
    # The logits of one sequence at a time: they are the largest tensor of all.
    for hidden, ids in zip(hidden_BTH.split(1), ids_BT.split(1), strict=True):
        hidden = hidden.detach().to(model.device).requires_grad_(True)
        logits = head(hidden)[:, :-1].float()
        target = ids[:, 1:].to(model.device, torch.int64)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        loss.backward()
        assert hidden.grad is not None
        gradients.append(hidden.grad.cpu())
    return torch.cat(gradients)


def _placed(model: Model, hidden_BTH: Tensor, microbatch: int) -> Iterator[Tensor]:
    return (part.to(model.device) for part in hidden_BTH.split(microbatch))
