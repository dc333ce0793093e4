"""The emulator of PTX: what it computes, and what it must not let by."""

import numpy as np
import pytest
import torch

from tests.support.emulated import Compiler, Emulated
from tests.support.ptx_machine import run
from tests.support.ptx_text import Fault

TEXT = """
.version 8.7
.target sm_90a
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u32 kernel_param_1)
.reqntid 64
{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
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


def _run(code: str, count: int = 64, number: int = 7) -> list[int]:
    made = np.zeros(count, np.int32)
    run(TEXT.replace("CODE", code), 1, 64, [made, number], 256)
    return made.tolist()


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


def test_arguments_left_out_must_not_be_read() -> None:
    with pytest.raises(Fault, match="argument 1 was not given"):
        run(TEXT.replace("CODE", ""), 1, 64, [np.zeros(64, np.int32)], 0)
    with pytest.raises(Fault, match="compiled for 64 threads, run with 32"):
        run(TEXT.replace("CODE", ""), 1, 32, [np.zeros(64, np.int32), 1], 0)
