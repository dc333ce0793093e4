"""Shapes of LLaMA models' linears, and random weights of them that no cache holds.

q, k and v are one product, and so are gate and up, as linears that share an input are.
"""

import itertools
import math

import torch

from mbq.kernels.digits import BLOCK_INPUTS, Digits
from mbq.kernels.quantize import pack_pair
from mbq.kernels.timing import time_graph
from mbq.kernels.triton_decode import multiply
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
    shape = (MAX_SLICES, k // BLOCK_INPUTS, n, 32)
    groups = k // GROUP
    scale = 0.5 + torch.rand(groups, n, device="cuda")
    zero = 1.5 + torch.rand(groups, n, device="cuda")
    gain = 0.9 + 0.2 * torch.rand(len(WIDTHS), n, device="cuda")
    return Digits(
        torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device="cuda"),
        pack_pair(scale, zero),
        pack_pair(gain, torch.randn_like(gain)),
        (n,),
        k,
        GROUP,
    )


def rotation(n: int, k: int, bits: int) -> list[Digits]:
    """As many weights as it takes to leave the cache between two uses of one."""
    return [random_digits(n, k) for _ in range(math.ceil(ROTATED_BYTES / (n * k * bits / 8)) + 1)]


def decode_times(
    weights: list[Digits], prepared: Prepared, tile: Tile, replays: int = 15
) -> tuple[float, float]:
    """Seconds of one multiplication, weights rotating."""
    turn = itertools.cycle(weights)
    launches = max(len(weights), 24)
    return time_graph(
        lambda: multiply(prepared, next(turn), tile, torch.bfloat16), launches, replays
    )


def tokens_at(m: int, k: int, bits: int) -> Prepared:
    """Random tokens that all have the same width."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return prepare(x, bits, 1, GROUP, CODE_BITS)
