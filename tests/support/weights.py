"""Random quantized weights, packed and as plain numbers."""

import torch
from torch import Tensor

from mbq.kernels.digits import Digits, pack_digits
from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.widths import slices_of, widths_up_to


def random_weight(
    rows: int, inputs: int, group_size: int, bias: float = 1.0, max_bits: int = 8
) -> tuple[Digits, Tensor, Tensor]:
    """Packed codes of a random weight; weights [W, N, K] and biases [W, N] by width."""
    weight_NK = torch.randn(rows, inputs) * torch.rand(rows, 1)
    scale, zero = scale_and_zero(*group_bounds(weight_NK, group_size))
    code = quantize(weight_NK, scale, zero)
    widths = widths_up_to(max_bits)
    gain_bias = pack_pair(
        1 + torch.randn(len(widths), rows) / 10, bias * torch.randn(len(widths), rows)
    )
    gain_WN, bias_WN = unpack_pair(gain_bias)
    weight_WNK = torch.stack(
        [
            dequantize(code, scale, zero, bits) * gain_N[:, None]
            for bits, gain_N in zip(widths, gain_WN, strict=True)
        ]
    )
    packed = pack_digits(code, pack_pair(scale, zero), gain_bias, slices_of(max_bits))
    return packed, weight_WNK, bias_WN


def error(out: Tensor, expected: Tensor) -> float:
    """Of a product, relative to it."""
    return float((out.double() - expected).norm() / expected.norm())
