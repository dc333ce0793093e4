"""How much a block's output depends on each output channel of its linears.

A linear's sensitivity (`sensitivity.py`) is one number, a mean over channels. Where one channel is
large and hardly read, and another small and multiplied up later, by another linear or a norm, that
times a sum of squared errors says little. So errors are weighed by channel, by 1 on average.

All channels of the block's output count alike, so those of what is only added to the residual
stream do, too, whatever later blocks make of them.

Legend: B sequences, T tokens, H hidden_size, N out_features.
"""

import torch
from torch import Tensor

from mbq.workers.model import BlockRunner
from mbq.workers.sensitivity import output_gradients


def channel_importance(block: BlockRunner, hidden_BTH: Tensor, seed: int) -> dict[str, Tensor]:
    """Importance of output channels, by the linear's name: float32 [N], mean 1.

    Mean squared gradients of the block's output times random signs: the diagonal of J^T J, of the
    Jacobian J of the output, estimated as Hutchinson does.

    Raises:
        NumericError: a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = hidden_BTH.split(block.microbatch)
    signs = [
        (torch.randint(0, 2, part.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(part)
        for part in parts
    ]
    squares, _ = output_gradients(block.module, block, parts, signs)
    return {
        name: square_N / square_N.mean() if square_N.any() else torch.ones_like(square_N)
        for name, square_N in squares.items()
    }
