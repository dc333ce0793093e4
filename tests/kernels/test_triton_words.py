"""What products of few tokens ask the L2 cache for."""

import pytest
import torch
import triton
import triton.language as tl

from mbq.kernels.triton_words import later_scales, later_words, pieces


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


@triton.jit
def _pieces_kernel(at_ptr, size_ptr, size, stride, PARTS: tl.constexpr, WARPS: tl.constexpr):
    lane = tl.program_id(0) * 32 * WARPS + tl.arange(0, 32 * WARPS)
    at, sizes = pieces(size, stride, PARTS, WARPS)
    tl.store(at_ptr + lane, at)
    tl.store(size_ptr + lane, sizes)


@pytest.mark.parametrize("size", [0, 16, 480, 7 * 4096, 100_000 * 16, 1 << 25])
@pytest.mark.parametrize(("programs", "warps", "parts"), [(1, 2, 1), (5, 8, 2), (24, 4, 8)])
def test_programs_share_what_comes_next(size: int, programs: int, warps: int, parts: int) -> None:
    """Every byte of every part once, none of another, in pieces that the instruction can count."""
    stride = 1 << 28
    at, sizes = torch.zeros(2, programs * warps * 32, dtype=torch.int64)
    _pieces_kernel[(programs,)](at, sizes, size, stride, parts, warps)
    most = 2**20 - 16
    assert not sizes.view(-1, 32)[:, parts:].any()
    for part in range(parts):
        end = part * stride
        starts, lengths = at[part::32].tolist(), sizes[part::32].tolist()
        for start, length in zip(starts, lengths, strict=True):
            assert length % 16 == 0 and length <= most
            assert length == 0 or start == end
            end += length
        assert end == part * stride + min(size, programs * warps * most)
