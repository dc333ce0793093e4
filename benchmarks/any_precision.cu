// The kernels of Any-Precision that `kernel_peers.py` launches, from a checkout of SNU-ARC/any-precision-llm:
//
//     nvcc -std=c++17 -arch=sm_90 -cubin -I CHECKOUT/any_precision/modules/kernels -o any_precision.cubin any_precision.cu

#include "matmul.cuh"

#define KERNEL(tokens, bits, split)                              \
  template __global__ void matmul_kbit_32<tokens, bits, split>(  \
      const __half *, const uint32_t *, uint32_t, uint32_t, uint32_t, const __half *, __half *);
#define WIDTHS(tokens) \
  KERNEL(tokens, 3, false) KERNEL(tokens, 4, false) KERNEL(tokens, 6, false) KERNEL(tokens, 8, false)

WIDTHS(1) WIDTHS(4) WIDTHS(8)
KERNEL(1, 8, true)
