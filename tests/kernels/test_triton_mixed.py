"""Tokens of their own widths in Triton's interpreter against float64; digits in an emulator.

`conftest.py` sets TRITON_INTERPRET before anything imports Triton. What is not written stays NaN:
`new_empty` is poisoned.
"""

import numpy as np
import pytest
import torch

from mbq.kernels.digits import join_digits, pack_digits, position
from mbq.kernels.dispatch import multiply
from mbq.kernels.quantize import pack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_prepare import PreparedHalves, digit_bit, prepare
from mbq.kernels.triton_tiles import ODD, REJOINING, Tile, assembly
from mbq.kernels.widths import WIDTHS
from tests.support.ptx import emulate
from tests.support.weights import UNSCALED_K, error, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


def _many(widths: list[int]) -> list[int]:
    """The same, over and over: up to 8 tokens have another kernel."""
    return widths * (8 // len(widths) + 1)


@pytest.mark.parametrize(
    ("widths", "group_size", "tile", "steps"),
    [
        ([2, 8, 4, 6, 2], 128, Tile(128, 1, 2, 3), [4, 0]),
        ([4, 2, 2], 64, Tile(128, 2, 4, 2), [2, 0]),
        ([3, 8, 2, 6, 4, 3], 128, Tile(128, 2, 8, 3), [5, 1]),
        ([2, 3], 32, Tile(64, 1, 4, 3), [2, 1]),
        ([2, 3], 32, Tile(64, 1, 2, 3), [2, 1]),
        ([3, 4], 128, Tile(64, 1, 2, 3), [3, 1]),
        ([6, 3, 2], 128, Tile(64, 2, 4, 3), [4, 1]),
        ([8] * 3 + [3] * 40, 256, Tile(128, 2, 4, 3), [5, 1]),
    ],
)
def test_each_token_has_its_own_width(
    widths: list[int], group_size: int, tile: Tile, steps: list[int]
) -> None:
    torch.manual_seed(len(widths))
    widths = _many(widths)
    weight, weight_WNK, bias_WN = random_weight(130, 512, group_size)
    x = torch.randn(len(widths), 512).bfloat16()
    bits_T = torch.tensor(widths)
    prepared = prepare(x, weight.power_K, bits_T[None], 1, group_size, 8)
    assert isinstance(prepared, PreparedHalves)
    assert prepared.steps_L2 is not None and prepared.steps_L2.tolist() == [steps]
    (out,) = weight.sides(multiply(prepared, None, weight, tile, torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


@pytest.mark.parametrize(("max_bits", "widths"), [(4, [3, 4, 2]), (6, [6, 2, 3, 4])])
def test_fewer_stored_bits(max_bits: int, widths: list[int]) -> None:
    widths = _many(widths)
    weight, weight_WNK, bias_WN = random_weight(64, 256, 128, max_bits=max_bits)
    x = torch.randn(len(widths), 256).half()
    bits_T = torch.tensor(widths, dtype=torch.int32)
    prepared = prepare(x, weight.power_K, bits_T[None], 1, 128, max_bits)
    (out,) = weight.sides(multiply(prepared, None, weight, Tile(128, 1, 2, 3), torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


@pytest.mark.parametrize(
    "bits", [[[2, 3, 8], [4, 4, 2], [6, 2, 3]], [[8, 2, 3], [2, 2, 2]], [[3, 2], [2, 2], [2, 8]]]
)
@pytest.mark.parametrize("split", [1, 2])
def test_linears_of_one_input(bits: list[list[int]], split: int) -> None:
    torch.manual_seed(len(bits))
    bits = [_many(widths) for widths in bits]
    made = [random_weight(rows, 512, 128) for rows in (100, 64, 200)[: len(bits)]]
    joined = join_digits([weight for weight, *_ in made])
    x = torch.randn(len(bits[0]), 512).half()
    prepared = prepare(x, joined.power_K, torch.tensor(bits), len(bits), 128, 8)
    out_TN = multiply(prepared, None, joined, Tile(64, split, 2, 3), torch.float32)
    for out, (_, weight_WNK, bias_WN), widths in zip(joined.sides(out_TN), made, bits, strict=True):
        expected = routed_linear(x, weight_WNK, bias_WN, torch.tensor(widths))
        assert error(out, expected) < 1e-5


def test_known_weights() -> None:
    """A code between its neighbours' at every width, picked out by one input of 1."""
    code = torch.zeros(64, 256, dtype=torch.uint8)
    code[:, 37] = 0b01_10_11_01
    one, zero = torch.ones(64, 2), torch.zeros(64, 2)
    gain_bias = pack_pair(torch.ones(5, 64), torch.zeros(5, 64))
    weight = pack_digits(code, UNSCALED_K, pack_pair(one, zero), gain_bias, 4)
    x = torch.zeros(10, 256).half()
    x[:, 37] = 1
    expected = torch.tensor([1.5, 1.75, 1.625, 1.71875, 1.7109375] * 2)
    tile = Tile(128, 1, 2, 3)
    prepared = prepare(x, weight.power_K, torch.tensor([_many(list(WIDTHS))]), 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, None, weight, tile, torch.float32))
    assert torch.equal(out, expected[:, None].expand(10, 64))


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e5])
def test_tokens_of_any_magnitude(magnitude: float) -> None:
    weight, weight_WNK, bias_WN = random_weight(64, 256, 128, bias=0.0)
    x = (torch.randn(10, 256) * magnitude).bfloat16()
    x[0, 7] = 100 * magnitude
    bits_T = torch.tensor(_many([3, 8]))
    prepared = prepare(x, weight.power_K, bits_T[None], 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, None, weight, Tile(128, 1, 2, 3), torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-4


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight, _, bias_WN = random_weight(64, 256, 128)
    x, bits_LT = torch.zeros(10, 256).half(), torch.tensor([_many([4, 2])])
    prepared = prepare(x, weight.power_K, bits_LT, 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, None, weight, Tile(128, 1, 2, 3), torch.float32))
    assert torch.equal(out, bias_WN[[2, 0] * 5])


def test_strided_tokens() -> None:
    weight, weight_WNK, bias_WN = random_weight(64, 256, 128)
    x = torch.randn(256, 9).half().T
    bits_T = torch.tensor([[3, 8], [2, 8], [3, 8]] * 3)[:, 0]
    prepared = prepare(x, weight.power_K, bits_T[None], 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, None, weight, Tile(64, 1, 2, 3), torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


@pytest.mark.parametrize("selector", [3, 2, 1])
@pytest.mark.parametrize("position", range(8))
def test_assembly_makes_digits(position: int, selector: int) -> None:
    rng = np.random.default_rng(position)
    word = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    bit = digit_bit(position)
    body = assembly(position)
    mask, magic = (np.full_like(word, v * 0x10001) for v in (selector << bit, (25 - bit) << 10))
    made = emulate(body, {"$1": word, "$2": mask, "$3": magic})["$0"].view(np.float16)
    digit = (word.view(np.uint16) >> np.uint16(2 * position)) & np.uint16(selector)
    assert np.array_equal(made.astype(np.float64), 2.0 ** (10 - bit) + digit)


def test_assembly_puts_the_second_slice_together() -> None:
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (1, 256), dtype=np.uint8) & 0b00_11_00_00
    pair = pack_pair(torch.ones(1, 2), torch.zeros(1, 2))
    gain_bias = pack_pair(torch.ones(5, 1), torch.zeros(5, 1))
    packed = pack_digits(torch.from_numpy(digits), UNSCALED_K, pair, gain_bias, 4)
    high, low = (plane[0, 0].numpy().view(np.uint32) for plane in packed.digits_SHBN16[1])
    for late in (0, 1):
        shift, odd = (
            np.full_like(high, v) for v in (late * 0x10001, (ODD.value & 0xFFFF) * 0x10001)
        )
        registers = {"$1": high, "$2": low, "$3": shift, "$4": odd}
        words = emulate(REJOINING.value, registers)["$0"].view(np.uint16)
        for c in range(8):
            found = words >> np.uint16(2 * position(c)) & np.uint16(3)
            inputs = slice(32 * c + 16 * late, 32 * c + 16 * late + 16)
            assert np.array_equal(found << 4, digits[0, inputs])
    # Other slices' words are left as they are.
    registers |= {"$3": np.zeros_like(high), "$4": np.full_like(high, 0xFFFFFFFF)}
    assert np.array_equal(emulate(REJOINING.value, registers)["$0"], high)
