"""Published layout of the codes: eight true bit planes, most significant first.

    plane p holds bit 7 - p of every code: int32 [N, K / 32], row-major
    bit j (least significant first) of word w is the bit of input 32 w + j

so the first 2k planes are the first k slices, and a file that ends after plane 2k - 1 is a valid
model of 2k bits. K must be a multiple of 32. Example for one row of 32 codes that are all 0 but
code[1] = 128 and code[2] = 64: plane 0 is [0b010], plane 1 is [0b100], all others [0].

Legend: N out_features, K in_features, P planes, W words (K / 32).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from mbq.kernels.widths import CODE_BITS, WORD_BITS


def pack_planes(code_NK: Tensor, wanted: Iterable[int] = range(CODE_BITS)) -> Tensor:
    """Codes uint8 [N, K] to the wanted planes, int32 [P, N, K / 32].

    Raises:
        ValueError: K is not a multiple of 32.
    """
    if code_NK.shape[1] % WORD_BITS:
        raise ValueError(
            f"in_features {code_NK.shape[1]} is not a multiple of {WORD_BITS}: a plane stores "
            f"{WORD_BITS} inputs a word"
        )
    # Eight inputs make a byte; four bytes, viewed as they lie in little-endian memory, make a word.
    bits_NB8 = code_NK.unflatten(1, (-1, 8))
    place_8 = 1 << torch.arange(8, dtype=torch.uint8, device=code_NK.device)
    planes = []
    for p in wanted:
        plane_NB = (((bits_NB8 >> (CODE_BITS - 1 - p)) & 1) * place_8).sum(2, dtype=torch.uint8)
        planes.append(plane_NB.view(torch.int32))
    return torch.stack(planes)


def unpack_planes(planes: list[Tensor]) -> Tensor:
    """The first P planes, each int32 [N, K / 32], to codes uint8 [N, K]; the missing bits are 0."""
    shift_8 = torch.arange(8, dtype=torch.uint8, device=planes[0].device)
    code_NK: Tensor | None = None
    for p, plane_NW in enumerate(planes):
        bit_NB8 = (plane_NW.contiguous().view(torch.uint8)[..., None] >> shift_8) & 1
        bit_NK = bit_NB8.flatten(1) << (CODE_BITS - 1 - p)
        code_NK = bit_NK if code_NK is None else code_NK | bit_NK
    assert code_NK is not None
    return code_NK
