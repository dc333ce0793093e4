"""Few tokens in Triton's interpreter against float64."""

import numpy as np
import pytest
import torch

from mbq.kernels.digits import join_digits
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_columns import MASKING, SCALING, SHIFTING, plain_bit, two_halves
from mbq.kernels.triton_narrow import most_registers, multiply_narrow, program_tokens
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import REJOINING, Tile
from mbq.kernels.widths import WIDTHS
from tests.support.ptx import emulate
from tests.support.weights import error, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


# Blocks left over for some warps, for none, and fewer of them than warps.
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs", "group_size", "tile"),
    [
        (1, 70, 768, 128, Tile(16, 1, 2, 1)),
        (8, 130, 512, 64, Tile(32, 1, 2, 1)),
        (5, 40, 384, 32, Tile(32, 1, 4, 1)),
        (3, 10, 1280, 256, Tile(16, 1, 16, 1)),
        (2, 130, 800, 32, Tile(32, 1, 4, 1)),
        (4, 40, 768, 128, Tile(32, 1, 2, 1)),
        (1, 40, 512, 32, Tile(32, 1, 2, 1)),
        (1, 20, 1024, 256, Tile(16, 1, 8, 1)),
    ],
)
def test_equals_the_definition(
    known: bool, bits: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    torch.manual_seed(bits)
    made = [random_weight(rows + more, inputs, group_size) for more in (0, 90)]
    x = torch.randn(tokens, inputs).bfloat16()
    joined = join_digits([weight for weight, *_ in made])
    widths = bits if known else torch.full((2, 1), bits)
    prepared = prepare(x, joined.power_K, widths, 2, group_size, 8)
    out_TN = multiply_narrow(prepared, bits if known else None, joined, tile, torch.float32)
    for out, (_, weight_WNK, bias_WN) in zip(joined.sides(out_TN), made, strict=True):
        expected = routed_linear(x, weight_WNK, bias_WN, torch.full((tokens,), bits))
        assert out.shape == expected.shape
        assert error(out, expected) < 1e-5


@pytest.mark.parametrize(
    "widths", [(2, 8), (3, 2), (4, 3, 4, 2), (6, 2, 4, 3, 8), (2, 6, 2, 6, 3, 3, 4, 6), (4, 4, 4)]
)
@pytest.mark.parametrize(("inputs", "group_size"), [(768, 128), (384, 32), (512, 256)])
def test_tokens_at_widths_of_their_own(
    widths: tuple[int, ...], inputs: int, group_size: int
) -> None:
    weight, weight_WNK, bias_WN = random_weight(70, inputs, group_size)
    x = torch.randn(len(widths), inputs).bfloat16()
    bits_T = torch.tensor(widths)
    prepared = prepare(x, weight.power_K, bits_T[None], 1, group_size, 8)
    (out,) = weight.sides(multiply_narrow(prepared, None, weight, Tile(16, 1, 4, 1), torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 2e-5


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


@pytest.mark.parametrize("p", range(8))
def test_assembly_makes_plain_digits(p: int) -> None:
    """Each of a word's, wherever the other word of a register has ones."""
    rng = np.random.default_rng(p)
    words = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    mask = np.full_like(words, (3 << plain_bit(p)) * 0x10001)
    assembly = (MASKING if p < 5 else SHIFTING).value
    made = emulate(assembly, {"$1": words, "$2": mask})["$0"].view(np.float16)
    digits = words.view(np.uint16) >> np.uint16(2 * p) & np.uint16(3)
    assert np.array_equal(made.astype(np.float64), digits * 2.0 ** (plain_bit(p) - 24))


@pytest.mark.parametrize("exponent", [0, -2, -8])
def test_assembly_divides_two_inputs(exponent: int) -> None:
    """Exactly, or as near as halves below the smallest normal one are."""
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float16) * np.float16(900)
    factor = np.full(2048, two_halves(exponent), np.uint32)
    made = emulate(SCALING.value, {"$1": x.view(np.uint32), "$2": factor})["$0"].view(np.float16)
    assert np.abs(made.astype(np.float64) - x.astype(np.float64) * 2.0**exponent).max() <= 2.0**-25


def test_programs_take_powers_of_two() -> None:
    assert [program_tokens(n, mixed=False) for n in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert program_tokens(2, mixed=True) == 8


def test_registers_are_limited_where_two_programs_fit() -> None:
    cuts = (1, 16, 8, 128), (2, 16, 8, 128), (1, 32, 8, 128), (1, 16, 4, 128), (1, 16, 8, 64)
    limits = [most_registers(m, Tile(rows, 1, warps, 1), group) for m, rows, warps, group in cuts]
    assert limits == [128, None, None, None, None]
