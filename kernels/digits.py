"""Run-time layout of the codes on a GPU: planes of 2-bit digits, two for each slice.

    digits int16 [S, 2, B, N', 16], contiguous; slices from the most significant one
    bits 2p+1:2p of element [e, h, b, n, j] hold digit e of input 256 b + 32 c + 16 h + j of row n
    where p = position(c), (0, 4, 1, 5, 2, 6, 3, 7)[c]

but that the second slice has its high bits in one plane and its low bits in the other, so that 3
bits read 3. There, k being 256 b + 32 c + j,

    bit 2p+1 of [1, 0, b, n, j] is the high bit of input k, bit 2p that of input k + 16
    bit 2p   of [1, 1, b, n, j] is the low bit of input k, bit 2p+1 that of input k + 16

So planes of a width are a prefix, the rows of a block of 256 inputs lie side by side, and one shift
and mask of a word gives digits of neighbouring inputs: an operand of a matrix instruction without
any permutation. Chunks of 32 inputs do not lie in their order: two in a row lie at the same place
of two bytes (`triton_bytes.py`), and those of a group, put together to codes of 4 bits, all in the
low or all in the high half of a byte (`triton_fields.py`). Rows are padded to a multiple of 128,
inputs to one of 256; what is padded has scale 0 and adds nothing. Scales and zeros lie with
rows innermost:

    scale_zero int32 [B * 256 / g, N']   float16 pair, scale in the low half
    gain_bias  int32 [W, N']             float16 pair, a row per width as in WIDTHS
    power      float32 [B * 256]         powers of two that the columns are without

Linears that read the same input are laid side by side, so that one launch multiplies by all; each
starts at a multiple of 128 rows. Their columns are without the same powers.

Legend: N out_features, N' N padded, K in_features, B blocks of 256 inputs, G groups, g inputs per
group, S slices, H planes of a slice (2), W widths.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mbq.kernels.quantize import powers_of_two
from mbq.kernels.widths import CODE_BITS, SLICE_BITS

BLOCK_INPUTS = 256
ROW_MULTIPLE = 128
# Group sizes that divide a block; the kernels restart their sums at every group.
GROUP_SIZES = (32, 64, 128, 256)
# q, k and v.
MOST_LINEARS = 3
# That one launch multiplies.
MAX_TOKENS = 64
_CHUNKS = 8
# The second: 3 bits take all of the first and the high bits of this one.
_SPLIT_SLICE = 1
# Of an int16, those at odd and at even places.
ODD_BITS, _EVEN_BITS = -0x5556, 0x5555


@dataclass(frozen=True)
class Digits:
    """Codes of linears and what scales them, as the kernels read them (see the header).

    Attributes:
        out_features: of each linear.
    """

    digits_SHBN16: Tensor
    scale_zero_GN: Tensor
    gain_bias_WN: Tensor
    power_K: Tensor
    out_features: tuple[int, ...]
    in_features: int
    group_size: int

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each linear, and the end of the last."""
        return starts_of(self.out_features)

    def sides(self, out: Tensor) -> tuple[Tensor, ...]:
        """Products [..., N] of each linear, of those that lie side by side: [..., N']."""
        return sides(out, self.starts, self.out_features)


def starts_of(out_features: Sequence[int]) -> tuple[int, ...]:
    """The first row of each linear where they lie side by side, and the end of the last."""
    rows = (-(-features // ROW_MULTIPLE) * ROW_MULTIPLE for features in out_features)
    return tuple(itertools.accumulate(rows, initial=0))


def sides(out: Tensor, starts: Sequence[int], out_features: Sequence[int]) -> tuple[Tensor, ...]:
    """Products [..., N] of each linear, of those that lie side by side: [..., N']."""
    places = zip(starts, out_features, strict=False)
    return tuple([out.narrow(-1, start, features) for start, features in places])


def position(chunk: int) -> int:
    """Where in a word the digits of a chunk of 32 inputs lie."""
    return chunk >> 1 | (chunk & 1) << 2


def chunk_at(position: int) -> int:
    """The chunk whose digits lie there."""
    return (position & 3) << 1 | position >> 2


def pack_digits(
    code_NK: Tensor,
    exponent_K: Tensor,
    scale_zero_NG: Tensor,
    gain_bias_WN: Tensor,
    slices: int,
) -> Digits:
    """From codes uint8 [N, K], exponents and the published pairs, int32 [N, G] and [W, N].

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
        word_HBN16 = word_NB32.unflatten(2, (2, 16)).permute(2, 1, 0, 3)
        planes.append(torch.stack(_split(*word_HBN16)) if e == _SPLIT_SLICE else word_HBN16)
    groups = (inputs + more_inputs) // group_size
    padded_NG = F.pad(scale_zero_NG, (0, groups - scale_zero_NG.shape[1], 0, more_rows))
    return Digits(
        torch.stack(planes),
        padded_NG.T.contiguous(),
        F.pad(gain_bias_WN, (0, more_rows)).contiguous(),
        F.pad(powers_of_two(exponent_K), (0, more_inputs), value=1.0),
        (rows,),
        inputs,
        group_size,
    )


def join_digits(parts: Sequence[Digits]) -> Digits:
    """Linears of one input side by side.

    Raises:
        ValueError: their columns have other exponents.
    """
    if len(parts) == 1:
        return parts[0]
    if not all(torch.equal(part.power_K, parts[0].power_K) for part in parts):
        raise ValueError("linears that read the same input must have the same exponents")
    return replace(
        parts[0],
        digits_SHBN16=torch.cat([part.digits_SHBN16 for part in parts], dim=3),
        scale_zero_GN=torch.cat([part.scale_zero_GN for part in parts], dim=1),
        gain_bias_WN=torch.cat([part.gain_bias_WN for part in parts], dim=1),
        out_features=tuple(itertools.chain(*(part.out_features for part in parts))),
    )


def part_of(joined: Digits, number: int) -> Digits:
    """One linear of those joined, in the same memory."""
    rows = slice(*joined.starts[number : number + 2])
    return replace(
        joined,
        digits_SHBN16=joined.digits_SHBN16[:, :, :, rows],
        scale_zero_GN=joined.scale_zero_GN[:, rows],
        gain_bias_WN=joined.gain_bias_WN[:, rows],
        out_features=joined.out_features[number : number + 1],
    )


def unpack_digits(packed: Digits) -> Tensor:
    """The codes of one linear, uint8 [N, K]; digits of slices that are not there are 0."""
    code_NK: Tensor | None = None
    for e, plane_HBN16 in enumerate(packed.digits_SHBN16):
        words = _rejoined(*plane_HBN16) if e == _SPLIT_SLICE else tuple(plane_HBN16)
        word_BN32 = torch.cat(words, dim=2)
        chunks = [((word_BN32 >> (2 * position(c))) & 3).to(torch.uint8) for c in range(_CHUNKS)]
        digit_NK = torch.stack(chunks, dim=2).transpose(0, 1).flatten(1)
        shifted_NK = digit_NK << (CODE_BITS - SLICE_BITS * (e + 1))
        code_NK = shifted_NK if code_NK is None else code_NK | shifted_NK
    assert code_NK is not None
    return code_NK[: packed.out_features[0], : packed.in_features]


def _split(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Digits of neighbouring 16 inputs, to the high bits and the low bits of both."""
    return here & ODD_BITS | there >> 1 & _EVEN_BITS, here & _EVEN_BITS | there << 1 & ODD_BITS


def _rejoined(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """Digits again, from what `_split` made of them."""
    return high & ODD_BITS | low & _EVEN_BITS, high << 1 & ODD_BITS | low >> 1 & _EVEN_BITS
