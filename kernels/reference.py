"""What the fast code is judged by: short, literal definitions in plain torch.

`slice_recursively` is MoBiSlice as the paper writes it (arXiv 2602.20191, section 4.1 and
appendix B): a 2-bit base slice, then 2-bit slices of the residual, each with a quarter of the scale
before it. `round_to_nearest` is the baseline every report compares with.

Legend: N out_features, K in_features, G groups, S slices.
"""

import torch
from torch import Tensor

from mbq.kernels.quantize import MAX_SLICES


def slice_recursively(
    weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor
) -> tuple[Tensor, Tensor]:
    """Quantize the weight, then its residual, then the residual of that.

    Returns:
        digits: uint8 [S, N, K], each 0..3, most significant first.
        weights: float64 [S, N, K]; entry k-1 is the sum of the first k slices.
    """
    group_size = weight_NK.shape[1] // scale_NG.shape[1]
    weight = weight_NK.double()
    scale = scale_NG.double().repeat_interleave(group_size, dim=1)
    zero = zero_NG.double().repeat_interleave(group_size, dim=1)

    digit = (weight / scale + zero).floor().clamp(0, 3)
    approximation = scale * (digit - zero + 0.5)
    digits, weights = [digit], [approximation]
    for _ in range(1, MAX_SLICES):
        scale = scale / 4
        residual = weight - approximation
        digit = (residual / scale + 2).floor().clamp(0, 3)
        approximation = approximation + scale * (digit - 2 + 0.5)
        digits.append(digit)
        weights.append(approximation)
    return torch.stack(digits).to(torch.uint8), torch.stack(weights)


def round_to_nearest(weight_NK: Tensor, bits: int, group_size: int) -> Tensor:
    """Asymmetric round-to-nearest at one static width: the dequantized weight, float32 [N, K]."""
    weight_NGg = weight_NK.float().unflatten(1, (-1, group_size))
    low = weight_NGg.amin(2, keepdim=True).clamp(max=0.0)
    high = weight_NGg.amax(2, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-low / scale).round()
    code = (weight_NGg / scale + zero).round().clamp(0, 2**bits - 1)
    rounded_NK: Tensor = ((code - zero) * scale).flatten(1)
    return rounded_NK
