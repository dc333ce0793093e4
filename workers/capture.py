"""The hidden states that enter each block, passed on one block at a time.

Hidden states travel between tasks as numpy arrays, bfloat16 ones as their bits: that is what an
object store hands over without a copy. A set of them has one stream or several:

    "full"   of the full-precision model
    "2" ...  of the model calibrated so far at that many bits (sequential propagation only)

Each call needs one block's weights and its input, so any step can be repeated alone.

Legend: B sequences, T tokens, H hidden_size.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbq.kernels.precision import Precision
from mbq.workers.model import Model

FULL = "full"
Hidden = dict[str, NDArray[Any]]


def first_hidden(model: Model, ids_BT: Tensor, widths: Sequence[int]) -> Hidden:
    """Hidden states that enter block 0: the embeddings, equal in every stream."""
    array = to_array(model.embed(ids_BT))
    return {name: array for name in [FULL, *map(str, widths)]}


@torch.no_grad()
def run_block(
    model: Model,
    index: int,
    hidden: Mapping[str, NDArray[Any]],
    microbatch: int,
    quantized: tuple[nn.Module, Precision] | None,
) -> Hidden:
    """Hidden states that leave block `index`.

    Args:
        quantized: the calibrated block and its precision, for the streams beside "full".
    """
    block = model.block(index)
    out: Hidden = {}
    for name, array in hidden.items():
        if name == FULL:
            module = block
        else:
            assert quantized is not None, f"stream {name} needs the calibrated block"
            module, precision = quantized
            precision.bits = int(name)
        parts = from_array(array, model.dtype).split(microbatch)
        out[name] = to_array(
            torch.cat([model.run(module, index, part.to(model.device)).cpu() for part in parts])
        )
    return out


def place(hidden: Hidden, model: Model, widths: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
    """Hidden states where the model runs: of the full-precision model, and by width.

    Widths without a stream of their own get those of the full-precision model. Equal streams are
    one tensor, as before block 0.
    """
    arrays = {id(array): array for array in hidden.values()}
    placed = {key: from_array(array, model.dtype).to(model.device) for key, array in arrays.items()}
    inputs = {bits: placed[id(hidden.get(str(bits), hidden[FULL]))] for bits in widths}
    return placed[id(hidden[FULL])], inputs


def to_array(hidden_BTH: Tensor) -> NDArray[Any]:
    """numpy has no bfloat16: its bits travel as uint16."""
    hidden_BTH = hidden_BTH.detach().cpu().contiguous()
    if hidden_BTH.dtype == torch.bfloat16:
        return hidden_BTH.view(torch.uint16).numpy()
    return hidden_BTH.numpy()


def from_array(array: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Inverse of `to_array`. It shares the array's memory, which may be read-only: never write."""
    with warnings.catch_warnings():
        # torch warns that writing to a read-only array is undefined; a copy would be gigabytes.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        shared = torch.from_numpy(array)
    return shared.view(dtype) if array.dtype == np.uint16 else shared
