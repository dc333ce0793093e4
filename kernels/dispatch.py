"""Which kernel multiplies, and how it is cut: by device, tokens and shape, never by trying.

Cuts that were measured ship as `tiles_<architecture>.json`, made by `benchmarks/tuning.py`:

    {"<kind>": {"<N'> x <K'>": {"<tokens of a program>": [rows, split, warps, stages]}}}

where the kind is "mixed", or for tokens of one width the bits of a field (`triton_fields.py`), or
"any" where only the device knows it.

Other shapes take a rule of thumb: enough programs to fill the device a few times.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, GROUP_SIZES, MAX_TOKENS, ROW_MULTIPLE, Digits
from mbq.kernels.router import Gates
from mbq.kernels.widths import CODE_BITS

try:
    from mbq.kernels import (
        triton_bytes,
        triton_dequantize,
        triton_fields,
        triton_mixed,
        triton_narrow,
        triton_operands,
        triton_prepare,
        triton_tiles,
        triton_uniform,
    )
except ImportError:
    _TRITON = False
else:
    _TRITON = True

MIXED, ANY = "mixed", "any"
_Tiles = dict[str, dict[str, dict[str, list[int]]]]

# Programs to aim at: three for each of a large GPU's multiprocessors.
_PROGRAMS = 396
# Warps to aim at, of programs of few tokens: 10 for each.
_WARPS = 1300
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
        and 1 <= tokens <= _most_tokens(group_size)
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def capturing(x: Tensor) -> bool:
    """Whether launches are being captured in a graph, to be replayed later."""
    with torch.cuda.device_of(x):
        return x.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(x: Tensor, group_size: int) -> None:
    """Stop a capture of tokens [..., K] that `decode` does not serve.

    A replay would go on at the width that is set now, whatever is set later.

    Raises:
        RuntimeError: launches are being captured.
    """
    if not torch.compiler.is_compiling() and capturing(x):
        raise RuntimeError(
            f"{x.numel() // x.shape[-1]} tokens in {x.dtype} cannot be captured in a CUDA graph: "
            f"steps of up to {_most_tokens(group_size)} tokens in 16 bits can, without gradients, "
            "where kernels serve the model; run others outside of it"
        )


def _most_tokens(group_size: int) -> int:
    return MAX_TOKENS // (2 if group_size < _MEASURED_GROUP else 1)


def decode(
    x_TK: Tensor,
    widths: int | Tensor | Gates,
    max_bits: int,
    weight: Digits,
    tally: Tensor | None = None,
) -> Tensor:
    """Tokens that `decodes` accepts times the weights of linears that share them: [T, N'].

    Arguments as those of `triton_prepare.prepare`. Linears lie side by side (`Digits.sides`).
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
        return multiply(prepared, bits, weight, cut, x_TK.dtype)


def multiply(
    prepared: "triton_prepare.Prepared",
    bits: int | None,
    weight: Digits,
    cut: "triton_tiles.Tile",
    dtype: torch.dtype,
) -> Tensor:
    """Prepared tokens times the weights of linears, by the kernel that serves them: [T, N'].

    Args:
        bits: the width of all tokens, or None if only the device knows it.
    """
    if isinstance(prepared, triton_prepare.PreparedBytes):
        return triton_narrow.multiply_narrow(prepared, bits, weight, cut, dtype)
    assert isinstance(prepared, triton_prepare.PreparedHalves)
    if prepared.mixed:
        return triton_mixed.multiply_mixed(prepared, weight, cut, dtype)
    return triton_uniform.multiply_uniform(prepared, bits, weight, cut, dtype)


def narrow(tokens: int) -> bool:
    """Whether tokens are few enough to be multiplied by warps on their own."""
    return tokens <= triton_bytes.FEW


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
    return ANY if bits is None else str(triton_fields.field_bits(bits))


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
    known = _measured(architecture)
    rows = -(-out_features // ROW_MULTIPLE) * ROW_MULTIPLE
    blocks = -(-in_features // BLOCK_INPUTS)
    width = token_tile(tokens, kind)
    small = group_size < _MEASURED_GROUP
    shape = f"{rows} x {blocks * BLOCK_INPUTS}"
    # What any width needs, the largest does; and up to four tokens, what one does.
    kinds = (ANY, str(CODE_BITS)) if kind == ANY else (kind,)
    widths = (width, 1) if width < triton_bytes.FEW else (width,)
    found = (known.get(one, {}).get(shape, {}).get(str(w)) for one in kinds for w in widths)
    measured = next(filter(None, found), None)
    if measured and not small:
        return triton_tiles.Tile(*measured)
    return default_tile(rows, blocks, width, kind, small, architecture)


def token_tile(tokens: int, kind: str) -> int:
    """Tokens of a program."""
    if narrow(tokens):
        return triton_bytes.program_tokens(tokens)
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

    About 8 on each multiprocessor, as in the fastest tiles that were measured on an H200.
    """
    if narrow(width):
        return _narrow_tile(rows, blocks, kind, small_groups)
    wide = width > 32
    # Sums that are restarted at every group fill the registers; and B200's lie in tensor memory,
    # which 128 rows of 64 tokens would overfill.
    full = small_groups or (wide and architecture[0] == 10)
    cut = ROW_MULTIPLE // 2 if full else ROW_MULTIPLE
    # Words fill them, too: 32 rows a warp with no more than 16 tokens.
    warps = min(4 if width <= 16 else 8, cut // 16)
    # One program of 8 warps, or two, fill a multiprocessor.
    most = _PROGRAMS // 2 if warps == 8 else _PROGRAMS
    split = 1
    while split * 2 <= min(blocks, 16) and rows // cut * split * 2 <= most:
        split *= 2
    # Words that are asked for ahead leave room in shared memory for more tokens.
    ahead = triton_operands.loads_ahead(warps, architecture)
    stages = 3 if architecture in _ROOMY and (ahead or not wide) else 2
    return triton_tiles.Tile(cut, split, warps, stages)


def _narrow_tile(rows: int, blocks: int, kind: str, small_groups: bool) -> "triton_tiles.Tile":
    """Of a product that warps share by its inputs: few warps a program, if there are enough."""
    if kind == MIXED:
        # One cut for all shapes: this kernel takes long to compile.
        return triton_tiles.Tile(16, split=1, warps=4, stages=1)
    # 32 rows make more of each token, 16 leave more for programs to share and less in registers,
    # which sums of many groups fill, too.
    tall = not small_groups and kind == "2"
    cut = 32 if tall and rows >= 32 * _PROGRAMS // 2 else 16
    # Two programs of 8 warps share a multiprocessor if a thread has 128 registers: not if words
    # are of 8 bits, nor of 32 rows.
    most = 8 if kind in ("2", "4") and cut == 16 else 4
    warps = 2
    while warps < most and rows // cut * warps < _WARPS and warps < blocks:
        warps *= 2
    return triton_tiles.Tile(cut, split=1, warps=warps, stages=1)


def _architecture(device: torch.device) -> tuple[int, int]:
    return capability(device) if device.type == "cuda" else _CAPABILITY


@cache
def _measured(architecture: tuple[int, int]) -> _Tiles:
    stored = Path(__file__).with_name(f"tiles_sm{architecture[0]}{architecture[1]}.json")
    found: _Tiles = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    return found
