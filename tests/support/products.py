"""Products with random weights, and how far they are from float64."""

from collections.abc import Sequence

import torch

from mbq.kernels.digits import join_digits
from mbq.kernels.dispatch import multiply
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from tests.support.weights import error, random_weight

_NARROW = Tile(16, 1, 4, 1)


def error_at_one_width(
    tokens: int, bits: int, known: bool, rows: int, inputs: int, group_size: int, tile: Tile
) -> float:
    """The larger relative error of two linears of one input; `known` to the host or not."""
    torch.manual_seed(bits)
    made = [random_weight(rows + more, inputs, group_size) for more in (0, 90)]
    x = torch.randn(tokens, inputs).bfloat16()
    joined = join_digits([weight for weight, *_ in made])
    widths = bits if known else torch.full((2, 1), bits)
    prepared = prepare(x, joined.power_K, widths, 2, group_size, 8)
    out_TN = multiply(prepared, bits if known else None, joined, tile, torch.float32)
    bits_T = torch.full((tokens,), bits)
    return max(
        error(out, routed_linear(x, weight_WNK, bias_WN, bits_T))
        for out, (_, weight_WNK, bias_WN) in zip(joined.sides(out_TN), made, strict=True)
    )


def error_at_widths_of_their_own(
    widths: Sequence[int], inputs: int, group_size: int, max_bits: int = 8, tile: Tile = _NARROW
) -> float:
    """Relative error of a linear of 70 rows."""
    weight, weight_WNK, bias_WN = random_weight(70, inputs, group_size, max_bits=max_bits)
    x = torch.randn(len(widths), inputs).bfloat16()
    bits_T = torch.tensor(widths)
    prepared = prepare(x, weight.power_K, bits_T[None], 1, group_size, max_bits)
    (out,) = weight.sides(multiply(prepared, None, weight, tile, torch.float32))
    return error(out, routed_linear(x, weight_WNK, bias_WN, bits_T))
