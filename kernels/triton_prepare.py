"""Few tokens made ready for products with codes: one launch for all linears that share an input.

Every input is multiplied by the power of two that its column of the weight is without. Up to 8
tokens become bytes (`triton_bytes.py`); of more the multiplying kernels (`triton_uniform.py`,
`triton_mixed.py`) read

    x16   float16, each token scaled by a power of two so that its largest value is near 2^10
    sums  per group of inputs: sum of x16, and sum weighted by the bias of each digit
          (`triton_tiles.py`)

They also read the bits of each token in each linear and, where many tokens may differ, how many
steps each linear takes through its slices. Widths are the same for all tokens, or given, or decided
here by the router of the input (`router.py`; judged by `reference.route`), so that the host learns
nothing of them: a launch captured in a graph follows whatever its thresholds are set to later.

One program prepares one token. It asks for powers and for what its router reads before it waits for
anything: memory takes longer to answer than the rest takes. Where many tokens may differ the last
program to finish counts the steps.

From Hopper on a launch may begin before the one before it has ended, and waits for that before it
reads what others write, or writes at all. This one lets the multiplication after it begin at once,
as it leaves most of a GPU idle, and so do multiplications of few tokens, whose programs are small.
Those of more tokens let nothing begin: programs that begin where others have left room crowd
together.

Legend: N out_features, K in_features, K' padded to a multiple of 256, T tokens, T' padded, G
groups, L linears of one input, E extra widths, H rows of the trunk, F features (H + 2), B blocks of
256 inputs.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbq.kernels.digits import BLOCK_INPUTS, MAX_TOKENS, MOST_LINEARS, position
from mbq.kernels.router import Gates
from mbq.kernels.triton_bytes import FEW, program_tokens, store_tokens
from mbq.kernels.triton_operands import input_places
from mbq.kernels.widths import SLICE_BITS

_MOST_TOKENS = tl.constexpr(MAX_TOKENS)
_LANES = tl.constexpr(4)
# Of more inputs 8 warps do not hold a token in registers.
_WIDE_INPUTS = 8192
_HOPPER = (9, 0)


position_of = triton.constexpr_function(position)


@triton.constexpr_function
def digit_bit(p: int) -> int:
    """Bit of a float16 at which the digit at position p of a word lies (`triton_tiles.digit`)."""
    return (4, 6, 4, 6, 8, 4, 6, 8)[p]


@dataclass(frozen=True)
class Prepared:
    """Tokens as the multiplying kernels read them, for all linears that share an input.

    Attributes:
        bits_LT: int32 [L, T'].
        mixed: whether tokens may differ in width.
    """

    bits_LT: Tensor
    tokens: int
    mixed: bool


@dataclass(frozen=True)
class PreparedBytes(Prepared):
    """Up to 8 tokens, as `triton_bytes.store_tokens` writes them.

    Attributes:
        x_BT864: int8 [B, T, 8, 64].
        scale_sum_B8T2: float32 [B, 8, T, 2].
    """

    x_BT864: Tensor
    scale_sum_B8T2: Tensor


@dataclass(frozen=True)
class PreparedHalves(Prepared):
    """More tokens, in float16.

    Attributes:
        x_TK: float16 [T', K'], inputs of every 32 in other places (`triton_operands.py`).
        sum_GT: float32 [G', T'].
        bias_sum_GT: float32 [G', T'].
        unscale_T: float32 [T'].
        steps_L2: int32 [L, 2], steps through the slices, and 1 if the second slice is halved; None
            where tokens cannot differ in width.
    """

    x_TK: Tensor
    sum_GT: Tensor
    bias_sum_GT: Tensor
    unscale_T: Tensor
    steps_L2: Tensor | None


@triton.jit
def _trunk_row(h: tl.constexpr, at, trunk_ptr, in_features):
    return tl.load(trunk_ptr + h * in_features + at, mask=at < in_features, other=0.0)


@triton.jit
def _scored_bits(
    x, at, rows, trunk_ptr, offset_ptr, head_ptr, threshold_ptr, in_features,
    CHUNKS: tl.constexpr, LINEARS: tl.constexpr, EXTRA: tl.constexpr, HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """Bits that a router gives one token in each linear: int32, a lane per linear.

    `rows` are the first of its trunk, those that were asked for already.
    """
    e, linear = tl.arange(0, _LANES)[:, None], tl.arange(0, _LANES)[None, :]
    there = (e < EXTRA) & (linear < LINEARS)
    gate = e * LINEARS + linear
    gate_ptr = head_ptr + gate * (HIDDEN + 2)
    f = tl.arange(0, FEATURES)
    offset = tl.load(offset_ptr + f, mask=f < HIDDEN, other=0.0)
    head = tl.load(
        gate_ptr[:, :, None] + f[None, None, :],
        mask=there[:, :, None] & (f < HIDDEN)[None, None, :],
        other=0.0,
    )
    threshold = tl.load(threshold_ptr + gate, mask=there, other=0.0)
    of_square = tl.load(gate_ptr + HIDDEN, mask=there, other=0.0)
    constant = tl.load(gate_ptr + HIDDEN + 1, mask=there, other=0.0)
    square = tl.maximum(tl.sum(tl.sum(x * x, axis=1), axis=0) / in_features, 1e-30)
    score = constant + of_square * tl.log(square)
    # All rows are summed over the program at once: each such sum makes its warps wait.
    products = tl.zeros((CHUNKS, FEATURES), dtype=tl.float32)
    for h in tl.static_range(HIDDEN):
        row = rows[h] if h < len(rows) else _trunk_row(h, at, trunk_ptr, in_features)
        product = tl.sum(row.to(tl.float32) * x, axis=1)
        products = tl.where(f[None, :] == h, product[:, None], products)
    hidden = tl.sum(products, axis=0) * tl.rsqrt(square) + offset
    feature = hidden / (1.0 + tl.exp(-hidden))
    score += tl.sum(head * feature[None, None, :], axis=2)
    # Nested: what counts is the first gate that is closed.
    taken = tl.min(tl.where(there & (score >= threshold), EXTRA, e), axis=0)
    return tl.where(taken <= 2, 2 + taken, 2 * taken)


@triton.jit
def _group_sums(x16, CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr):
    """Per group, the sum of a token, and the sum weighted by the biases of digits."""
    chunk = tl.arange(0, CHUNKS)
    bias = tl.zeros((CHUNKS,), tl.float32)
    for c in tl.static_range(8):
        bias = tl.where(chunk % 8 == c, 1 << (10 - digit_bit(position_of(c))), bias)
    chunk_sum = tl.sum(x16.to(tl.float32), axis=1)
    shape: tl.constexpr = (CHUNKS // GROUP_CHUNKS, GROUP_CHUNKS)
    sums = tl.sum(tl.reshape(chunk_sum, shape), axis=1)
    return sums, tl.sum(tl.reshape(chunk_sum * bias, shape), axis=1)


@triton.jit
def _store_halves(
    x, token, at, x16_ptr, sum_ptr, bias_sum_ptr, unscale_ptr, padded_inputs, groups,
    padded_tokens, CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A token, float32 [C, 32], as float16, with what undoes its scale and sums of its groups."""
    top = tl.max(tl.max(tl.abs(x), axis=1), axis=0).to(tl.int32, bitcast=True) >> 23
    top = tl.minimum(tl.maximum(top, 11), 254)
    scale = ((264 - top) << 23).to(tl.float32, bitcast=True)
    tl.store(unscale_ptr + token, ((top - 10) << 23).to(tl.float32, bitcast=True))
    x16 = (x * scale).to(tl.float16)
    places = at // 32 * 32 + input_places(at % 32)
    tl.store(x16_ptr + token * padded_inputs + places, x16, mask=at < padded_inputs)
    group = tl.arange(0, CHUNKS // GROUP_CHUNKS)
    sums, bias_sums = _group_sums(x16, CHUNKS, GROUP_CHUNKS)
    tl.store(sum_ptr + group * padded_tokens + token, sums, mask=group < groups)
    tl.store(bias_sum_ptr + group * padded_tokens + token, bias_sums, mask=group < groups)


@triton.jit
def _count_steps(bits_ptr, steps_ptr, arrived_ptr, padded_tokens, LINEARS: tl.constexpr):
    """What the last program to finish does: steps through the slices, and bits of padding."""
    tl.debug_barrier()
    finished = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if finished:
        linear = tl.arange(0, _LANES)
        there = linear < LINEARS
        t = tl.arange(0, _MOST_TOKENS)[None, :]
        bits_at = bits_ptr + linear[:, None] * padded_tokens + t
        given = there[:, None] & (t < tl.num_programs(0))
        padding = there[:, None] & (t >= tl.num_programs(0)) & (t < padded_tokens)
        all_bits = tl.load(bits_at, mask=given, other=2, cache_modifier=".cg")
        tl.store(bits_at, all_bits, mask=padding)
        halved = tl.max((all_bits == 3).to(tl.int32), axis=1)
        tl.store(steps_ptr + 2 * linear, tl.max(all_bits, axis=1) // 2 + halved, mask=there)
        tl.store(steps_ptr + 2 * linear + 1, halved, mask=there)
        tl.store(arrived_ptr, 0)


# Fewer variants to compile: these need no alignment.
@triton.jit(
    do_not_specialize=[
        "uniform",
        "given_linear_stride",
        "given_token_stride",
        "groups",
        "padded_tokens",
    ]
)
def _prepare_kernel(
    x_ptr, power_ptr, given_ptr, trunk_ptr, offset_ptr, head_ptr, threshold_ptr,
    bytes_ptr, scale_sum_ptr, x16_ptr, sum_ptr, bias_sum_ptr, unscale_ptr, bits_ptr, steps_ptr,
    arrived_ptr, tally_ptr,
    uniform, x_stride, given_linear_stride, given_token_stride,
    in_features, padded_inputs, groups, padded_tokens,
    CHUNKS: tl.constexpr, GROUP_CHUNKS: tl.constexpr, LINEARS: tl.constexpr, GIVEN: tl.constexpr,
    EXTRA: tl.constexpr, HIDDEN: tl.constexpr, FEATURES: tl.constexpr, AHEAD: tl.constexpr,
    TALLIED: tl.constexpr, T: tl.constexpr, STEPS: tl.constexpr, PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, CHUNKS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    linear = tl.arange(0, _LANES)
    there = linear < LINEARS
    if EXTRA > 0:
        # Asked for before the first sum over the program, for which its warps wait, and before the
        # launch before this one has ended: that does not write them.
        rows = ()
        for h in tl.static_range(AHEAD):
            rows += (_trunk_row(h, at, trunk_ptr, in_features),)  # type: ignore[assignment]
    # Powers, too: no launch writes them.
    power = tl.load(power_ptr + at, mask=at < in_features, other=1.0)
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + token * x_stride + at, mask=at < in_features, other=0.0).to(tl.float32)
    scaled = x * power
    if T > 0:
        store_tokens(
            scaled, token, bytes_ptr, scale_sum_ptr, padded_inputs // 256, CHUNKS, GROUP_CHUNKS, T
        )  # fmt: skip
    else:
        _store_halves(
            scaled, token, at, x16_ptr, sum_ptr, bias_sum_ptr, unscale_ptr, padded_inputs, groups,
            padded_tokens, CHUNKS, GROUP_CHUNKS,
        )  # fmt: skip

    bits = tl.full((_LANES,), 0, tl.int32) + uniform
    if GIVEN:
        given_at = linear * given_linear_stride + token * given_token_stride
        bits = tl.load(given_ptr + given_at, mask=there, other=2).to(tl.int32)

    if EXTRA > 0:
        bits = _scored_bits(
            x, at, rows, trunk_ptr, offset_ptr, head_ptr, threshold_ptr, in_features,
            CHUNKS, LINEARS, EXTRA, HIDDEN, FEATURES,
        )  # fmt: skip
    tl.store(bits_ptr + linear * padded_tokens + token, bits, mask=there)
    if TALLIED:
        tl.atomic_add(tally_ptr + linear, 1, mask=there, sem="relaxed")
        tl.atomic_add(tally_ptr + LINEARS + linear, bits.to(tl.int64), mask=there, sem="relaxed")

    if STEPS:
        _count_steps(bits_ptr, steps_ptr, arrived_ptr, padded_tokens, LINEARS)


def prepare(
    x_TK: Tensor,
    power_K: Tensor,
    widths: int | Tensor | Gates,
    linears: int,
    group_size: int,
    max_bits: int,
    tally: Tensor | None = None,
) -> Prepared:
    """Prepare tokens [T, K], T of 1 to 64, float16, bfloat16 or float32.

    Args:
        power_K: float32, powers of two that the columns of the linears' weights are without.
        widths: one of WIDTHS for all tokens and linears; or, which the host does not read, int32 or
            int64 [L, T], or [L, 1] for all tokens; or a router.
        linears: L, those that read these tokens: 1 to 3.
        max_bits: stored bits, the most that a token may ask for.
        tally: int64 [2, L], to which the tokens and the bits of each linear are added.

    Raises:
        ValueError: there are too many tokens or linears, or none.
    """
    tokens, inputs = x_TK.shape
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: the kernels take 1 to {MAX_TOKENS}")
    if not 1 <= linears <= MOST_LINEARS:
        raise ValueError(f"{linears} linears: the kernels take 1 to {MOST_LINEARS}")
    padded = padded_tokens(tokens)
    padded_inputs = -(-inputs // BLOCK_INPUTS) * BLOCK_INPUTS
    groups = padded_inputs // group_size
    if x_TK.stride(1) != 1:
        x_TK = x_TK.contiguous()
    given = widths if isinstance(widths, Tensor) else None
    gates = widths if isinstance(widths, Gates) else None
    alike = isinstance(widths, int) or (given is not None and given.shape[1] == 1)
    mixed = tokens > 1 and max_bits > SLICE_BITS and not alike
    bits_LT = x_TK.new_empty(linears, padded, dtype=torch.int32)
    few = program_tokens(tokens) if tokens <= FEW else 0
    if few:
        made: Prepared = _new_bytes(bits_LT, tokens, mixed, few, padded_inputs)
    else:
        made = _new_halves(bits_LT, tokens, mixed, padded_inputs, groups)
    hidden = 0 if gates is None else len(gates.trunk_HK)
    chunks = _power_of_2(padded_inputs // 32)
    _prepare_kernel[(tokens,)](
        x_TK, power_K, given, *_pointers(gates), *_written(made), zeros(x_TK.device, "prepare", 1),
        tally, widths if isinstance(widths, int) else SLICE_BITS, x_TK.stride(0),
        0 if given is None else given.stride(0), 0 if given is None or alike else given.stride(1),
        inputs, padded_inputs, groups, padded,
        CHUNKS=chunks, GROUP_CHUNKS=group_size // 32, LINEARS=linears, GIVEN=given is not None,
        EXTRA=0 if gates is None else len(gates.threshold_EL), HIDDEN=hidden,
        FEATURES=_power_of_2(max(hidden, 1)), AHEAD=min(hidden, rows_ahead(padded_inputs)),
        TALLIED=tally is not None, T=few, STEPS=mixed and few == 0,
        num_warps=warps_for(padded_inputs),
        **launching(x_TK.device),
    )  # fmt: skip
    return made


def _new_bytes(
    bits_LT: Tensor, tokens: int, mixed: bool, few: int, padded_inputs: int
) -> PreparedBytes:
    blocks = padded_inputs // BLOCK_INPUTS
    return PreparedBytes(
        bits_LT,
        tokens,
        mixed,
        bits_LT.new_empty(blocks, few, 8, 64, dtype=torch.int8),
        bits_LT.new_empty(blocks, 8, few, 2, dtype=torch.float32),
    )


def _new_halves(
    bits_LT: Tensor, tokens: int, mixed: bool, padded_inputs: int, groups: int
) -> PreparedHalves:
    linears, padded = bits_LT.shape
    return PreparedHalves(
        bits_LT,
        tokens,
        mixed,
        bits_LT.new_empty(padded, padded_inputs, dtype=torch.float16),
        bits_LT.new_empty(groups, padded, dtype=torch.float32),
        bits_LT.new_empty(groups, padded, dtype=torch.float32),
        bits_LT.new_empty(padded, dtype=torch.float32),
        bits_LT.new_empty(linears, 2, dtype=torch.int32) if mixed else None,
    )


def _written(made: Prepared) -> tuple[Tensor | None, ...]:
    """What the kernel writes, from `bytes_ptr` to `steps_ptr`."""
    if isinstance(made, PreparedBytes):
        return made.x_BT864, made.scale_sum_B8T2, None, None, None, None, made.bits_LT, None
    assert isinstance(made, PreparedHalves)
    sums = made.sum_GT, made.bias_sum_GT
    return None, None, made.x_TK, *sums, made.unscale_T, made.bits_LT, made.steps_L2


@cache
def launching(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that begins while the launch before it ends, where a GPU can do that."""
    programmatic = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER
    # Compilers for other GPUs do not know the option.
    return {"PROGRAMMATIC": programmatic} | ({"launch_pdl": True} if programmatic else {})


def warps_for(inputs: int) -> int:
    """Of a program, so that registers hold its token."""
    return 8 if inputs <= _WIDE_INPUTS else 16


def rows_ahead(inputs: int) -> int:
    """Rows of a router's trunk that registers hold beside a token."""
    if inputs <= _WIDE_INPUTS:
        return 8
    return 1 if inputs <= 2 * _WIDE_INPUTS else 0


def padded_tokens(tokens: int) -> int:
    """T': a power of two, as tiles are; matrix instructions take 8 at least."""
    return max(_power_of_2(tokens), 8)


def _power_of_2(least: int) -> int:
    # Triton's own function is ten times slower to call.
    return 1 << (least - 1).bit_length()


_ZEROS: dict[tuple[torch.device, str], Tensor] = {}


def zeros(device: torch.device, use: str, count: int) -> Tensor:
    """Counters that are zero; every launch leaves them zero. Launches of a stream take turns."""
    found = _ZEROS.get((device, use))
    if found is None or len(found) < count:
        found = torch.zeros(count, dtype=torch.int32, device=device)
        _ZEROS[device, use] = found
    return found


def _pointers(gates: Gates | None) -> tuple[Tensor | None, ...]:
    if gates is None:
        return None, None, None, None
    return gates.trunk_HK, gates.offset_H, gates.head_ELF, gates.threshold_EL
