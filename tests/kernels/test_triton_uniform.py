"""Tokens of one width in Triton's interpreter against float64; fields in an emulator."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mbq.kernels.digits import join_digits, pack_digits
from mbq.kernels.dispatch import multiply
from mbq.kernels.quantize import pack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_fields import (
    combining,
    extracting,
    field_bits,
    field_one,
)
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.widths import CODE_BITS, WIDTHS, slices_of
from tests.support.products import error_at_one_width
from tests.support.ptx import emulate
from tests.support.weights import UNSCALED_K, error, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs", "group_size", "tile"),
    # Words that are asked for ahead, and, with fewer warps, that are not.
    [
        (64, 70, 256, 128, Tile(64, 1, 4, 2)),
        (17, 130, 768, 32, Tile(64, 3, 4, 2)),
        (33, 40, 384, 128, Tile(64, 2, 2, 2)),
        (9, 10, 512, 256, Tile(128, 1, 4, 2)),
        (12, 130, 512, 64, Tile(128, 1, 8, 2)),
        (12, 130, 512, 128, Tile(256, 1, 8, 2)),
    ],
)
def test_equals_the_definition(
    known: bool, bits: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    assert error_at_one_width(tokens, bits, known, rows, inputs, group_size, tile) < 1e-5


# By the kernel for few tokens, and by that for more.
TILES = pytest.mark.parametrize(
    ("tokens", "tile"), [(5, Tile(32, 1, 2, 1)), (12, Tile(64, 1, 4, 2))]
)
# Inputs in 16 bits are exact in float16, not quite as whole numbers of their group.
TOLERANCES = {5: 1e-4, 12: 1e-5}


@TILES
@pytest.mark.parametrize("max_bits", [8, 6, 4])
def test_linears_of_one_input_at_widths_the_device_knows(
    tokens: int, tile: Tile, max_bits: int
) -> None:
    made = [random_weight(rows, 512, 128, max_bits=max_bits) for rows in (100, 64, 200)]
    tile = replace(tile, split=1 if tokens < 9 else 2)
    joined = join_digits([weight for weight, *_ in made])
    widths = torch.tensor([[3], [2], [max_bits]])
    x = torch.randn(tokens, 512).half()
    prepared = prepare(x, joined.power_K, widths, 3, 128, max_bits)
    out_TN = multiply(prepared, None, joined, tile, torch.float32)
    for out, (_, weight_WNK, bias_WN), bits in zip(
        joined.sides(out_TN), made, widths[:, 0], strict=True
    ):
        assert (
            error(out, routed_linear(x, weight_WNK, bias_WN, bits.expand(tokens)))
            < TOLERANCES[tokens]
        )


@TILES
def test_a_tile_does_not_reach_into_the_next_linear(tokens: int, tile: Tile) -> None:
    joined = join_digits([random_weight(rows, 256, 128)[0] for rows in (128, 384)])
    prepared = prepare(torch.randn(tokens, 256).half(), joined.power_K, 2, 2, 128, 8)
    with pytest.raises(ValueError, match=r"256 rows do not divide linears of \(0, 128, 512\) rows"):
        multiply(prepared, 2, joined, replace(tile, rows=256), torch.float16)


def test_no_program_is_without_inputs() -> None:
    weight, *_ = random_weight(128, 512, 128)
    prepared = prepare(torch.randn(12, 512).half(), weight.power_K, 2, 1, 128, 8)
    with pytest.raises(ValueError, match="3 programs along K are more than 2 blocks of inputs"):
        multiply(prepared, 2, weight, Tile(64, 3, 4, 2), torch.float16)


@TILES
def test_known_weights(tokens: int, tile: Tile) -> None:
    """A code between its neighbours' at every width, picked out by one input of 1."""
    code = torch.zeros(64, 256, dtype=torch.uint8)
    code[:, 37] = 0b01_10_11_01
    one, zero = torch.ones(64, 2), torch.zeros(64, 2)
    gain_bias = pack_pair(torch.ones(5, 64), torch.zeros(5, 64))
    weight = pack_digits(code, UNSCALED_K, pack_pair(one, zero), gain_bias, 4)
    x = torch.zeros(tokens, 256).half()
    x[:, 37] = 1
    for bits, value in zip(WIDTHS, (1.5, 1.75, 1.625, 1.71875, 1.7109375), strict=True):
        prepared = prepare(x, weight.power_K, bits, 1, 128, 8)
        (out,) = weight.sides(multiply(prepared, bits, weight, tile, torch.float32))
        assert torch.equal(out, torch.full((tokens, 64), value))


@TILES
@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e5])
def test_tokens_of_any_magnitude(magnitude: float, tokens: int, tile: Tile) -> None:
    weight, weight_WNK, bias_WN = random_weight(64, 256, 128, bias=0.0)
    x = (torch.randn(tokens, 256) * magnitude).bfloat16()
    x[0, 7] = 100 * magnitude
    prepared = prepare(x, weight.power_K, 8, 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, 8, weight, tile, torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, torch.full((tokens,), 8))) < 1e-4


@TILES
def test_a_token_of_zeros_gives_the_bias(tokens: int, tile: Tile) -> None:
    weight, _, bias_WN = random_weight(64, 256, 128)
    prepared = prepare(torch.zeros(tokens, 256).half(), weight.power_K, 4, 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, 4, weight, tile, torch.float32))
    assert torch.equal(out, bias_WN[2].expand(tokens, 64))


def test_as_many_slices_as_are_there() -> None:
    code = torch.full((3, 256), 0b10_11_00_00, dtype=torch.uint8)
    one = pack_pair(torch.ones(3, 2), torch.zeros(3, 2))
    weight = pack_digits(code, UNSCALED_K, one, pack_pair(torch.ones(3, 3), torch.zeros(3, 3)), 2)
    x = torch.zeros(20, 256).half()
    x[:, 100] = 2.0
    for bits, value in ((2, 2.5), (3, 2.75), (4, 2.875)):
        prepared = prepare(x, weight.power_K, bits, 1, 128, 4)
        (out,) = weight.sides(multiply(prepared, bits, weight, Tile(128, 1, 4, 2), torch.float32))
        assert torch.equal(out, torch.full((20, 3), 2 * value))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_assembly_puts_codes_together(bits: int) -> None:
    rng = np.random.default_rng(bits)
    slices, fields = slices_of(bits), field_bits(bits)
    words = rng.integers(0, 2**32, (slices, 4096), dtype=np.uint32)
    if bits == 3:
        words[1] &= 0xAAAAAAAA
    first = fields // 2
    held = emulate(combining(bits), {f"${first + e}": word for e, word in enumerate(words)})
    for position in range(8):
        word = held[f"${position % first}"]
        made = emulate(extracting(position, bits), {"$1": word})["$0"].view(np.float16)
        code = np.zeros(2 * 4096, np.uint16)
        for e, original in enumerate(words):
            digit = (original.view(np.uint16) >> np.uint16(2 * position)) & np.uint16(3)
            code |= digit << np.uint16(CODE_BITS - 2 * (e + 1))
        field = code >> np.uint16(CODE_BITS - bits) << np.uint16(fields - bits)
        assert np.array_equal(made.astype(np.float64), field_one(position, bits) * field)
