"""The decode kernels in Triton's interpreter against float64, and their assembly in an emulator.

`conftest.py` sets TRITON_INTERPRET before anything imports Triton. What is not written stays NaN:
`new_empty` is poisoned.
"""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbq.kernels import triton_decode
from mbq.kernels.digits import Digits, pack_digits
from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    quantize,
    scale_and_zero,
    unpack_pair,
)
from mbq.kernels.reference import routed_linear
from mbq.kernels.triton_decode import Tile, multiply, prepare


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made: Tensor = new_empty(self, *args, **kwargs)  # type: ignore[arg-type]
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def _weight(
    rows: int, inputs: int, group_size: int, bias: float = 1.0
) -> tuple[Digits, Tensor, Tensor]:
    """Packed codes of a random weight; weights [S, N, K] and biases [S, N] by slice count."""
    weight_NK = torch.randn(rows, inputs) * torch.rand(rows, 1)
    scale, zero = scale_and_zero(*group_bounds(weight_NK, group_size))
    code = quantize(weight_NK, scale, zero)
    gain_bias = pack_pair(1 + torch.randn(4, rows) / 10, bias * torch.randn(4, rows))
    gain, bias_SN = unpack_pair(gain_bias)
    weight_SNK = torch.stack(
        [dequantize(code, scale, zero, k) * gain[k - 1][:, None] for k in range(1, 5)]
    )
    return pack_digits(code, pack_pair(scale, zero), gain_bias, 4), weight_SNK, bias_SN


def _error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("tokens", "rows", "inputs", "group_size", "tile"),
    [
        (1, 128, 256, 128, Tile(128, 1, 2, 3)),
        (3, 100, 384, 128, Tile(64, 2, 2, 3)),
        (17, 70, 768, 32, Tile(128, 3, 4, 3)),
    ],
)
def test_alike_tokens(
    slices: int, tokens: int, rows: int, inputs: int, group_size: int, tile: Tile
) -> None:
    torch.manual_seed(slices)
    weight, weight_SNK, bias_SN = _weight(rows, inputs, group_size)
    x = torch.randn(tokens, inputs).half()
    counts = torch.full((tokens,), slices, dtype=torch.int32)
    out = multiply(prepare(x, counts, group_size, None), weight, tile, torch.float32)
    assert _error(out, routed_linear(x, weight_SNK, bias_SN, counts)) < 1e-5


@pytest.mark.parametrize(
    ("counts", "group_size", "split"),
    [([1, 4, 2, 3, 1], 128, 1), ([2, 1, 1], 64, 2), ([4] * 3 + [1] * 40, 256, 2)],
)
def test_each_token_takes_its_own_slices(counts: list[int], group_size: int, split: int) -> None:
    torch.manual_seed(len(counts))
    weight, weight_SNK, bias_SN = _weight(130, 512, group_size)
    x = torch.randn(len(counts), 512).bfloat16()
    chosen = torch.tensor(counts, dtype=torch.int32)
    prepared = prepare(x, chosen, group_size, 4)
    assert int(prepared.most) == max(counts)
    out = multiply(prepared, weight, Tile(128, split, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_SNK, bias_SN, chosen)) < 1e-5


@pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e5])
def test_tokens_of_any_magnitude(magnitude: float) -> None:
    weight, weight_SNK, bias_SN = _weight(64, 256, 128, bias=0.0)
    x = (torch.randn(2, 256) * magnitude).bfloat16()
    x[0, 7] = 100 * magnitude
    counts = torch.tensor([4, 4], dtype=torch.int32)
    out = multiply(prepare(x, counts, 128, None), weight, Tile(128, 1, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_SNK, bias_SN, counts)) < 1e-4


def test_a_token_of_zeros_gives_the_bias() -> None:
    weight, _, bias_SN = _weight(64, 256, 128)
    counts = torch.tensor([2], dtype=torch.int32)
    prepared = prepare(torch.zeros(1, 256).half(), counts, 128, None)
    out = multiply(prepared, weight, Tile(128, 1, 2, 3), torch.float32)
    assert torch.equal(out[0], bias_SN[1])


def test_strided_tokens() -> None:
    weight, weight_SNK, bias_SN = _weight(64, 256, 128)
    x = torch.randn(256, 3).half().T
    counts = torch.tensor([1, 1, 1], dtype=torch.int32)
    out = multiply(prepare(x, counts, 128, None), weight, Tile(64, 1, 2, 3), torch.float32)
    assert _error(out, routed_linear(x, weight_SNK, bias_SN, counts)) < 1e-5


def test_too_many_tokens_and_tiles_that_do_not_fit() -> None:
    weight, _, _ = _weight(64, 256, 128)
    counts = torch.ones(65, dtype=torch.int32)
    with pytest.raises(ValueError, match="65 tokens: the decode kernel takes 1 to 64"):
        prepare(torch.zeros(65, 256).half(), counts, 128, None)
    prepared = prepare(torch.zeros(1, 256).half(), counts[:1], 128, None)
    with pytest.raises(ValueError, match="tiles of 256 rows do not divide 128"):
        multiply(prepared, weight, Tile(256, 1, 4, 3), torch.float16)


def _emulate(body: str, word: NDArray[np.uint32], mask: int, magic: int) -> NDArray[np.uint32]:
    """Run an assembly string on 32-bit registers: shl, shr and lop3 only."""
    registers: dict[str, NDArray[np.uint32]] = {
        "$1": word,
        "$2": np.full_like(word, mask * 0x10001),
        "$3": np.full_like(word, magic * 0x10001),
    }
    for statement in filter(None, (part.strip() for part in body.strip("{} ").split(";"))):
        if statement.startswith(".reg"):
            continue
        operation, rest = statement.split(None, 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        first = registers[operands[0]]
        if operation == "shl.b32":
            registers[target] = first << np.uint32(int(operands[1]))
        elif operation == "shr.u32":
            registers[target] = first >> np.uint32(int(operands[1]))
        else:
            assert operation == "lop3.b32"
            registers[target] = _lop3(*(registers[o] for o in operands[:3]), int(operands[3], 0))
    return registers["$0"]


def _lop3(
    a: NDArray[np.uint32], b: NDArray[np.uint32], c: NDArray[np.uint32], table: int
) -> NDArray[np.uint32]:
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            picked = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            out |= picked
    return out


@pytest.mark.parametrize("position", range(8))
def test_assembly_makes_digits(position: int) -> None:
    rng = np.random.default_rng(position)
    word = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    bit = triton_decode.DIGIT_BITS[position]
    body = triton_decode.assembly(position)
    made = _emulate(body, word, 3 << bit, (25 - bit) << 10).view(np.float16)
    digit = (word.view(np.uint16) >> np.uint16(2 * position)) & np.uint16(3)
    assert np.array_equal(made.astype(np.float64), 2.0 ** (10 - bit) + digit)
