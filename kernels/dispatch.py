"""Which kernel multiplies, and how it is cut: by device, tokens and shape, never by trying.

Cuts that were measured ship as `tiles_<architecture>.json`, made by `benchmarks/decode.py --tune`:

    {"<N'> x <K'>": {"<tokens of a program>": [rows, split, warps, stages]}}

Other shapes take a rule of thumb: enough programs to fill the device a few times.
"""

import json
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, GROUP_SIZES, ROW_MULTIPLE, Digits

try:
    from mbq.kernels import triton_decode
except ImportError:
    _TRITON = False
else:
    _TRITON = True

# Every slice is a matrix product of its own: against cuBLAS on dequantized weights this is where it
# stops to pay (benchmarks/results/*-decode.json).
_MOST_PRODUCTS = 48
# Programs to aim at: about four for each of a large GPU's multiprocessors.
_PROGRAMS = 528


def decodes(x: Tensor, tokens: int, group_size: int, slices: int | None) -> bool:
    """Whether the decode kernel serves these tokens: few, 16-bit, on a GPU, with Triton there.

    Gradients are not recorded through it.

    Args:
        slices: the same for all tokens, or None if they may differ: then the kernel serves as many
            as it can, since dequantized weights would have to be made for every width in turn.
    """
    return (
        _TRITON
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and 1 <= tokens <= triton_decode.MAX_TOKENS
        and (slices is None or tokens * slices <= _MOST_PRODUCTS)
        and group_size in GROUP_SIZES
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def decode(x_TK: Tensor, counts_T: Tensor, slices: int | None, weight: Digits) -> Tensor:
    """Tokens that `decodes` accepts times a weight, each at its own slice count: [T, N].

    Args:
        counts_T: int32 [T].
        slices: stored slices if tokens may differ in their counts, None if all have the same.
    """
    prepared = triton_decode.prepare(x_TK, counts_T, weight.group_size, slices)
    cut = tile(weight.out_features, weight.in_features, len(x_TK), x_TK.device)
    return triton_decode.multiply(prepared, weight, cut, x_TK.dtype)


def tile(
    out_features: int, in_features: int, tokens: int, device: torch.device
) -> "triton_decode.Tile":
    """How to cut a multiplication on a device."""
    rows = -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    blocks = -(-in_features // BLOCK_INPUTS)
    width = triton_decode.token_tile(tokens)
    measured = _measured(torch.cuda.get_device_capability(device)) if device.type == "cuda" else {}
    found = measured.get(f"{rows} x {blocks * BLOCK_INPUTS}", {}).get(str(width))
    return triton_decode.Tile(*found) if found else default_tile(rows, blocks, width)


def default_tile(rows: int, blocks: int, width: int) -> "triton_decode.Tile":
    """The rule of thumb, for shapes that were not measured."""
    split = 1
    while split < 16 and split * 2 <= blocks and rows // ROW_MULTIPLE * split < _PROGRAMS:
        split *= 2
    return triton_decode.Tile(
        rows=ROW_MULTIPLE, split=split, warps=2 if width <= 8 else 4, stages=4
    )


@cache
def _measured(capability: tuple[int, int]) -> dict[str, dict[str, list[int]]]:
    name = f"tiles_sm{capability[0]}{capability[1]}.json"
    stored = files("mbq.kernels") / name
    if not stored.is_file():
        return {}
    found: dict[str, dict[str, list[int]]] = json.loads(stored.read_text(encoding="utf-8"))
    return found
