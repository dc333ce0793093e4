"""What others do with the same shapes: seconds of one product, weights rotating as for ours.

    cublas_16        torch.mm in bf16
    tinygemm_4       torch's int4 kernel, bf16 tokens, groups of 128
    gemlite_2 ...    where gemlite is installed, float16 tokens, groups of 128: at 4 bits shapes of
                     which it ships tunings for an H100, at 2 and 8 only the largest, since it then
                     tunes itself
    any_precision_3 ...  given CuPy and a cubin of its kernels (`any_precision.cu`); up to 8 float16
                     tokens, a table of 2^bits values for each row

Weights are random words in each peer's layout: their time is measured, not what they compute.

Legend: N out_features, K in_features, M tokens, B bits.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from weights import GROUP, ROTATED_BYTES

from mbq.kernels.timing import time_graph

_LARGE = (28672, 4096)
GEMLITE_SHAPES = {
    2: (_LARGE,),
    4: ((4096, 4096), (6144, 4096), (4096, 14336), _LARGE),
    8: (_LARGE,),
}
ANY_PRECISION_BITS = (3, 4, 6, 8)
ANY_PRECISION_TOKENS = (1, 4, 8)

Launch = Callable[[], Any]


def time_peers(n: int, k: int, m: int, any_precision: Path | None) -> dict[str, float]:
    """Seconds of each peer that serves the shape and is there, by its name and bits."""
    made: dict[str, Callable[[], tuple[Launch, int]]] = {
        "cublas_16": partial(cublas, n, k, m),
        "tinygemm_4": partial(tinygemm, n, k, m),
    }
    if importlib.util.find_spec("gemlite") is not None:
        for bits, shapes in GEMLITE_SHAPES.items():
            if (n, k) in shapes:
                made[f"gemlite_{bits}"] = partial(gemlite, n, k, m, bits)
    if any_precision is not None and m in ANY_PRECISION_TOKENS:
        for bits in ANY_PRECISION_BITS:
            made[f"any_precision_{bits}"] = partial(
                any_precision_product, any_precision, n, k, m, bits
            )
    seconds = {}
    for name, make in made.items():
        try:
            launch, turns = make()
            seconds[name] = time_graph(launch, max(turns, 24))[0]
        except Exception as error:  # a peer that fails must not cost the others their times
            click.echo(f"{name} at {n} x {k}, {m} tokens: {error}"[:200])
    return seconds


def cublas(n: int, k: int, m: int) -> tuple[Launch, int]:
    """A product in bf16, and how many weights take turns; so do the others below."""
    x_MK = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weights, count = rotated(
        lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), 2 * n * k
    )
    return lambda: torch.mm(x_MK, next(weights).T), count


def tinygemm(n: int, k: int, m: int) -> tuple[Launch, int]:
    """torch's int4 kernel."""
    x_MK = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    weights, count = rotated(lambda: torch._convert_weight_to_int4pack(codes, 8), n * k / 2)
    scale_zero: Tensor = torch.rand(k // GROUP, n, 2, device="cuda").bfloat16()
    return lambda: torch._weight_int4pack_mm(x_MK, next(weights), GROUP, scale_zero), count


def gemlite(n: int, k: int, m: int, bits: int) -> tuple[Launch, int]:
    """gemlite's linear, cut as it was tuned for an H100."""
    import gemlite as peer

    peer.load_config(str(Path(peer.__file__).parent / "configs" / "h100.json"))
    x_MK = torch.randn(m, k, device="cuda", dtype=torch.float16)

    def made() -> Any:
        linear = peer.GemLiteLinear(bits, GROUP, k, n, peer.DType.FP16, peer.DType.FP16)
        codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device="cuda")
        scale, zero = (torch.rand(n * k // GROUP, 1, device="cuda").half() for _ in range(2))
        linear.pack(codes, scale, zero, None)
        return linear

    linears, count = rotated(made, n * k * bits / 8)
    return lambda: next(linears)(x_MK), count


def any_precision_product(path: Path, n: int, k: int, m: int, bits: int) -> tuple[Launch, int]:
    """Any-Precision's kernel, launched as its own host code does."""
    import cupy

    # Its rules: how inputs are split, and that a warp takes four rows if there are more tokens.
    split = math.ceil(k / 4096) if m == 1 and k > 4096 and bits >= 7 else 1
    name = f"_Z14matmul_kbit_32ILi{m}ELi{bits}ELb{int(split > 1)}EEvPK6__halfPKjjjjS2_PS0_"
    kernel = _module(path).get_function(name)
    grid, block = (n // (4 if m == 1 else 16),), (32, 4, split)
    x_MK = torch.randn(m, k, device="cuda", dtype=torch.float16)
    out_MN = torch.empty(m, n, device="cuda", dtype=torch.float16)
    table = torch.randn(n, 2**bits, device="cuda", dtype=torch.float16)
    sizes = [cupy.uint32(size) for size in (m, n, k)]
    words, count = rotated(
        lambda: torch.randint(
            -(2**31), 2**31, (bits, n, k // 32), dtype=torch.int32, device="cuda"
        ),
        n * k * bits / 8,
    )

    def launch() -> None:
        arguments = (x_MK.data_ptr(), next(words).data_ptr(), *sizes, table.data_ptr())
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel(grid, block, (*arguments, out_MN.data_ptr()))

    return launch, count


def rotated(made: Callable[[], Any], size: float) -> tuple[Iterator[Any], int]:
    """As many weights of `size` bytes as it takes to leave the cache between two uses of one."""
    count = max(math.ceil(ROTATED_BYTES / size), 2)
    return itertools.cycle([made() for _ in range(count)]), count


@cache
def _module(path: Path) -> Any:
    import cupy

    return cupy.RawModule(path=str(path))
