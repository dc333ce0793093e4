"""The slice ladder: one 8-bit code per weight that can be read at 2, 3, 4, 6 or 8 bits.

A group of `group_size` neighbouring inputs of one output channel shares a scale `s` (the width of
a 2-bit bin) and a zero `z` (where 0.0 lies, in bins). A weight w becomes the floor code

    code = clamp(floor(64 * (w / s + z)), 0, 255)

and its top b bits reconstruct the middle of the bin they name:

    w_b = s * ((floor(code / 2^(8-b)) + 1/2) / 2^(b-2) - z)

Reading fewer bits is therefore requantizing: nothing is rounded twice and nothing is stored per
width but a gain and a bias per output channel. The recursive definition of the four 2-bit slices
(MoBiQuant, arXiv 2602.20191, section 4.1, with its floor-aligned mapping from appendix B) is in
`reference.py`; both give the same codes.

Scale and zero are rounded to float16 BEFORE the codes are computed and travel as one int32 per
group, because frameworks cast float buffers to the model's dtype and a bfloat16 zero is off by
half an 8-bit step.

Legend: N out_features, K in_features, G groups (K / group_size).
"""

import torch
from torch import Tensor

from mbq.kernels.widths import CODE_BITS

# float16's smallest normal number: a scale below it would lose its mantissa.
_SMALLEST_SCALE = 2.0**-14


def group_bounds(weight_NK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, widened to hold 0.0.

    Returns two float32 tensors [N, G]. Holding 0.0 keeps the zero inside [0, 4], where float16
    resolves a sixteenth of an 8-bit step.
    """
    weight_NGg = weight_NK.float().unflatten(1, (-1, group_size))
    return weight_NGg.amin(2).clamp(max=0.0), weight_NGg.amax(2).clamp(min=0.0)


def scale_and_zero(low_NG: Tensor, high_NG: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of groups that span [low, high]: float32 tensors whose values are float16's.

    Differentiable: the float16 rounding passes gradients straight through.
    """
    scale_NG = _round_to_half(((high_NG - low_NG) / 4).clamp(min=_SMALLEST_SCALE))
    zero_NG = _round_to_half(-low_NG / scale_NG)
    return scale_NG, zero_NG


def quantize(weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor) -> Tensor:
    """Floor codes of a weight: uint8 [N, K]."""
    weight_NGg = weight_NK.float().unflatten(1, (scale_NG.shape[1], -1))
    position_NGg = weight_NGg / scale_NG[..., None] + zero_NG[..., None]
    code_NGg = (position_NGg * 64).floor().clamp(0, 255)
    code_NK: Tensor = code_NGg.to(torch.uint8).flatten(1)
    return code_NK


def dequantize(code_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor, bits: int) -> Tensor:
    """Weight that the first `bits` bits of the codes stand for: float32 [N, K].

    The bits below those are ignored, so codes whose lower bits were never loaded are fine.
    """
    bin_NGg = (code_NK >> (CODE_BITS - bits)).unflatten(1, (scale_NG.shape[1], -1))
    position_NGg = (bin_NGg.float() + 0.5) * 2.0 ** (2 - bits)
    weight_NK: Tensor = ((position_NGg - zero_NG[..., None]) * scale_NG[..., None]).flatten(1)
    return weight_NK


def reconstruct(
    code_NK: Tensor, exponent_K: Tensor, scale_zero_NG: Tensor, gain_bias_N: Tensor, bits: int
) -> Tensor:
    """Weight of an elastic linear at a width, from what is stored of it: float32 [N, K]."""
    gain_N, _ = unpack_pair(gain_bias_N)
    weight_NK = dequantize(code_NK, *unpack_pair(scale_zero_NG), bits).mul_(gain_N[:, None])
    return weight_NK.mul_(powers_of_two(exponent_K))


def powers_of_two(exponent_K: Tensor) -> Tensor:
    """2 to integers of -126 to 127, exactly: float32 [K]."""
    return (exponent_K.to(torch.int32) + 127 << 23).view(torch.float32)


def pack_pair(first: Tensor, second: Tensor) -> Tensor:
    """Two equally shaped tensors as float16 in one int32: `first` in the low half."""
    return torch.stack((first, second), dim=-1).half().view(torch.int32).squeeze(-1)


def unpack_pair(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_pair`: two float32 tensors."""
    first, second = pair.unsqueeze(-1).view(torch.float16).float().unbind(-1)
    return first, second


def _round_to_half(value: Tensor) -> Tensor:
    return value + (value.half().float() - value).detach()
