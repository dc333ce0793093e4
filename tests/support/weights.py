"""Random quantized weights, packed and as plain numbers."""

import torch
from torch import Tensor, nn

from mbq.kernels.bitplanes import pack_planes
from mbq.kernels.digits import Digits, pack_digits
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    powers_of_two,
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.widths import WIDTHS, slices_of, widths_up_to

# Exponents of 256 columns that are as they were.
UNSCALED_K = torch.zeros(256, dtype=torch.int8)


def exponents(inputs: int) -> Tensor:
    """Of columns: the same for all linears of so many inputs, int8 [K]."""
    generator = torch.Generator().manual_seed(inputs)
    return torch.randint(-3, 4, (inputs,), generator=generator, dtype=torch.int8)


def random_weight(
    rows: int, inputs: int, group_size: int, bias: float = 1.0, max_bits: int = 8
) -> tuple[Digits, Tensor, Tensor]:
    """Packed codes of a random weight; weights [W, N, K] and biases [W, N] by width."""
    weight_NK = torch.randn(rows, inputs) * torch.rand(rows, 1)
    scale, zero = scale_and_zero(*group_bounds(weight_NK, group_size))
    code = quantize(weight_NK, scale, zero)
    exponent_K = exponents(inputs)
    widths = widths_up_to(max_bits)
    gain_bias = pack_pair(
        1 + torch.randn(len(widths), rows) / 10, bias * torch.randn(len(widths), rows)
    )
    gain_WN, bias_WN = unpack_pair(gain_bias)
    weight_WNK = torch.stack(
        [
            dequantize(code, scale, zero, bits) * gain_N[:, None] * powers_of_two(exponent_K)
            for bits, gain_N in zip(widths, gain_WN, strict=True)
        ]
    )
    packed = pack_digits(code, exponent_K, pack_pair(scale, zero), gain_bias, slices_of(max_bits))
    return packed, weight_WNK, bias_WN


def random_linear(
    rows: int, inputs: int, group_size: int, precision: Precision, bias: nn.Parameter | None = None
) -> ElasticLinear:
    """An elastic linear of random codes, up to 8 bits."""
    linear = ElasticLinear(inputs, rows, group_size, precision, bias)
    code = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    for p, plane in enumerate(pack_planes(code)):
        linear.get_buffer(f"plane_{p}").copy_(plane)
    linear.get_buffer("exponent").copy_(exponents(inputs))
    scale = 0.1 + torch.rand(rows, inputs // group_size)
    linear.get_buffer("scale_zero").copy_(pack_pair(scale, torch.full_like(scale, 2.0)))
    for bits in WIDTHS:
        gain, offset = torch.rand(2, rows)
        linear.get_buffer(f"gain_bias_{bits}").copy_(pack_pair(gain + 0.5, offset))
    return linear


def error(out: Tensor, expected: Tensor) -> float:
    """Of a product, relative to it."""
    return float((out.double() - expected).norm() / expected.norm())
