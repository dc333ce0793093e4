"""Compiled kernels for up to 64 tokens, in an emulator of PTX, against float64.

Triton's interpreter runs what kernels say; this, what the compiler makes of it, inline assembly,
barriers, shared memory and what goes on in the background among it.
"""

import pytest
import torch

from mbq.kernels import triton_mixed, triton_narrow, triton_prepare, triton_uniform
from mbq.kernels.dispatch import multiply
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import powers_of_two
from mbq.kernels.reference import route
from mbq.kernels.router import Gates
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from tests.support.emulated import Compiler, Emulated
from tests.support.products import error_at_one_width, error_at_widths_of_their_own
from tests.support.routers import random_router
from tests.support.weights import exponents, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def _emulated(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, kernel in (
        (triton_narrow, "_narrow_kernel"),
        (triton_prepare, "_prepare_kernel"),
        (triton_uniform, "_uniform_kernel"),
        (triton_mixed, "_mixed_kernel"),
    ):
        monkeypatch.setattr(module, kernel, Emulated(compiler, module.__name__, kernel))


# Blocks left over for some warps, for none, and fewer of them than warps.
@pytest.mark.parametrize(
    ("tokens", "bits", "known", "rows", "inputs", "group_size", "tile"),
    [
        (1, 2, True, 70, 768, 128, Tile(16, 1, 2, 1)),
        (1, 8, True, 70, 1280, 128, Tile(16, 1, 8, 1)),
        (2, 3, True, 70, 768, 128, Tile(16, 1, 4, 1)),
        (3, 6, True, 40, 512, 256, Tile(32, 1, 4, 1)),
        (8, 4, True, 70, 800, 32, Tile(32, 1, 2, 1)),
        (5, 2, True, 40, 768, 64, Tile(16, 1, 2, 1)),
        (2, 3, False, 70, 768, 128, Tile(16, 1, 2, 1)),
        (4, 6, False, 70, 768, 128, Tile(16, 1, 2, 1)),
    ],
)
def test_equals_the_definition(
    tokens: int, bits: int, known: bool, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    assert error_at_one_width(tokens, bits, known, rows, inputs, group_size, tile) < 1e-4


@pytest.mark.parametrize("widths", [(6, 2), (6, 2, 4, 3, 8), (4, 4, 4)])
def test_tokens_at_widths_of_their_own(widths: tuple[int, ...]) -> None:
    assert error_at_widths_of_their_own(widths, 768, 128) < 1e-4


# Warps that multiply in groups, one and two of them, and single ones; fewer blocks than stages.
@pytest.mark.parametrize(
    ("tokens", "bits", "known", "inputs", "group_size", "tile"),
    [
        (12, 4, True, 512, 128, Tile(64, 1, 4, 3)),
        (20, 3, True, 768, 32, Tile(128, 2, 4, 3)),
        (40, 8, True, 1024, 256, Tile(128, 1, 8, 2)),
        (12, 2, True, 768, 128, Tile(64, 2, 2, 3)),
        (20, 6, False, 512, 64, Tile(64, 1, 4, 3)),
    ],
)
def test_more_tokens_at_one_width(
    tokens: int, bits: int, known: bool, inputs: int, group_size: int, tile: Tile
) -> None:
    assert error_at_one_width(tokens, bits, known, 70, inputs, group_size, tile) < 1e-5


@pytest.mark.parametrize(
    ("widths", "group_size", "tile"),
    [
        ([6, 3, 2] * 4, 128, Tile(64, 2, 4, 3)),
        ([2, 3] * 6, 32, Tile(64, 1, 2, 3)),
        ([8] * 3 + [3] * 40, 256, Tile(128, 2, 8, 3)),
    ],
)
def test_more_tokens_at_widths_of_their_own(widths: list[int], group_size: int, tile: Tile) -> None:
    assert error_at_widths_of_their_own(widths, 768, group_size, tile=tile) < 1e-5


@pytest.mark.parametrize("tokens", [2, 8])
def test_writes_bfloat16_as_it_writes_float32(tokens: int) -> None:
    weight, *_ = random_weight(40, 512, 128)
    x = torch.randn(tokens, 512).bfloat16()
    prepared = prepare(x, weight.power_K, 4, 1, 128, 8)
    narrow, wide = (
        multiply(prepared, 4, weight, Tile(16, 1, 2, 1), dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("tokens", [5, 17])
@pytest.mark.parametrize("log_threshold", [-1.0, 0.3])
def test_the_router_equals_its_definition(tokens: int, log_threshold: float) -> None:
    precision = Precision(8)
    precision.bits, precision.log_threshold = None, log_threshold
    gates = random_router(precision, 384, 2, 5, seed=2).on_device()
    assert isinstance(gates, Gates)
    x = (torch.randn(tokens, 384) * torch.rand(tokens, 1).exp()).half()
    tally = torch.zeros(2, 2, dtype=torch.int64)
    prepared = prepare(x, powers_of_two(exponents(384)), gates, 2, 32, 8, tally)
    expected = route(x, gates.trunk_HK.float(), gates.offset_H, gates.head_ELF, gates.threshold_EL)
    assert torch.equal(prepared.bits_LT[:, :tokens].long(), expected)
    assert tally.tolist() == [[tokens, tokens], expected.sum(1).tolist()]
