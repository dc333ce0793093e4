"""Which kernel multiplies, and how it is cut: by device, tokens and shape, never by trying.

Cuts that were measured ship as `tiles_<architecture>.json`, made by `benchmarks/tuning.py`:

    {"<kind>": {"<N'> x <K'>": {"<tokens of a program>": [rows, split, warps, stages]}}}

where the kind is "mixed", or for tokens of one width the bits of a field (`triton_uniform.py`), or
"any" where only the device knows it.

"ahead_bytes" there is how much of the weights that come next the L2 cache is asked for by a product
of few tokens; where that was not measured, nothing.

Other shapes take a rule of thumb: enough programs to fill the device a few times.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, GROUP_SIZES, ROW_MULTIPLE, Digits
from mbq.kernels.router import Gates
from mbq.kernels.widths import CODE_BITS

try:
    from mbq.kernels import (
        triton_dequantize,
        triton_mixed,
        triton_narrow,
        triton_prepare,
        triton_tiles,
        triton_uniform,
    )
except ImportError:
    _TRITON = False
else:
    _TRITON = True

MIXED, ANY = "mixed", "any"
AHEAD = "ahead_bytes"
# Kinds that leave the least room in registers.
_FULL = (str(CODE_BITS), ANY)
_Tiles = dict[str, dict[str, dict[str, list[int]]]]

# Programs to aim at: three for each of a large GPU's multiprocessors.
_PROGRAMS = 396
# Warps to aim at: 8 for each.
_WARPS = 1024
# Tiles were measured for groups of this size; larger ones take no more registers.
_MEASURED_GROUP = 128
# A100 and Orin, H100, B200 and B300: the others have 99 KiB of shared memory for a program.
_ROOMY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 3))
# The first architecture that copies to shared memory in the background and multiplies bfloat16.
_CAPABILITY = (8, 0)


def packs(x: Tensor, group_size: int) -> bool:
    """Whether kernels serve these tokens from the run-time layout.

    They do if tokens are in 16 bits, on an NVIDIA GPU from the A100 on, and Triton is there. All
    others are multiplied by weights that torch dequantizes.
    """
    return (
        _TRITON
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16)
        and group_size in GROUP_SIZES
        and torch.version.hip is None
        and capability(x.device) >= _CAPABILITY
    )


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """What a GPU can do, as CUDA counts it."""
    return torch.cuda.get_device_capability(device)


def decodes(x: Tensor, tokens: int, group_size: int) -> bool:
    """Whether `decode` serves these tokens: those that `packs` accepts, and few.

    Of groups smaller than 128 half as many: sums that are restarted often take the registers.
    Gradients are not recorded through it.
    """
    return (
        packs(x, group_size)
        and 1 <= tokens <= triton_prepare.MAX_TOKENS // (2 if group_size < _MEASURED_GROUP else 1)
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def capturing(x: Tensor) -> bool:
    """Whether launches are being captured in a graph, to be replayed later."""
    with torch.cuda.device_of(x):
        return x.is_cuda and torch.cuda.is_current_stream_capturing()


def decode(
    x_TK: Tensor,
    widths: int | Tensor | Gates,
    max_bits: int,
    weight: Digits,
    tally: Tensor | None = None,
    following: Digits | None = None,
) -> Tensor:
    """Tokens that `decodes` accepts times the weights of linears that share them.

    Arguments as those of `triton_prepare.prepare`, and the weights that are read next on this
    device, if that is known. Returns [T, N'], linears side by side (`Digits.sides`).
    """
    # Triton launches on the current device, whatever the tensors' is.
    with torch.cuda.device_of(x_TK):
        linears, rows, inputs = len(weight.out_features), weight.starts[-1], weight.in_features
        prepared = triton_prepare.prepare(
            x_TK, weight.power_K, widths, linears, weight.group_size, max_bits, tally
        )
        bits = widths if isinstance(widths, int) else None
        kind = kind_of(prepared.mixed, bits)
        cut = tile(rows, inputs, weight.group_size, len(x_TK), x_TK.device, kind)
        if any(start % cut.rows for start in weight.starts):
            cut = dataclasses.replace(cut, rows=ROW_MULTIPLE)
        return multiply(prepared, bits, weight, cut, x_TK.dtype, following)


def multiply(
    prepared: "triton_prepare.Prepared",
    bits: int | None,
    weight: Digits,
    cut: "triton_tiles.Tile",
    dtype: torch.dtype,
    following: Digits | None = None,
) -> Tensor:
    """Prepared tokens times the weights of linears, by the kernel that serves them: [T, N'].

    Args:
        bits: the width of all tokens, or None if only the device knows it.
        following: weights that are read next, if that is known.
    """
    if narrow(len(prepared.x_TK)):
        ahead = bytes_ahead(prepared.x_TK.device)
        return triton_narrow.multiply_narrow(prepared, bits, weight, cut, dtype, following, ahead)
    if prepared.mixed:
        return triton_mixed.multiply_mixed(prepared, weight, cut, dtype)
    return triton_uniform.multiply_uniform(prepared, bits, weight, cut, dtype)


def narrow(width: int) -> bool:
    """Whether tokens are few enough to be multiplied by warps on their own."""
    return width <= triton_narrow.TOKENS


def dequantize(weight: Digits, bits: int, dtype: torch.dtype) -> Tensor:
    """A linear's weight [N, K] of `dtype`, gain and powers of two included.

    For tokens that `packs` accepts.
    """
    with torch.cuda.device_of(weight.digits_SHBN16):
        return triton_dequantize.dequantize_digits(weight, bits, dtype)


@cache
def kind_of(mixed: bool, bits: int | None) -> str:
    """The kind of a product; `bits` None where only the device knows the width."""
    if mixed:
        return MIXED
    return ANY if bits is None else str(triton_uniform.field_bits(bits))


@cache
def tile(
    out_features: int,
    in_features: int,
    group_size: int,
    tokens: int,
    device: torch.device,
    kind: str,
) -> "triton_tiles.Tile":
    """How to cut a multiplication on a device."""
    architecture = _architecture(device)
    known, _ = _measured(architecture)
    rows = -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    blocks = -(-in_features // BLOCK_INPUTS)
    width = token_tile(tokens, kind)
    small = group_size < _MEASURED_GROUP
    shape = f"{rows} x {blocks * BLOCK_INPUTS}"
    # What any width needs, the largest does.
    kinds = (ANY, str(CODE_BITS)) if kind == ANY else (kind,)
    found = (known.get(one, {}).get(shape, {}).get(str(width)) for one in kinds)
    measured = next(filter(None, found), None)
    if measured and not small:
        return triton_tiles.Tile(*measured)
    return default_tile(rows, blocks, width, kind, small, architecture)


@cache
def bytes_ahead(device: torch.device) -> int:
    """How many bytes of the weights that come next the L2 cache is asked for on a device."""
    _, ahead = _measured(_architecture(device))
    return ahead


def token_tile(tokens: int, kind: str) -> int:
    """Tokens of a program."""
    padded = triton_prepare.padded_tokens(tokens)
    return min(padded, triton_mixed.MOST_TILE_TOKENS) if kind == MIXED else padded


def default_tile(
    rows: int,
    blocks: int,
    width: int,
    kind: str,
    small_groups: bool,
    architecture: tuple[int, int],
) -> "triton_tiles.Tile":
    """The rule of thumb, for shapes that were not measured: many warps, since they wait for loads.

    8 or more on each multiprocessor, as in the fastest tiles that were measured on an H200.
    """
    if narrow(width):
        return _narrow_tile(rows, blocks, kind)
    wide = width > 32
    # Eight bits fill the registers, and so do sums that are restarted at every group.
    full = kind in _FULL if width <= 8 else small_groups
    # There sums lie in tensor memory, which 128 rows of 64 tokens would overfill.
    full |= wide and architecture[0] == 10
    cut = ROW_MULTIPLE // 2 if full else ROW_MULTIPLE
    # Of 64 tokens one program fills a multiprocessor, and parts are as large as codes.
    most = _PROGRAMS // 2 if wide else _PROGRAMS
    split = 1
    while split * 2 <= min(blocks, 16) and rows // cut * split * 2 <= most:
        split *= 2
    stages = 2 if wide or architecture not in _ROOMY else 3
    return triton_tiles.Tile(cut, split, warps=8 if wide else 4, stages=stages)


def _narrow_tile(rows: int, blocks: int, kind: str) -> "triton_tiles.Tile":
    """Of a product that warps share by its inputs: few warps a program, few blocks a warp."""
    if kind == MIXED:
        # One cut for all shapes: this kernel takes longest to compile.
        return triton_tiles.Tile(16, split=1, warps=4, stages=1)
    # 32 rows make more of each token, 16 leave more for programs to share and less in registers.
    cut = 32 if rows >= 32 * _PROGRAMS // 2 and kind not in _FULL else 16
    warps = 2
    while warps < 8 and (rows // cut * warps < _WARPS or blocks > 8 * warps):
        warps *= 2
    return triton_tiles.Tile(cut, split=1, warps=warps, stages=1)


def _architecture(device: torch.device) -> tuple[int, int]:
    return capability(device) if device.type == "cuda" else _CAPABILITY


@cache
def _measured(architecture: tuple[int, int]) -> tuple[_Tiles, int]:
    """Tiles, and bytes to ask for ahead."""
    stored = Path(__file__).with_name(f"tiles_sm{architecture[0]}{architecture[1]}.json")
    if not stored.is_file():
        return {}, 0
    found = json.loads(stored.read_text(encoding="utf-8"))
    ahead: int = found.pop(AHEAD, 0)
    return found, ahead
