"""Few tokens in Triton's interpreter against float64."""

import math

import numpy as np
import pytest
import torch

from mbq.kernels.dispatch import multiply
from mbq.kernels.quantize import powers_of_two
from mbq.kernels.triton_bytes import place, program_tokens, taking
from mbq.kernels.triton_narrow import most_registers
from mbq.kernels.triton_prepare import PreparedBytes, prepare
from mbq.kernels.triton_tiles import REJOINING, Tile
from mbq.kernels.widths import WIDTHS
from tests.support.products import error_at_one_width, error_at_widths_of_their_own
from tests.support.ptx import emulate
from tests.support.weights import exponents, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


# Blocks left over for some warps, for none, and fewer of them than warps.
CASES = [
    (1, 70, 768, 128, Tile(16, 1, 2, 1)),
    (8, 130, 512, 64, Tile(32, 1, 2, 1)),
    (5, 40, 384, 32, Tile(32, 1, 4, 1)),
    (3, 10, 1280, 256, Tile(16, 1, 16, 1)),
    (2, 130, 800, 32, Tile(32, 1, 4, 1)),
    (2, 20, 1024, 64, Tile(16, 1, 2, 1)),
    (1, 20, 1024, 256, Tile(16, 1, 8, 1)),
    (1, 40, 512, 32, Tile(32, 1, 2, 1)),
    (4, 40, 768, 128, Tile(32, 1, 2, 1)),
]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("tokens", "rows", "inputs", "group_size", "tile"), CASES)
def test_equals_the_definition(
    bits: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    assert error_at_one_width(tokens, bits, True, rows, inputs, group_size, tile) < 1e-4


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(("tokens", "rows", "inputs", "group_size", "tile"), CASES[::3])
def test_equals_the_definition_where_only_the_device_knows_the_width(
    bits: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    assert error_at_one_width(tokens, bits, False, rows, inputs, group_size, tile) < 1e-4


@pytest.mark.parametrize(
    "widths", [(2, 8), (3, 2), (4, 3, 4, 2), (6, 2, 4, 3, 8), (2, 6, 2, 6, 3, 3, 4, 6), (4, 4, 4)]
)
@pytest.mark.parametrize(("inputs", "group_size"), [(768, 128), (384, 32), (512, 256)])
def test_tokens_at_widths_of_their_own(
    widths: tuple[int, ...], inputs: int, group_size: int
) -> None:
    assert error_at_widths_of_their_own(widths, inputs, group_size) < 1e-4


@pytest.mark.parametrize(
    ("max_bits", "widths"), [(4, (3, 4)), (4, (2, 4, 4, 3, 2)), (6, (6, 2, 3, 4))]
)
def test_fewer_stored_bits(max_bits: int, widths: tuple[int, ...]) -> None:
    assert error_at_widths_of_their_own(widths, 512, 128, max_bits) < 1e-4


@pytest.mark.parametrize("late", [0, 1])
def test_assembly_puts_two_words_of_the_second_slice_together(late: int) -> None:
    """Bits of one of the two int16 in a register never become the other's."""
    rng = np.random.default_rng(late)
    high, low = rng.integers(0, 2**32, (2, 4096), dtype=np.uint32)
    odd = np.full_like(high, 0xAAAAAAAA)
    operands = {"$1": high, "$2": low, "$3": np.full_like(high, late), "$4": odd}
    made = emulate(REJOINING.value, operands)["$0"].view(np.uint16)
    halves = high.view(np.uint16) << np.uint16(late), low.view(np.uint16) >> np.uint16(late)
    assert np.array_equal(made, halves[0] & np.uint16(0xAAAA) | halves[1] & np.uint16(0x5555))


@pytest.mark.parametrize(
    ("field", "selector", "j"),
    [(2, selector, j) for selector in (1, 2, 3) for j in range(4)] + [(4, 3, j) for j in range(4)],
)
def test_assembly_takes_codes_as_bytes(field: int, selector: int, j: int) -> None:
    """At positions j and j + 4 of two words, whatever is beside them; never a sign."""
    rng = np.random.default_rng(j)
    register = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    made = emulate(taking(j, field, selector), {"$1": register})["$0"].view(np.int8)
    # Fields of 4 bits are those of even or of odd positions.
    at = 4 * (j // 2) if field == 4 else 2 * j
    codes = register.view(np.uint8) >> np.uint8(at) & np.uint8(15 if field == 4 else selector)
    assert np.array_equal(made.astype(np.int64), codes.astype(np.int64) << 2 * place(j, field))


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e6])
def test_tokens_are_whole_numbers_of_16_bits(size: int) -> None:
    """To half of one, in every group; a group of zeros stays zero."""
    x, power_K = size * torch.randn(3, 512), powers_of_two(exponents(512))
    x[0, 5], x[1, 128:256] = 300 * size, 0.0
    # The largest mantissas.
    x[2, 130], x[2, 300] = 127.999 * size, -127.4 * size
    found = prepare(x, power_K, 8, 1, 128, 8)
    assert isinstance(found, PreparedBytes)
    # Columns: positions, of which each has high and low bytes of every token.
    bytes_B4T264 = found.x_BT864.reshape(2, 4, 4, 2, 64).double()
    number_BT4X = (256 * bytes_B4T264[:, :, :, 0] + bytes_B4T264[:, :, :, 1]).transpose(1, 2)
    # Bytes of two chunks take turns.
    number_TBC = number_BT4X.unflatten(-1, (32, 2)).transpose(-1, -2).reshape(2, 4, 8, 32)
    number_TC = number_TBC.transpose(0, 1).reshape(4, 16, 32)[:3]
    scale_TC, sum_TC = found.scale_sum_B8T2.double().flatten(0, 1)[:, :3].unbind(-1)
    scale_TC, sum_TC = scale_TC.T, sum_TC.T
    expected_TC = (x.double() * power_K).reshape(3, 16, 32)
    tops_TC = expected_TC.abs().reshape(3, 4, 128).amax(2).repeat_interleave(4, 1)
    assert number_TC.abs().max() <= 32639
    assert (scale_TC.log2() % 1 == 0).all()
    # As many bits as there are.
    assert ((scale_TC * 16000 <= tops_TC) | (tops_TC == 0)).all()
    off_TC = (number_TC * scale_TC[:, :, None] - expected_TC).abs().amax(2)
    assert (off_TC <= 0.5 * scale_TC).all()
    assert off_TC[1, 4:8].sum() == 0
    summed_TG = (number_TC * scale_TC[:, :, None]).reshape(3, 4, 128).sum(2)
    assert torch.allclose(sum_TC[:, ::4], summed_TG, rtol=1e-5, atol=1e-5 * size)
    assert (sum_TC.reshape(3, 4, 4)[:, :, 1:] == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(tokens: int, bits: int | None, value: float) -> None:
    weight, *_ = random_weight(16, 512, 128)
    x = torch.randn(tokens, 512).half()
    x[0, 200] = value
    widths = bits or torch.tensor([[8, 2, 4][:tokens]])
    prepared = prepare(x, weight.power_K, widths, 1, 128, 8)
    out = multiply(prepared, bits, weight, Tile(16, 1, 2, 1), torch.float32)
    assert not out[0, :16].isfinite().any()
    assert out[1:].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_the_largest_inputs_keep_their_sign() -> None:
    x = torch.full((1, 256), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    prepared = prepare(x, torch.ones(256), 8, 1, 128, 8)
    assert isinstance(prepared, PreparedBytes)
    # High bytes of a position, then low ones.
    assert (prepared.x_BT864.reshape(4, 2, 64)[:, 0] == 64).all()


def test_programs_take_powers_of_two() -> None:
    assert [program_tokens(n) for n in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_registers_of_one_token_leave_room_for_other_programs() -> None:
    cuts = (1, 8, 128), (1, 4, 256), (2, 8, 128), (1, 8, 64)
    limits = [most_registers(m, Tile(16, 1, warps, 1), group) for m, warps, group in cuts]
    assert limits == [128, 168, None, None]
