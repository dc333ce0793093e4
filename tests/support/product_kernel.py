"""A kernel that multiplies two matrices, to try the emulator of PTX on."""

import triton
import triton.language as tl


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A [M, K] times B [K, N], and C [M, N] before it: float16 to float32, or int8 to int32."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + m * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n)
    at = out_ptr + m * N + n
    tl.store(at, tl.dot(a, b, tl.load(at), out_dtype=out_ptr.dtype.element_ty))
