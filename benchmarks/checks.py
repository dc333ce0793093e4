"""Are the kernels right on this GPU? Random data against float64, equal bits from run to run."""

import dataclasses
import itertools
import math

import torch
from weights import GROUP, multiply, random_digits, random_powers, tile_for, tokens_at

from mbq.kernels import dispatch
from mbq.kernels.digits import Digits, join_digits, pack_digits
from mbq.kernels.quantize import dequantize, pack_pair, powers_of_two, unpack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.router import Gates, bits_taken, score
from mbq.kernels.triton_dequantize import dequantize_digits
from mbq.kernels.triton_prepare import prepare
from mbq.kernels.widths import CODE_BITS, MAX_SLICES, WIDTHS

# Numbers of tokens, and the widths that they are drawn from.
CHECKS = (
    *((1, (bits,)) for bits in WIDTHS),
    (3, (8,)),
    (4, (2,)),
    (8, (3,)),
    *((33, (bits,)) for bits in WIDTHS),
    (3, (2, 8)),
    (5, (2, 3)),
    (16, (2, 4, 6, 8)),
    (33, WIDTHS),
    (64, WIDTHS),
)
# Chains of products: tokens, their width or None for a router's, and how many: values grow, and a
# router squares them.
CHAINS = ((1, 8, 10), (4, 2, 10), (1, None, 4), (4, None, 4))
# Linears that share an input, and rows of their router's trunk.
SHARING, TRUNK = 3, 8
# Rows of linears that are checked together, and tokens.
JOINED_ROWS, JOINED_TOKENS = (1024, 256, 512), 9


def check(n: int, k: int) -> float:
    """Largest relative error over `CHECKS`, against float64."""
    code = torch.randint(0, 256, (n, k), dtype=torch.uint8, device="cuda")
    scale = (0.5 + torch.rand(n, k // GROUP, device="cuda")).half().float()
    zero = (1.5 + torch.rand(n, k // GROUP, device="cuda")).half().float()
    gain = 0.9 + 0.2 * torch.rand(len(WIDTHS), n, device="cuda")
    gain_bias = pack_pair(gain, torch.randn_like(gain))
    gain_WN, bias_WN = unpack_pair(gain_bias)
    exponent_K = torch.randint(-3, 4, (k,), dtype=torch.int8, device="cuda")
    weight = pack_digits(code, exponent_K, pack_pair(scale, zero), gain_bias, MAX_SLICES)
    weight_WNK = torch.stack(
        [
            dequantize(code, scale, zero, bits) * gain_N[:, None] * powers_of_two(exponent_K)
            for bits, gain_N in zip(WIDTHS, gain_WN, strict=True)
        ]
    )
    worst = 0.0
    for bits, weight_NK in zip(WIDTHS, weight_WNK, strict=True):
        made_NK = dequantize_digits(weight, bits, torch.bfloat16).float()
        worst = max(worst, ((made_NK - weight_NK).norm() / weight_NK.norm()).item())
    for m, widths in CHECKS:
        x = 10 * torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        # In turn, so that every width occurs wherever there are enough tokens.
        bits_T = torch.tensor(list(itertools.islice(itertools.cycle(widths), m)), device="cuda")
        asked = bits_T[None] if len(widths) > 1 else widths[0]
        prepared = prepare(x, weight.power_K, asked, 1, GROUP, CODE_BITS)
        known = asked if isinstance(asked, int) else None
        tile = tile_for(n, k, m, known, prepared.mixed)
        # What is allocated next lies where this was: an element that is not written stays NaN.
        poison = torch.full((m, n), math.nan, dtype=torch.bfloat16, device="cuda")
        del poison
        # A width that the host knows, and the same again as one that it does not.
        any_tile = tile_for(n, k, m, None, prepared.mixed)
        found = multiply(prepared, known, weight, tile), multiply(prepared, None, weight, any_tile)
        some = torch.randperm(m, device="cuda")[:8]
        expected = routed_linear(x[some].double(), weight_WNK, bias_WN, bits_T[some])
        for out in found:
            error = ((out[some, :n].double() - expected).norm() / expected.norm()).item()
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check_joined(k: int) -> float:
    """Largest relative error of three linears of one input, at widths that a router decides."""
    made = [random_digits(n, k) for n in JOINED_ROWS]
    x = torch.randn(JOINED_TOKENS, k, device="cuda", dtype=torch.bfloat16)
    gates = random_gates(k)
    joined = join_digits(made)
    prepared = prepare(x, joined.power_K, gates, SHARING, GROUP, CODE_BITS)
    bits_LT = prepared.bits_LT[:, : len(x)]
    worst = 0.0
    outs = joined.sides(dispatch.decode(x, gates, CODE_BITS, joined))
    for out, weight, bits_T in zip(outs, made, bits_LT, strict=True):
        (n,) = weight.out_features
        weight_WNK = torch.stack(
            [dequantize_digits(weight, bits, torch.float32) for bits in WIDTHS]
        )
        _, bias_WN = unpack_pair(weight.gain_bias_WN)
        expected = routed_linear(x, weight_WNK, bias_WN[:, :n], bits_T)
        error = ((out.double() - expected).norm() / expected.norm()).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def repeatable(n: int, k: int) -> bool:
    """Whether three runs give the same bits."""
    weight = random_digits(n, k)
    same = True
    for m in (1, 5):
        prepared, tile = tokens_at(m, k, 6), tile_for(n, k, m, 6)
        outs = [multiply(prepared, 6, weight, tile) for _ in range(3)]
        same = same and all(torch.equal(out, outs[0]) for out in outs)
    return same


def in_order(k: int) -> bool:
    """Whether launches that follow each other at once give the bits of launches on their own.

    A chain of products, each the input of the next, and nothing else: every launch begins while
    the one before it, whose results it needs, is running.
    """
    weight = random_digits(k, k)
    return all(_chained(weight, k, *chain) for chain in CHAINS)


def _chained(weight: Digits, k: int, tokens: int, bits: int | None, length: int) -> bool:
    widths = bits or random_gates(k, 1)

    def chain(x: torch.Tensor, alone: bool) -> torch.Tensor:
        for _ in range(length):
            (x,) = weight.sides(dispatch.decode(x, widths, CODE_BITS, weight))
            if alone:
                torch.cuda.synchronize()
        return x

    start = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    expected = chain(start, alone=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(start, alone=False)
    for _ in range(20):
        found.fill_(math.nan)
        graph.replay()
        if not torch.equal(found, expected):
            return False
    return bool(expected.isfinite().all())


def random_gates(k: int, linears: int = SHARING) -> Gates:
    """A router whose gates are open for about half of all tokens."""
    extra = len(WIDTHS) - 1
    return Gates(
        (torch.randn(TRUNK, k, device="cuda") / math.sqrt(k)).half(),
        torch.randn(TRUNK, device="cuda"),
        torch.randn(extra, linears, TRUNK + 2, device="cuda"),
        torch.zeros(extra, linears, device="cuda"),
    )


def open_gates(k: int, bits: int) -> Gates:
    """The same, open for every token up to one width."""
    open_E = torch.tensor(WIDTHS[1:], device="cuda") <= bits
    threshold_E = torch.where(open_E, -math.inf, math.inf)
    gates = random_gates(k)
    return dataclasses.replace(
        gates, threshold_EL=threshold_E[:, None].expand_as(gates.threshold_EL).contiguous()
    )


def routed_differently(k: int) -> float:
    """Share of widths that the kernel's router decides otherwise than torch's."""
    gates = random_gates(k)
    x = torch.randn(64, k, device="cuda", dtype=torch.bfloat16)
    score_ELT = score(x.float(), gates.trunk_HK.float(), gates.offset_H, gates.head_ELF)
    expected_LT = bits_taken(score_ELT >= gates.threshold_EL[..., None])
    found_LT = prepare(x, random_powers(k), gates, SHARING, GROUP, CODE_BITS).bits_LT
    return (found_LT != expected_LT).double().mean().item()
