"""What the fast code is judged by: short, literal definitions in plain torch.

`slice_recursively` is MoBiSlice as the paper writes it (arXiv 2602.20191, section 4.1 and
appendix B): a 2-bit base slice, then 2-bit slices of the residual, each with a quarter of the scale
before it. `round_to_nearest` is the baseline every report compares with. `route` and
`routed_linear` are MoBiRoute at run time, one token after the other (nested gates: section 4.2; the
features are ours, see `router.py`).

Legend: N out_features, K in_features, G groups, S slices, T tokens, L linears of one input, W
widths, E extra ones (W - 1), H rows of the trunk, F features (H + 2).
"""

import torch
from torch import Tensor

from mbq.kernels.widths import MAX_SLICES, WIDTHS


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


def route(
    x_TK: Tensor,
    trunk_HK: Tensor,
    offset_H: Tensor,
    head_ELF: Tensor,
    threshold_EL: Tensor,
) -> Tensor:
    """The router, token by token: bits of every token in each linear, int64 [L, T]."""
    widths = []
    for x_K in x_TK.double():
        square = x_K.square().mean().clamp(min=1e-30)
        hidden_H = trunk_HK.double() @ (x_K / square.sqrt()) + offset_H.double()
        hidden_H = hidden_H * hidden_H.sigmoid()
        feature_F = torch.cat((hidden_H, square.log()[None], torch.ones_like(square)[None]))
        row = []
        for linear in range(head_ELF.shape[1]):
            taken = 0
            for head_F, threshold in zip(head_ELF[:, linear], threshold_EL[:, linear], strict=True):
                if head_F.double() @ feature_F < threshold:
                    break
                taken += 1
            row.append(WIDTHS[taken])
        widths.append(row)
    return torch.tensor(widths).T


def routed_linear(x_TK: Tensor, weight_WNK: Tensor, bias_WN: Tensor, bits_T: Tensor) -> Tensor:
    """Each token times the weight of its own width (rows as WIDTHS): float64 [T, N]."""
    rows = [
        weight_WNK[WIDTHS.index(bits)].double() @ x_K + bias_WN[WIDTHS.index(bits)].double()
        for x_K, bits in zip(x_TK.double(), bits_T.tolist(), strict=True)
    ]
    return torch.stack(rows)
