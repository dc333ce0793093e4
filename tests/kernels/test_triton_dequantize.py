"""The dequantizing kernel in Triton's interpreter against `dequantize`."""

import pytest
import torch

from mbq.kernels.digits import join_digits, pack_digits, part_of
from mbq.kernels.quantize import dequantize, pack_pair, powers_of_two, unpack_pair
from mbq.kernels.triton_dequantize import dequantize_digits
from mbq.kernels.widths import WIDTHS
from tests.support.weights import exponents

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("rows", "inputs", "group_size", "dtype"),
    [
        (1, 128, 128, torch.bfloat16),
        (70, 384, 32, torch.float16),
        (130, 768, 64, torch.bfloat16),
        (5, 512, 256, torch.float32),
        (5, 256, 256, torch.float16),
    ],
)
def test_equals_the_definition(
    bits: int, rows: int, inputs: int, group_size: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(bits)
    code = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    scale_zero = pack_pair(*(0.5 + torch.rand(2, rows, inputs // group_size)))
    gain_bias = pack_pair(*(0.9 + torch.rand(2, len(WIDTHS), rows) / 5))
    gain_WN, _ = unpack_pair(gain_bias)
    expected = dequantize(code, *unpack_pair(scale_zero), bits)
    expected *= gain_WN[WIDTHS.index(bits)][:, None] * powers_of_two(exponents(inputs))
    packed = pack_digits(code, exponents(inputs), scale_zero, gain_bias, 4)
    out = dequantize_digits(packed, bits, dtype)
    assert out.dtype == dtype
    # The interpreter cuts off bfloat16 that a GPU rounds: a whole unit, not half of one.
    rtol = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2**-22}[dtype]
    torch.testing.assert_close(out.float(), expected, rtol=rtol, atol=1e-6)


def test_a_part_of_joined_linears() -> None:
    code = torch.randint(0, 256, (100, 512), dtype=torch.uint8)
    scale_zero = pack_pair(*(0.5 + torch.rand(2, 100, 4)))
    gain_bias = pack_pair(*(0.9 + torch.rand(2, len(WIDTHS), 100) / 5))
    alone = pack_digits(code, exponents(512), scale_zero, gain_bias, 4)
    other = pack_digits(code[:70], exponents(512), scale_zero[:70], gain_bias[:, :70], 4)
    joined = join_digits([other, alone, other])
    for bits in WIDTHS:
        expected = dequantize_digits(alone, bits, torch.float16)
        assert torch.equal(dequantize_digits(part_of(joined, 1), bits, torch.float16), expected)


def test_as_many_slices_as_are_there() -> None:
    code = torch.full((3, 256), 0b10_11_00_00, dtype=torch.uint8)
    one = pack_pair(torch.ones(3, 2), torch.zeros(3, 2))
    gains = pack_pair(torch.ones(3, 3), torch.zeros(3, 3))
    packed = pack_digits(code, torch.zeros(256, dtype=torch.int8), one, gains, 2)
    for bits, value in ((2, 2.5), (3, 2.75), (4, 2.875)):
        out = dequantize_digits(packed, bits, torch.float32)
        assert torch.equal(out, torch.full((3, 256), value))
