"""Columns of a weight brought to like sizes before they are quantized, by powers of two.

Large models have channels that are many times larger than others, and columns of weights as much
smaller. A group of weights spans neighbouring columns and has one range: small columns would all
fall into the bins beside 0, and their errors are multiplied by large inputs. So a linear is

    y = (2^e x) @ (2^-e w).T

with an exponent for each column, and 2^-e w is quantized. Powers of two change no digit of any
number, so they need not be folded into what comes before (as AWQ's scales are, arXiv 2306.00978;
every architecture has that elsewhere).

Exponents follow the weights alone. Enlarging columns of large inputs beyond that, as AWQ and
SmoothQuant (arXiv 2211.10438) do, costs the others more than compensation and training leave to be
gained (benchmarks/README.md).

Linears that read the same input share its exponents: it is scaled once.

Legend: N out_features, K in_features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Columns within this of the median, in powers of two, are left alone if all are.
_TOLERATED = 1.0
# Columns below this share of the median, zeros above all, count as that large.
_SMALLEST_SHARE = 2.0**-12
# Sizes that medians are brought to if they are below, as long as none gets above: float16 scales
# resolve these.
_SMALLEST_SIZE, _LARGEST_SIZE = 2.0**-8, 2.0**4
_LARGEST_EXPONENT = 30


@torch.no_grad()
def column_exponents(weights: Sequence[Tensor]) -> Tensor:
    """Exponents e of the columns of linears that read the same input: int8 [K].

    Args:
        weights: [N, K] of each; all count alike, but those of zeros not at all.
    """
    sizes = [weight_NK.float().square().mean(0).sqrt() for weight_NK in weights]
    sizes = [size_K for size_K in sizes if size_K.any()]
    if not sizes:
        return torch.zeros(weights[0].shape[1], dtype=torch.int8, device=weights[0].device)
    usual = torch.stack([size_K[size_K > 0].median() for size_K in sizes])
    shares = torch.stack(sizes) / usual[:, None]
    off_K = shares.clamp(min=_SMALLEST_SHARE).log2().mean(0)
    if off_K.abs().max() < _TOLERATED:
        off_K.zero_()
    lift = (usual.min() / _SMALLEST_SIZE).log2().maximum((usual.max() / _LARGEST_SIZE).log2())
    exponent_K = off_K.round() + lift.clamp(max=0).round()
    return exponent_K.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).to(torch.int8)
