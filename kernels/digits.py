"""Run-time layout of the codes on a GPU: planes of 2-bit digits, one plane per slice.

    digits int16 [S, B, N', 32], contiguous; slices from the most significant one
    bits 2p+1:2p of element [e, b, n, j] are digit e of input 256 b + 32 c + j of row n
    where p = position(c), (0, 1, 4, 5, 2, 3, 6, 7)[c]

so the slices of a width are a prefix, the rows of a block of 256 inputs lie side by side, and one
shift and mask of a word gives the digits of 32 neighbouring inputs: an operand of a matrix
instruction without any permutation. Chunks of 32 inputs do not lie in their order so that those of
a group, put together to codes of 4 bits, all lie in the low or all in the high half of a byte
(`triton_uniform.py`). Rows are padded to a multiple of 128, inputs to one of 256; what is padded
has scale 0 and adds nothing. Scales and zeros lie with rows innermost:

    scale_zero int32 [B * 256 / g, N']   float16 pair, scale in the low half
    gain_bias  int32 [W, N']             float16 pair, a row per width as in WIDTHS

Linears that read the same input are laid side by side, so that one launch multiplies by all; each
starts at a multiple of 128 rows.

Legend: N out_features, N' N padded, K in_features, B blocks of 256 inputs, G groups, g inputs per
group, S slices, W widths.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mbq.kernels.widths import CODE_BITS, SLICE_BITS

BLOCK_INPUTS = 256
ROW_MULTIPLE = 128
# Group sizes that divide a block; the kernels restart their sums at every group.
GROUP_SIZES = (32, 64, 128, 256)
# q, k and v.
MOST_LINEARS = 3
_CHUNKS = 8


@dataclass(frozen=True)
class Digits:
    """Codes of linears and what scales them, as the kernels read them (see the header).

    Attributes:
        out_features: of each linear.
    """

    digits_SBN32: Tensor
    scale_zero_GN: Tensor
    gain_bias_WN: Tensor
    out_features: tuple[int, ...]
    in_features: int
    group_size: int

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each linear, and the end of the last."""
        rows = (-(-features // ROW_MULTIPLE) * ROW_MULTIPLE for features in self.out_features)
        return tuple(itertools.accumulate(rows, initial=0))


def position(chunk: int) -> int:
    """Where in a word the digits of a chunk of 32 inputs lie; its own inverse."""
    return chunk & 1 | (chunk & 2) << 1 | (chunk & 4) >> 1


def pack_digits(
    code_NK: Tensor, scale_zero_NG: Tensor, gain_bias_WN: Tensor, slices: int
) -> Digits:
    """From codes uint8 [N, K] and the published pairs, int32 [N, G] and [W, N].

    Raises:
        ValueError: the group size is none of `GROUP_SIZES`.
    """
    rows, inputs = code_NK.shape
    group_size = inputs // scale_zero_NG.shape[1]
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group size {group_size} must be one of {GROUP_SIZES}")
    more_rows, more_inputs = -rows % ROW_MULTIPLE, -inputs % BLOCK_INPUTS
    code_N8 = F.pad(code_NK, (0, more_inputs, 0, more_rows)).unflatten(1, (-1, _CHUNKS, 32))
    planes = []
    for e in range(slices):
        digit = ((code_N8 >> (CODE_BITS - SLICE_BITS * (e + 1))) & 3).to(torch.int16)
        word_NB32 = torch.zeros_like(digit[:, :, 0])
        for c in range(_CHUNKS):
            word_NB32 |= digit[:, :, c] << (2 * position(c))
        planes.append(word_NB32.transpose(0, 1))
    groups = (inputs + more_inputs) // group_size
    padded_NG = F.pad(scale_zero_NG, (0, groups - scale_zero_NG.shape[1], 0, more_rows))
    return Digits(
        torch.stack(planes),
        padded_NG.T.contiguous(),
        F.pad(gain_bias_WN, (0, more_rows)).contiguous(),
        (rows,),
        inputs,
        group_size,
    )


def join_digits(parts: Sequence[Digits]) -> Digits:
    """Linears of one input side by side."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        digits_SBN32=torch.cat([part.digits_SBN32 for part in parts], dim=2),
        scale_zero_GN=torch.cat([part.scale_zero_GN for part in parts], dim=1),
        gain_bias_WN=torch.cat([part.gain_bias_WN for part in parts], dim=1),
        out_features=tuple(itertools.chain(*(part.out_features for part in parts))),
    )


def part_of(joined: Digits, number: int) -> Digits:
    """One linear of those joined, in the same memory."""
    rows = slice(*joined.starts[number : number + 2])
    return replace(
        joined,
        digits_SBN32=joined.digits_SBN32[:, :, rows],
        scale_zero_GN=joined.scale_zero_GN[:, rows],
        gain_bias_WN=joined.gain_bias_WN[:, rows],
        out_features=joined.out_features[number : number + 1],
    )


def unpack_digits(packed: Digits) -> Tensor:
    """The codes of one linear, uint8 [N, K]; digits of slices that are not there are 0."""
    code_NK: Tensor | None = None
    for e, word_BN32 in enumerate(packed.digits_SBN32):
        chunks = [((word_BN32 >> (2 * position(c))) & 3).to(torch.uint8) for c in range(_CHUNKS)]
        digit_NK = torch.stack(chunks, dim=2).transpose(0, 1).flatten(1)
        shifted_NK = digit_NK << (CODE_BITS - SLICE_BITS * (e + 1))
        code_NK = shifted_NK if code_NK is None else code_NK | shifted_NK
    assert code_NK is not None
    return code_NK[: packed.out_features[0], : packed.in_features]
