"""Shapes of LLaMA models' linears, and random weights of them that no cache holds.

q, k and v are one product, and so are gate and up, as linears that share an input are.
"""

import itertools
import math
from collections.abc import Iterator
from functools import cache

import torch

from mbq.kernels import dispatch
from mbq.kernels.digits import BLOCK_INPUTS, Digits
from mbq.kernels.quantize import pack_pair
from mbq.kernels.timing import time_graph
from mbq.kernels.triton_prepare import Prepared, prepare
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.widths import CODE_BITS, MAX_SLICES, WIDTHS

SHAPES = {
    "llama2-7b": {
        "qkv": (12288, 4096),
        "o": (4096, 4096),
        "gate_up": (22016, 4096),
        "down": (4096, 11008),
    },
    "llama2-13b": {
        "qkv": (15360, 5120),
        "o": (5120, 5120),
        "gate_up": (27648, 5120),
        "down": (5120, 13824),
    },
    "llama3-8b": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
    },
}
BLOCKS = {"llama2-7b": 32, "llama2-13b": 40, "llama3-8b": 32}
GROUP = 128
# More than any L2 holds, several times.
ROTATED_BYTES = 240e6


def random_digits(n: int, k: int) -> Digits:
    """Random codes, scales near 1 and zeros near the middle, made in the layout itself."""
    shape = (MAX_SLICES, 2, k // BLOCK_INPUTS, n, 16)
    groups = k // GROUP
    scale = 0.5 + torch.rand(groups, n, device="cuda")
    zero = 1.5 + torch.rand(groups, n, device="cuda")
    gain = 0.9 + 0.2 * torch.rand(len(WIDTHS), n, device="cuda")
    return Digits(
        torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda"),
        pack_pair(scale, zero),
        pack_pair(gain, torch.randn_like(gain)),
        random_powers(k),
        (n,),
        k,
        GROUP,
    )


@cache
def random_powers(k: int) -> torch.Tensor:
    """Of columns; the same for all weights, as linears that share an input have them."""
    return 2.0 ** torch.randint(-3, 4, (k,), device="cuda")


def rotation(n: int, k: int, bits: int) -> list[Digits]:
    """As many weights as it takes to leave the cache between two uses of one."""
    return [random_digits(n, k) for _ in range(math.ceil(ROTATED_BYTES / (n * k * bits / 8)) + 1)]


def model_in_turn(model: str, bits: int) -> tuple[Iterator[Digits], int]:
    """Weights of a model's blocks, over and over, and of how many: they leave the cache."""
    shapes = list(SHAPES[model].values())
    count = math.ceil(ROTATED_BYTES / (sum(n * k for n, k in shapes) * bits / 8)) + 1
    return itertools.cycle([random_digits(n, k) for _ in range(count) for n, k in shapes]), count


def tile_for(n: int, k: int, m: int, bits: int | None, mixed: bool = False) -> Tile:
    """How the product of a shape is cut here; `bits` None where only the device knows."""
    return dispatch.tile(n, k, GROUP, m, torch.device("cuda"), dispatch.kind_of(mixed, bits))


def multiply(prepared: Prepared, bits: int | None, weight: Digits, tile: Tile) -> torch.Tensor:
    """Tokens times one weight, by the kernel that serves them."""
    return dispatch.multiply(prepared, bits, weight, tile, torch.bfloat16)


def decode_times(
    weights: list[Digits], prepared: Prepared, bits: int | None, tile: Tile, replays: int = 15
) -> tuple[float, float]:
    """Seconds of one multiplication, weights rotating."""
    turn = itertools.cycle(weights)
    launches = max(len(weights), 24)
    return time_graph(lambda: multiply(prepared, bits, next(turn), tile), launches, replays)


def tokens_at(m: int, k: int, bits: int) -> Prepared:
    """Random tokens that all have the same width."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return prepare(x, random_powers(k), bits, 1, GROUP, CODE_BITS)


def hungry_tokens(m: int, k: int, bits: int, hungry: int) -> Prepared:
    """Random tokens of one width, but for the first ones, which have 8 bits."""
    bits_1T = torch.full((1, m), bits, device="cuda")
    bits_1T[:, :hungry] = CODE_BITS
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return prepare(x, random_powers(k), bits_1T, 1, GROUP, CODE_BITS)
