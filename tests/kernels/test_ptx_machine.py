"""The emulator of PTX: what it computes, and what it must not let by."""

import numpy as np
import pytest
import torch

from tests.support.emulated import Compiler, Emulated
from tests.support.ptx_async import row_addresses
from tests.support.ptx_machine import run
from tests.support.ptx_text import Fault

TEXT = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u32 kernel_param_1)
.reqntid THREADS
{
    .reg .pred %p<9>;
    .reg .b32 %r<19>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mov.b32 %r3, global_smem;
    mad.lo.s32 %r4, %r2, 4, %r3;
    mul.wide.u32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.lt.u32 %p1, %r2, 32;
CODE
    ret;
}
"""
# Each thread hands its number to the thread 32 before or after it.
MEETING = """
    st.shared.b32 [%r4], %r2;
    bar.sync 0;
    xor.b32 %r5, %r4, 128;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd3 + 0], { %r6 };
"""


# The same by way of global memory, copied to shared memory in the background.
COPYING = """
    st.global.b32 [%rd3], %r2;
    cp.async.ca.shared.global [%r4], [%rd3], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r5, %r4, 128;
    ld.shared.b32 %r6, [%r5];
    st.global.b32 [%rd3], %r6;
"""
# Factors are whole numbers, as bits of float16: 2^-24 of each. The second has 8 columns of 32
# bytes, whose halves change places in the last four.
MULTIPLYING = """
    and.b32 %r5, %r4, 128;
    shr.u32 %r5, %r5, 3;
    xor.b32 %r5, %r4, %r5;
    setp.lt.u32 %p2, %r2, 64;
    @%p2 st.shared.b32 [%r5], %r2;
    bar.sync 0;
    add.s32 %r5, %r2, 128;
    add.s32 %r6, %r2, 256;
    add.s32 %r7, %r2, 384;
    shr.u32 %r9, %r3, 4;
    cvt.u64.u32 %rd4, %r9;
    or.b64 %rd4, %rd4, 0xC000000000000000;
    mov.pred %p3, 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16
        {%r11, %r12, %r13, %r14}, {%r2, %r5, %r6, %r7}, %rd4, %p3, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mul.f32 %r11, %r11, 0f57800000;
    mul.f32 %r12, %r12, 0f57800000;
    mul.f32 %r13, %r13, 0f57800000;
    mul.f32 %r14, %r14, 0f57800000;
    cvt.rzi.s32.f32 %r11, %r11;
    cvt.rzi.s32.f32 %r12, %r12;
    cvt.rzi.s32.f32 %r13, %r13;
    cvt.rzi.s32.f32 %r14, %r14;
    mul.wide.u32 %rd5, %r2, 16;
    add.s64 %rd5, %rd1, %rd5;
    st.global.v4.b32 [%rd5], {%r11, %r12, %r13, %r14};
"""


def _run(
    code: str, count: int = 64, number: int = 7, threads: int = 64, grid: tuple[int, ...] = (1,)
) -> list[int]:
    made = np.zeros(count, np.int32)
    run(_text(code, threads), grid, threads, [made, number], 4 * threads)
    return made.tolist()


def _text(code: str, threads: int = 64) -> str:
    return TEXT.replace("CODE", code).replace("THREADS", str(threads))


@pytest.mark.parametrize(("m", "n", "k", "warps"), [(16, 8, 32, 1), (32, 32, 128, 4)])
def test_multiplies_matrices(compiler: Compiler, m: int, n: int, k: int, warps: int) -> None:
    kernel = Emulated(compiler, "tests.support.product_kernel", "product_kernel")
    a, b = torch.randint(-128, 128, (m, k)), torch.randint(-128, 128, (k, n))
    c = torch.randint(-999, 999, (m, n))
    whole, halves = c.int(), c.float()
    kernel[(1,)](a.to(torch.int8), b.to(torch.int8), whole, M=m, N=n, K=k, num_warps=warps)
    kernel[(1,)](a.half(), b.half(), halves, M=m, N=n, K=k, num_warps=warps)
    # Exact in float32, too.
    assert torch.equal(whole.long(), c + a @ b)
    assert torch.equal(halves.long(), c + a @ b)


def test_warps_meet_at_barriers() -> None:
    assert _run(MEETING) == [*range(32, 64), *range(32)]


def test_warps_part_and_lanes_take_guards() -> None:
    code = """
    mov.b32 %r6, 1;
    @!%p1 bra $L2;
    bfe.u32 %r7, %r2, 0, 1;
    setp.eq.b32 %p2, %r7, 0;
    @%p2 mov.b32 %r6, %r1;
$L2:
    { .reg .b32 t; shl.b32 t, %r6, 1; st.global.b32 [%rd3 + 0], { t }; }
    """
    assert _run(code) == [14, 2] * 16 + [2] * 32


def test_programs_know_their_places() -> None:
    code = """
    mov.u32 %r5, %ctaid.y;
    mov.u32 %r6, %ctaid.z;
    mov.u32 %r7, %nctaid.y;
    mad.lo.s32 %r7, %r6, %r7, %r5;
    mul.wide.u32 %rd4, %r7, 4;
    add.s64 %rd4, %rd1, %rd4;
    shl.b32 %r6, %r6, 4;
    or.b32 %r6, %r6, %r5;
    st.global.b32 [%rd4], %r6;
    """
    assert _run(code, count=7, grid=(1, 3, 2)) == [0, 1, 2, 16, 17, 18, 0]


def test_divides_towards_zero() -> None:
    code = """
    sub.s32 %r5, %r2, 2;
    div.s32 %r6, %r5, 2;
    rem.s32 %r7, %r5, 2;
    shl.b32 %r6, %r6, 8;
    add.s32 %r6, %r6, %r7;
    st.global.b32 [%rd3], %r6;
    """
    assert _run(code)[:6] == [-256, -1, 0, 1, 256, 257]


def test_copies_in_the_background() -> None:
    assert _run(COPYING) == [*range(32, 64), *range(32)]
    some = COPYING.replace("cp.", "selp.b32 %r5, 4, 0, %p1;\ncp.", 1).replace(", 4;", ", 4, %r5;")
    assert _run(some) == [0] * 32 + [*range(32)]


def test_warps_multiply_together() -> None:
    thread = np.arange(128)
    row, pair = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    left, right = np.zeros((64, 16), int), np.zeros((16, 8), int)
    for i in range(4):
        left[row + i % 2 * 8, pair + i // 2 * 8] = thread + 128 * i
    right[2 * (np.arange(64) % 8), np.arange(64) // 8] = np.arange(64)
    expected = np.stack([(left @ right)[row + i // 2 * 8, pair + i % 2] for i in range(4)], axis=1)
    assert _run(MULTIPLYING, count=512, threads=128) == expected.reshape(-1).tolist()
    # Twice, the second time on top.
    product, adding = MULTIPLYING.split("wgmma.commit")[0].split("wgmma.mma")[1], "mov.pred %p3, 1;"
    twice = MULTIPLYING.replace("wgmma.commit", f"{adding}\nwgmma.mma{product}\nwgmma.commit")
    assert _run(twice, count=512, threads=128) == (2 * expected).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("mode", "width", "column", "chunks"),
    [
        (1, 128, 9, (2 ^ 1, 3 ^ 1)),
        (1, 128, 15, (2 ^ 7, 3 ^ 7)),
        (2, 64, 9, (2, 3)),
        (2, 64, 15, (2 ^ 3, 3 ^ 3)),
        (3, 32, 9, (0, 1)),
        (3, 32, 15, (1, 0)),
    ],
)
def test_rows_of_matrices_are_swizzled(
    mode: int, width: int, column: int, chunks: tuple[int, int]
) -> None:
    """Inputs 16 and on of a matrix, or all of them where it has no more."""
    start, stride = 2048 + (32 if width > 32 else 0), 4096
    found = row_addresses(mode << 62 | stride >> 4 << 32 | start >> 4, 16)
    assert found[0].tolist() == [start, start + 16]
    row = 2048 + stride + (column - 8) * width
    assert found[column].tolist() == [row + 16 * chunk for chunk in chunks]


def test_nobody_reads_zeros_that_nobody_wrote() -> None:
    assert _run("st.global.b32 [%rd3], %r8;") == [-1] * 64
    assert _run("ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd3], %r5;") == [-1] * 64


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (MEETING.replace("bar.sync 0;", ""), "raced for by two warps"),
        # A warp may be done before another reads what it overwrites.
        (MEETING + "st.shared.b32 [%r4], %r6;", "raced for by two warps"),
        ("ld.global.b32 %r5, [%rd3 + 4];", "4 bytes at byte 256 of argument 0, which has 256"),
        ("ld.global.b32 %r5, [%rd3 + -4];", "0xfffffffc is in no array"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd3];", "not aligned to 8 bytes"),
        ("ld.global.b32 %r5, [%rd8];", "not aligned"),
        ("st.shared.b32 [%r4 + 4], %r2;", "4 bytes at byte 256 of shared memory"),
        ("setp.lt.u32 %p2, %r2, 9;\n@%p2 bra $L2;\n$L2:", "lanes of a warp part"),
        ("@%p1 ret;\nbar.sync 0;", "waits at a barrier for one that has ended"),
        ("@%p1 shfl.sync.bfly.b32 %r5, %r2, 1, 31, -1;", "of whole warps under a guard"),
        ("sin.approx.f32 %r5, %r2;", "an unknown instruction: sin.approx.f32"),
        ("add.s32 %r5, %r2, %r99;", "an unknown operand: %r99"),
        ("add.s64 %rd5, %r2, 1;", "%r2 is no s64"),
    ],
)
def test_ends_with_a_reason(code: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        _run(code)


@pytest.mark.parametrize(
    ("instead_of", "code", "reason"),
    [
        ("cp.async.wait_group 0;", "", "has a copy on its way"),
        ("cp.async.wait_group 0;", "cp.async.wait_group 1;", "has a copy on its way"),
        ("cp.async.commit_group;", "", "has a copy on its way"),
        ("cp.async.commit_group;", "st.shared.b32 [%r4], %r2;", "has a copy on its way"),
        ("bar.sync 0;", "", "raced for by two warps"),
        ("cp.", "xor.b32 %r5, %r4, 128; ld.shared.b32 %r5, [%r5]; cp.", "raced for by two warps"),
        (".ca.", ".cg.", "copies of 4 bytes"),
        ("], 4;", "], 4, 2;", "a copy that is zero in part"),
    ],
)
def test_copies_are_waited_for(instead_of: str, code: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        _run(COPYING.replace(instead_of, code, 1))


@pytest.mark.parametrize(
    ("instead_of", "code", "reason"),
    [
        ("wgmma.wait_group.sync.aligned 0;", "", "%r11 is in a product on its way"),
        ("wgmma.commit_group.sync.aligned;", "", "%r11 is in a product on its way"),
        ("wgmma.commit", "add.s32 %r7, %r1, 1; wgmma.commit", "%r7 is in a product on its way"),
        ("wgmma.commit", "st.shared.b32 [%r4], %r1; wgmma.commit", "byte 0 .* is in a product"),
        ("wgmma.fence.sync.aligned;", "", "was touched with no fence before a product"),
        ("fence.proxy.async.shared::cta;", "", "byte 0 .* was written with no fence for products"),
        ("bar.sync 0;", "", "raced for by two warps"),
        ("wgmma.fence", "@%p1 bra $L2;\nwgmma.fence", r"\[1, 2, 3\] are no whole groups"),
        (", %p3, 1, 1, 0", ", %p3, 1, 1, 1", "whose columns lie side by side"),
        (", %p3, 1", ", %p1, 1", "lanes of a group differ"),
        ("0xC000000000000000", "0x0000000000000000", "an unknown descriptor"),
        ("%r3, 4;", "%r4, 4;", "lanes of a group differ"),
        ("0xC000000000000000", "0xC000000000000002", "not in the first of 8 rows of 32 bytes"),
    ],
)
def test_products_are_waited_for(instead_of: str, code: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        _run(MULTIPLYING.replace(instead_of, code, 1) + "$L2:", count=512, threads=128)


def test_arguments_left_out_must_not_be_read() -> None:
    with pytest.raises(Fault, match="argument 1 was not given"):
        run(_text(""), (1,), 64, [np.zeros(64, np.int32)], 0)
    with pytest.raises(Fault, match="compiled for 64 threads, run with 32"):
        run(_text(""), (1,), 32, [np.zeros(64, np.int32), 1], 0)
