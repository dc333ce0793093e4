"""What products of few tokens ask the L2 cache for."""

import pytest
import torch
import triton
import triton.language as tl

from mbq.kernels.triton_words import later_scales, later_words


@triton.jit
def _later_kernel(
    words_ptr, scales_ptr, rows, blocks, WARPS: tl.constexpr, PLANE: tl.constexpr,
    PLANES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    thread = tl.arange(0, 32 * WARPS)
    at, exists = later_words(rows, blocks, WARPS, PLANE, PLANES)
    tl.store(words_ptr + thread, tl.where(exists, at, -1))
    at, exists = later_scales(rows, blocks, WARPS, GROUPS)
    tl.store(scales_ptr + thread, tl.where(exists, at, -1))


@pytest.mark.parametrize("blocks", [3, 8, 16, 43])
@pytest.mark.parametrize(("warps", "plane", "planes"), [(2, 0, 2), (8, 2, 1), (4, 2, 2), (8, 2, 6)])
def test_what_the_cache_is_asked_for_is_each_warp_s_own(
    blocks: int, warps: int, plane: int, planes: int
) -> None:
    """Every later block of a warp, as many as it has lanes for; never one that is not there."""
    rows, groups = 80, 2
    words, scales = torch.zeros(2, 32 * warps, dtype=torch.int64)
    _later_kernel[(1,)](words, scales, rows, blocks, warps, plane, planes, groups)
    plane_at = torch.arange(plane + planes)[:, None] * blocks
    word_PB = (plane_at + torch.arange(blocks)) * rows * 8
    scale_GB = (torch.arange(blocks) * groups + torch.arange(groups)[:, None]) * rows
    for warp in range(warps):
        mine = range(warp + warps, blocks, warps)
        for found, at in ((words, word_PB[plane:]), (scales, scale_GB)):
            wanted = at[:, mine[: 32 // len(at)]].T.flatten().tolist()
            more = [at[i, b].item() for b in mine[32 // len(at) :][:1] for i in range(32 % len(at))]
            asked = found.view(warps, 32)[warp].tolist()
            assert asked == (wanted + more + [-1] * 32)[:32]
