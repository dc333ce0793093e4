"""What a loaded model would make at first use, made before anybody waits for it.

    model = load_model("./llama2-13b-mbq", dtype=torch.bfloat16).to("cuda")
    model.warm_up()              # before serving, capturing in a CUDA graph or `torch.compile`

On a GPU the first tokens of a width compile kernels, exchange the planes for the layout that these
read, and allocate what they count in. Kernels that were compiled on this machine before come from
Triton's cache on disk.
"""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.precision import start_over
from mbq.kernels import dispatch
from mbq.kernels.shared_input import SharedInput
from mbq.kernels.widths import widths_up_to


@torch.no_grad()
def warm_up(model: PreTrainedModel, tokens: Iterable[int] = (1, 128)) -> None:
    """Make ready, at every width, what passes of so many tokens need.

    Where no kernels serve the model, as on a CPU, nothing is done. The width stays as it is, and
    `realised_bits` begins to count anew. Not to be called while others use the model. Also
    `model.warm_up(tokens)`.

    Args:
        tokens: of a pass, all sequences together. 128 stand for all numbers above 64, powers of two
            for those down to the next.

    Raises:
        InputError: these are no positive whole numbers.
    """
    counts = tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)
    for count in counts:
        if not isinstance(count, int) or count < 1:
            raise InputError(f"tokens {count!r}: give whole numbers, what a pass of yours holds")
    linears = elastic_linears(model)
    inputs = {id(linear.shared): linear.shared for linear in linears}
    precision = linears[0].precision
    before = precision.bits
    try:
        for bits in (*widths_up_to(precision.max_bits), None):
            precision.bits = bits
            for shared in inputs.values():
                if bits is not None or shared.router is not None:
                    _pass(shared, counts, model.dtype)
    finally:
        precision.bits = before
        start_over(model)


def _pass(shared: SharedInput, counts: Iterable[int], dtype: torch.dtype) -> None:
    """Zeros through the linears of one input, if kernels serve them."""
    first: Any = shared.linears[0]
    device = first.get_buffer("scale_zero").device
    for count in counts:
        x = torch.zeros(count, first.in_features, dtype=dtype, device=device)
        if dispatch.packs(x, first.group_size):
            for linear in shared.linears:
                linear(x)
