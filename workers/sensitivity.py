"""How sensitive the loss is to errors at a linear's output: one number per linear.

    sensitivity = mean over tokens and outputs of (d loss / d output)^2

where the loss is the summed negative log likelihood (nats) of a few calibration sequences under the
full-precision model: the diagonal of the empirical Fisher information. An output error that is
independent of the gradient, and as large in channels of large gradients as in others, then costs
`sensitivity / 2 * |error|^2` nats a token; errors are counted so that they are
(`importance.py`). The numbers differ by a factor of a thousand between linears, which is
why bits are shared across all of them.

One pass forward that keeps what enters each block in host memory, one pass backward, both block by
block: never more than one block's weights at a time.

Legend: B sequences, T tokens, H hidden_size, N out_features.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.checkpoint import block_prefix
from mbq.artifacts.errors import NumericError
from mbq.workers.model import Model, hooked, linears, remedy_for_infinities


def measure_sensitivity(
    model: Model, ids_BT: Tensor, microbatch: int, report: Callable[[float], None]
) -> dict[str, float]:
    """Sensitivity (nats per squared unit of output) of every linear, by its name in the model.

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
    found: dict[str, float] = {}
    for index in reversed(range(model.block_count)):
        means, gradient_BTH = backward_block(model, index, entering.pop(), gradient_BTH, microbatch)
        for name, mean in means.items():
            found[block_prefix(index) + name] = mean
        report((steps - 2 * index) / steps)
    return dict(sorted(found.items()))


def backward_block(
    model: Model, index: int, entering_BTH: Tensor, gradient_BTH: Tensor, microbatch: int
) -> tuple[dict[str, float], Tensor]:
    """Sensitivities of one block's linears, and the gradient of what enters it.

    Args:
        entering_BTH: hidden states that enter the block.
        gradient_BTH: gradient of the loss with respect to those that leave it.
    """
    block = model.block(index)
    squares, left = output_gradients(
        block,
        lambda hidden_BTH: model.run(block, index, hidden_BTH),
        _placed(model, entering_BTH, microbatch),
        _placed(model, gradient_BTH, microbatch),
    )
    return {name: square_N.mean().item() for name, square_N in squares.items()}, torch.cat(left)


def output_gradients(
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    entering: Iterable[Tensor],
    gradients: Iterable[Tensor],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Mean squared gradient at each output channel of a block's linears.

    Args:
        run: passes hidden states through the block.
        entering: hidden states [B, T, H], part by part.
        gradients: with respect to what leaves the block, of each part.

    Returns float32 [N] by name, and gradients with respect to what entered, in host memory. Of a
    linear that is called more than once it is the sum over its calls.

    Raises:
        NumericError: a gradient is not finite.
    """
    by_name = linears(block)
    sums = {n: m.weight.new_zeros(m.out_features, dtype=torch.float32) for n, m in by_name.items()}
    tokens = 0

    def add(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.float().square().flatten(0, -2).sum(0)

    def note(name: str, module: nn.Module, arguments: object, out: Tensor) -> None:
        out.register_hook(partial(add, name))

    left = []
    hooks = (m.register_forward_hook(partial(note, name)) for name, m in by_name.items())
    with hooked(hooks):
        for part, gradient in zip(entering, gradients, strict=True):
            leaf = part.detach().requires_grad_(True)
            run(leaf).backward(gradient)
            assert leaf.grad is not None
            left.append(leaf.grad.cpu())
            tokens += part[..., 0].numel()
    for name, sum_N in sums.items():
        if not sum_N.isfinite().all():
            raise NumericError(
                f"gradients at what {name} outputs are not finite; {remedy_for_infinities(block)}"
            )
    return {name: sum_N / tokens for name, sum_N in sums.items()}, left


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


def _placed(model: Model, hidden_BTH: Tensor, microbatch: int) -> list[Tensor]:
    return [part.to(model.device) for part in hidden_BTH.split(microbatch)]
