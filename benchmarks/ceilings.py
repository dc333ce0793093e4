"""What a GPU can do at best: bytes per second, bf16 operations per second, an empty kernel."""

import torch
import triton
import triton.language as tl

from mbq.kernels.timing import time_graph


@triton.jit
def _empty_kernel(x_ptr):
    tl.store(x_ptr, 1.0, mask=tl.program_id(0) < 0)


@triton.jit
def _read_kernel(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), dtype=tl.float32)
    start = tl.program_id(0) * SIZE
    for at in tl.range(start, count, tl.num_programs(0) * SIZE, num_stages=4):
        total += tl.load(x_ptr + at + tl.arange(0, SIZE))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def measure_ceilings() -> dict[str, float]:
    """Memory speed (the faster of copying and reading), bf16 product speed, an empty kernel."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    # Not `copy_`: in a graph that is a node of the copy engine, which is slower than kernels are.
    copied = time_graph(lambda: torch.neg(source, out=target), 8)[0]
    sums = torch.empty(132 * 8, device="cuda")
    read = time_graph(
        lambda: _read_kernel[(132 * 8,)](source, sums, source.numel(), SIZE=4096, num_warps=8), 8
    )[0]
    size = source.numel() * source.element_size()
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = time_graph(lambda: torch.mm(a, b), 8)[0]
    x = torch.zeros(1, device="cuda")
    empty = time_graph(lambda: _empty_kernel[(132,)](x), 200)[0]
    return {
        "bytes_per_second": max(2 * size / copied, size / read),
        "copied_bytes_per_second": 2 * size / copied,
        "read_bytes_per_second": size / read,
        "flop_per_second": 2 * 8192**3 / product,
        "empty_seconds": empty,
    }
