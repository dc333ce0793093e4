"""Columns of a weight brought to like sizes before they are quantized, by powers of two.

Large models have channels that are many times larger than others, and columns of weights as much
smaller. A group of weights spans neighbouring columns and has one range: small columns would all
fall into the bins beside 0, and their errors are multiplied by large inputs. So a linear is

    y = (2^e x) @ (2^-e w).T

with an exponent for each column, and 2^-e w is quantized. Where all columns are within a factor of
two of the median, they stay as they are. Powers of two change no digit of any number, so scales
need not be folded into what comes before (as AWQ, arXiv 2306.00978, does; every architecture has
that elsewhere).

Scales follow the weights alone, unlike AWQ's and SmoothQuant's: making important columns larger
than others takes from these what compensation and training give to those (benchmarks/README.md).

Linears that read the same input share its exponents: it is scaled once.

Legend: N out_features, K in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Logarithm to base 2 of what columns are off the median where nothing is done about them.
_TOLERATED = 1.0
# A column below this share of the root mean square of all counts as that large.
_SMALLEST_SHARE = 2.0**-8
# Root mean square that weights are brought to if theirs is below: float16 scales resolve them.
_SMALLEST_SIZE = 2.0**-8
_LARGEST_EXPONENT = 30


@torch.no_grad()
def column_exponents(weights: Sequence[Tensor]) -> Tensor:
    """Exponents e of the columns of linears that read the same input: int8 [K].

    Args:
        weights: [N, K] of each; all count alike.
    """
    squares = torch.stack([weight_NK.float().square().mean(0) for weight_NK in weights])
    means = squares.mean(1, keepdim=True)
    used = means[:, 0] > 0
    if not used.any():
        return torch.zeros_like(squares[0], dtype=torch.int8)
    size_K = (squares[used] / means[used]).clamp(min=_SMALLEST_SHARE**2).log2().mean(0) / 2
    off_K = size_K - size_K.median()
    if off_K.abs().max() < _TOLERATED:
        off_K.zero_()
    small = (means[used].min().sqrt() / _SMALLEST_SIZE).log2().clamp(max=0)
    limited_K = (off_K + small).round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return limited_K.to(torch.int8)
