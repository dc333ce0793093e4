"""Compiled kernels for few tokens, in an emulator of PTX, against float64.

Triton's interpreter runs what kernels say; this, what the compiler makes of it, inline assembly,
barriers and shared memory among it.
"""

from collections.abc import Iterator

import pytest
import torch

from mbq.kernels import triton_narrow, triton_prepare
from mbq.kernels.digits import join_digits
from mbq.kernels.dispatch import multiply
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import powers_of_two
from mbq.kernels.reference import route, routed_linear
from mbq.kernels.router import Gates
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.triton_tiles import Tile
from tests.support.emulated import Compiler, Emulated
from tests.support.routers import random_router
from tests.support.weights import error, exponents, random_weight

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    with Compiler() as compiler:
        yield compiler


@pytest.fixture(autouse=True)
def _emulated(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, kernel in (
        (triton_narrow, "_narrow_kernel"),
        (triton_prepare, "_prepare_kernel"),
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
        (4, 6, False, 70, 768, 128, Tile(16, 1, 2, 1)),
    ],
)
def test_equals_the_definition(
    tokens: int, bits: int, known: bool, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    made = [random_weight(rows + more, inputs, group_size) for more in (0, 10)]
    x = torch.randn(tokens, inputs).bfloat16()
    joined = join_digits([weight for weight, *_ in made])
    widths = bits if known else torch.full((2, 1), bits)
    prepared = prepare(x, joined.power_K, widths, 2, group_size, 8)
    out_TN = multiply(prepared, bits if known else None, joined, tile, torch.float32)
    for out, (_, weight_WNK, bias_WN) in zip(joined.sides(out_TN), made, strict=True):
        expected = routed_linear(x, weight_WNK, bias_WN, torch.full((tokens,), bits))
        assert error(out, expected) < 1e-4


@pytest.mark.parametrize("widths", [(6, 2, 4, 3, 8), (4, 4, 4)])
def test_tokens_at_widths_of_their_own(widths: tuple[int, ...]) -> None:
    weight, weight_WNK, bias_WN = random_weight(70, 768, 128)
    x = torch.randn(len(widths), 768).bfloat16()
    bits_T = torch.tensor(widths)
    prepared = prepare(x, weight.power_K, bits_T[None], 1, 128, 8)
    (out,) = weight.sides(multiply(prepared, None, weight, Tile(16, 1, 4, 1), torch.float32))
    assert error(out, routed_linear(x, weight_WNK, bias_WN, bits_T)) < 1e-4


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


@pytest.mark.parametrize("log_threshold", [-1.0, 0.3])
def test_the_router_equals_its_definition(log_threshold: float) -> None:
    precision = Precision(8)
    precision.bits, precision.log_threshold = None, log_threshold
    gates = random_router(precision, 384, 2, 5, seed=2).on_device()
    assert isinstance(gates, Gates)
    x = (torch.randn(5, 384) * torch.rand(5, 1).exp()).half()
    tally = torch.zeros(2, 2, dtype=torch.int64)
    prepared = prepare(x, powers_of_two(exponents(384)), gates, 2, 32, 8, tally)
    expected = route(x, gates.trunk_HK.float(), gates.offset_H, gates.head_ELF, gates.threshold_EL)
    assert torch.equal(prepared.bits_LT[:, :5].long(), expected)
    assert tally.tolist() == [[5, 5], expected.sum(1).tolist()]
