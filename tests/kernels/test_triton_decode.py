"""The decode kernels in Triton's interpreter against float64, and their assembly in an emulator.

`conftest.py` sets TRITON_INTERPRET before anything imports Triton. What is not written stays NaN:
`new_empty` is poisoned.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq.kernels import triton_decode
from mbq.kernels.digits import Digits, join_digits, pack_digits
from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_decode import multiply
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.widths import WIDTHS, slices_of, widths_up_to
from tests.support.ptx import emulate

pytestmark = pytest.mark.usefixtures("poisoned")


def _weight(
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


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs", "group_size", "tile"),
    [
        (1, 128, 256, 128, Tile(128, 1, 2, 3)),
        (3, 100, 384, 128, Tile(64, 2, 2, 3)),
        (17, 70, 768, 32, Tile(128, 3, 4, 3)),
    ],
)
def test_alike_tokens(
    bits: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    torch.manual_seed(bits)
    weight, weight_WNK, bias_WN = _weight(rows, inputs, group_size)
    x = torch.randn(tokens, inputs).half()
    (out,) = multiply(prepare(x, bits, 1, group_size, 8), weight, tile, torch.float32)
    expected = routed_linear(x, weight_WNK, bias_WN, torch.tensor([bits] * tokens))
    assert _error(out, expected) < 1e-5


@pytest.mark.parametrize(
    ("widths", "group_size", "split", "steps"),
    [
        ([2, 8, 4, 6, 2], 128, 1, [4, 0]),
        ([4, 2, 2], 64, 2, [2, 0]),
        ([3, 8, 2, 6, 4, 3], 128, 2, [5, 1]),
        ([2, 3], 32, 1, [2, 1]),
        ([3, 4], 128, 1, [3, 1]),
        ([6, 3, 2], 128, 2, [4, 1]),
        ([8] * 3 + [3] * 40, 256, 2, [5, 1]),
    ],
)
def test_each_token_has_its_own_width(
    widths: list[int], group_size: int, split: int, steps: list[int]
) -> None:
    torch.manual_seed(len(widths))
    weight, weight_WNK, bias_WN = _weight(130, 512, group_size)
    x = torch.randn(len(widths), 512).bfloat16()
    bits_T = torch.tensor(widths)
    prepared = prepare(x, bits_T[None], 1, group_size, 8)
    assert prepared.steps_L2.tolist() == [steps]
    (out,) = multiply(prepared, weight, Tile(128, split, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


@pytest.mark.parametrize(("max_bits", "widths"), [(2, [2, 2]), (4, [3, 4, 2]), (6, [6, 2, 3, 4])])
def test_fewer_stored_bits(max_bits: int, widths: list[int]) -> None:
    weight, weight_WNK, bias_WN = _weight(64, 256, 128, max_bits=max_bits)
    x = torch.randn(len(widths), 256).half()
    bits_T = torch.tensor(widths, dtype=torch.int32)
    prepared = prepare(x, bits_T[None], 1, 128, max_bits)
    (out,) = multiply(prepared, weight, Tile(128, 1, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


@pytest.mark.parametrize(
    ("bits", "alike"),
    [
        ([[2, 3, 8], [4, 4, 2], [6, 2, 3]], False),
        ([[8, 2, 3], [2, 2, 2]], False),
        ([[3], [2], [8]], True),
    ],
)
@pytest.mark.parametrize("split", [1, 2])
def test_linears_of_one_input(bits: list[list[int]], alike: bool, split: int) -> None:
    torch.manual_seed(len(bits))
    made = [_weight(rows, 512, 128) for rows in (100, 64, 200)[: len(bits)]]
    joined = join_digits([weight for weight, *_ in made])
    x = torch.randn(3, 512).half()
    prepared = prepare(x, torch.tensor(bits), len(bits), 128, 8)
    assert prepared.mixed is not alike
    outs = multiply(prepared, joined, Tile(64, split, 2, 3), torch.float32)
    for out, (_, weight_WNK, bias_WN), widths in zip(outs, made, bits, strict=True):
        bits_T = torch.tensor(widths).expand(3)
        assert _error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


def test_a_tile_does_not_reach_into_the_next_linear() -> None:
    joined = join_digits([_weight(rows, 256, 128)[0] for rows in (128, 384)])
    prepared = prepare(torch.randn(1, 256).half(), 2, 2, 128, 8)
    with pytest.raises(ValueError, match=r"256 rows do not divide linears of \(0, 128, 512\) rows"):
        multiply(prepared, joined, Tile(256, 1, 4, 3), torch.float16)


def test_known_weights() -> None:
    """A code between its neighbours' at every width, picked out by one input of 1."""
    code = torch.zeros(64, 256, dtype=torch.uint8)
    code[:, 37] = 0b01_10_11_01
    one, zero = torch.ones(64, 2), torch.zeros(64, 2)
    gain_bias = pack_pair(torch.ones(5, 64), torch.zeros(5, 64))
    weight = pack_digits(code, pack_pair(one, zero), gain_bias, 4)
    x = torch.zeros(5, 256).half()
    x[:, 37] = 1
    expected = torch.tensor([1.5, 1.75, 1.625, 1.71875, 1.7109375])
    tile = Tile(128, 1, 2, 3)
    (mixed,) = multiply(prepare(x, torch.tensor([WIDTHS]), 1, 128, 8), weight, tile, torch.float32)
    assert torch.equal(mixed, expected[:, None].expand(5, 64))
    for bits, value in zip(WIDTHS, expected, strict=True):
        (alike,) = multiply(prepare(x, bits, 1, 128, 8), weight, tile, torch.float32)
        assert torch.equal(alike, value.expand(5, 64))


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e5])
def test_tokens_of_any_magnitude(magnitude: float) -> None:
    weight, weight_WNK, bias_WN = _weight(64, 256, 128, bias=0.0)
    x = (torch.randn(2, 256) * magnitude).bfloat16()
    x[0, 7] = 100 * magnitude
    (out,) = multiply(prepare(x, 8, 1, 128, 8), weight, Tile(128, 1, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_WNK, bias_WN, torch.tensor([8, 8]))) < 1e-4


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight, _, bias_WN = _weight(64, 256, 128)
    prepared = prepare(torch.zeros(1, 256).half(), 4, 1, 128, 8)
    (out,) = multiply(prepared, weight, Tile(128, 1, 2, 3), torch.float32)
    assert torch.equal(out[0], bias_WN[2])


def test_strided_tokens() -> None:
    weight, weight_WNK, bias_WN = _weight(64, 256, 128)
    x = torch.randn(256, 3).half().T
    bits_T = torch.tensor([[3, 8], [2, 8], [3, 8]])[:, 0]
    prepared = prepare(x, bits_T[None], 1, 128, 8)
    (out,) = multiply(prepared, weight, Tile(64, 1, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-5


def test_too_many_tokens_and_tiles_that_do_not_fit() -> None:
    weight, _, _ = _weight(64, 256, 128)
    with pytest.raises(ValueError, match="65 tokens: the decode kernel takes 1 to 64"):
        prepare(torch.zeros(65, 256).half(), 2, 1, 128, 8)
    prepared = prepare(torch.zeros(1, 256).half(), 2, 1, 128, 8)
    with pytest.raises(ValueError, match="tiles of 256 rows do not divide"):
        multiply(prepared, weight, Tile(256, 1, 4, 3), torch.float16)


@pytest.mark.parametrize("selector", [3, 2, 1])
@pytest.mark.parametrize("position", range(8))
def test_assembly_makes_digits(position: int, selector: int) -> None:
    rng = np.random.default_rng(position)
    word = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    bit = triton_decode.DIGIT_BITS[position]
    body = triton_decode.assembly(position)
    mask, magic = (np.full_like(word, v * 0x10001) for v in (selector << bit, (25 - bit) << 10))
    made = emulate(body, {"$1": word, "$2": mask, "$3": magic})["$0"].view(np.float16)
    digit = (word.view(np.uint16) >> np.uint16(2 * position)) & np.uint16(selector)
    assert np.array_equal(made.astype(np.float64), 2.0 ** (10 - bit) + digit)
