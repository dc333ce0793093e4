"""Products by whole codes in Triton's interpreter against float64, and their assembly."""

import numpy as np
import pytest
import torch

from mbq.kernels.digits import join_digits, pack_digits
from mbq.kernels.quantize import dequantize, pack_pair, unpack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.triton_whole import (
    bias,
    combining,
    extracting,
    field_bits,
    multiply_whole,
)
from mbq.kernels.widths import CODE_BITS, WIDTHS, slices_of
from tests.support.ptx import emulate

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs", "group_size", "split"),
    [(64, 70, 256, 128, 1), (17, 130, 768, 32, 3), (33, 40, 384, 128, 2), (5, 10, 512, 256, 1)],
)
def test_equals_the_definition(
    bits: int, tokens: int, rows: int, inputs: int, group_size: int, split: int
) -> None:
    torch.manual_seed(bits)
    linears, weights, biases = [], [], []
    for more in (0, 90):
        code = torch.randint(0, 256, (rows + more, inputs), dtype=torch.uint8)
        groups = inputs // group_size
        scale_zero = pack_pair(*(0.5 + torch.rand(2, rows + more, groups)))
        gain_bias = pack_pair(*(1 + torch.randn(2, len(WIDTHS), rows + more) / 10))
        gain_WN, bias_WN = unpack_pair(gain_bias)
        linears.append(pack_digits(code, scale_zero, gain_bias, 4))
        weights.append(
            torch.stack(
                [
                    dequantize(code, *unpack_pair(scale_zero), width) * gain_N[:, None]
                    for width, gain_N in zip(WIDTHS, gain_WN, strict=True)
                ]
            )
        )
        biases.append(bias_WN)
    x = torch.randn(tokens, inputs).half()
    prepared = prepare(x, bits, 2, group_size, 8)
    tile = Tile(64, split, 4, 2)
    outs = multiply_whole(prepared, bits, join_digits(linears), tile, torch.float32)
    bits_T = torch.full((tokens,), bits)
    for out, weight_WNK, bias_WN in zip(outs, weights, biases, strict=True):
        expected = routed_linear(x, weight_WNK, bias_WN, bits_T)
        assert out.shape == expected.shape
        assert float((out.double() - expected).norm() / expected.norm()) < 1e-5


def test_as_many_slices_as_are_there() -> None:
    code = torch.full((3, 256), 0b10_11_00_00, dtype=torch.uint8)
    one = pack_pair(torch.ones(3, 2), torch.zeros(3, 2))
    weight = pack_digits(code, one, pack_pair(torch.ones(3, 3), torch.zeros(3, 3)), 2)
    x = torch.zeros(20, 256).half()
    x[:, 100] = 2.0
    for bits, value in ((2, 2.5), (3, 2.75), (4, 2.875)):
        prepared = prepare(x, bits, 1, 128, 4)
        (out,) = multiply_whole(prepared, bits, weight, Tile(128, 1, 4, 2), torch.float32)
        assert torch.equal(out, torch.full((20, 3), 2 * value))


@pytest.mark.parametrize("bits", WIDTHS)
def test_assembly_puts_codes_together(bits: int) -> None:
    rng = np.random.default_rng(bits)
    slices, fields = slices_of(bits), field_bits(bits)
    words = rng.integers(0, 2**32, (slices, 4096), dtype=np.uint32)
    combined = list(words)
    if slices > 1:
        first = fields // 2
        given = {f"${first + e}": word for e, word in enumerate(words)}
        held = emulate(combining(bits), given)
        combined = [held[f"${k}"] for k in range(first)]
    for position in range(8):
        word = combined[position % len(combined)]
        made = emulate(extracting(position, bits), {"$1": word})["$0"].view(np.float16)
        code = np.zeros(2 * 4096, np.uint16)
        for e, original in enumerate(words):
            digit = (original.view(np.uint16) >> np.uint16(2 * position)) & np.uint16(3)
            code |= digit << np.uint16(CODE_BITS - 2 * (e + 1))
        field = code >> np.uint16(CODE_BITS - bits) << np.uint16(fields - bits)
        assert np.array_equal(made.astype(np.float64), bias(bits) + field.astype(np.float64))
