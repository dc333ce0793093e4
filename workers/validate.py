"""Is what a packed linear computes right on this machine, and how fast is it?

One linear of each shape, as its checkpoint holds it. First random tokens are multiplied at every
width and at mixed ones, by the module that users run, and held against float64 products with the
dequantized weight; an element that is off means that the checkpoint must not be used here. Then, on
a GPU, one call of the module is timed, weights rotating through more memory than the cache holds,
beside a product with a bf16 weight of the same shape.

Legend: N out_features, K in_features, T tokens.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.documents import KernelTiming, ValidationRecord
from mbq.artifacts.errors import CorruptError, KernelError
from mbq.artifacts.packed import PackedCheckpoint
from mbq.artifacts.tensors import TensorFile, open_tensors
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import unpack_pair
from mbq.kernels.shared_input import share_input
from mbq.kernels.timing import time_graph
from mbq.kernels.widths import CODE_BITS, WORD_BITS, widths_up_to
from mbq.workers.determinism import hardware_kind
from mbq.workers.tensors import read_tensor

# Largest error of an element over what is usual (`_error`): weights and outputs are rounded.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# The last are too many for the kernels that multiply by codes.
_CHECKED_TOKENS = (1, 3, 17, 64, 65)
_TIMED_TOKENS = (1, 8, 32)
# Of a float64 weight at once.
_CHECKED_ROWS = 4096
# Stands for what is usual where all weights are zero, and so must every output be.
_SMALLEST = 1e-30
# Weights rotate through this many times what the cache holds; tiny ones do not.
_ROTATIONS = 3
_MOST_COPIES = 256

Report = Callable[[float], None]


class _Drawn(nn.Module):
    """Stands where a router does: every token has the width that was drawn for it."""

    bits_LT: Tensor

    def forward(self, x: Tensor, linear: int) -> Tensor:
        return self.bits_LT[linear]


def tensor_files(checkpoint: PackedCheckpoint, max_bits: int) -> dict[str, TensorFile]:
    """Which file holds each tensor of a checkpoint that was cut to so many bits.

    Raises:
        NotFoundError, CorruptError: a file is missing, or is not what the manifest says.
    """
    digests = checkpoint.files(max_bits)
    weights = {name: d for name, d in digests.items() if name.endswith(".safetensors")}
    files = [open_tensors(checkpoint.store, name, digest) for name, digest in weights.items()]
    return {name: file for file in files for name in file.entries}


def shapes(files: Mapping[str, TensorFile]) -> dict[str, str]:
    """A linear of every shape, `<N>x<K>`, by it."""
    found: dict[str, str] = {}
    for name, file in sorted(files.items()):
        linear, _, kind = name.rpartition(".")
        if kind == "plane_0":
            rows, words = file.entries[name].shape
            found.setdefault(f"{rows}x{WORD_BITS * words}", linear)
    return found


def open_linear(
    files: Mapping[str, TensorFile], name: str, group_size: int, device: torch.device
) -> ElasticLinear:
    """One linear of a checkpoint with all the bits that are there.

    Raises:
        CorruptError: a tensor is missing, or is not what its digest promises.
    """
    stored = sum(f"{name}.plane_{p}" in files for p in range(CODE_BITS))
    rows, words = files[f"{name}.plane_0"].entries[f"{name}.plane_0"].shape
    linear = ElasticLinear(WORD_BITS * words, rows, group_size, Precision(stored))
    for buffer, empty in linear.named_buffers():
        file = files.get(f"{name}.{buffer}")
        if file is None:
            raise CorruptError(f"the checkpoint has no {name}.{buffer}; fetch it again")
        empty.copy_(read_tensor(file, f"{name}.{buffer}"))
    return linear.to(device)


def validate_linear(
    linear: ElasticLinear, name: str, manifest_sha256: str, report: Report
) -> ValidationRecord:
    """Check a linear and, on a GPU, time it.

    Raises:
        KernelError: an output is wrong.
    """
    device = linear.get_buffer("scale_zero").device
    dtypes = (torch.float16, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    widths = widths_up_to(linear.stored_bits)
    generator = torch.Generator().manual_seed(0)
    # Never run, so that it keeps the published planes.
    published = copy.deepcopy(linear)
    cases = [*itertools.product(dtypes, _CHECKED_TOKENS, [*((b,) for b in widths), widths])]
    # Twice, as linears that share an input are multiplied together.
    linears = linear, copy.deepcopy(linear)
    drawn_widths = _Drawn()
    share_input(linears, drawn_widths)
    largest = 0.0
    for number, (dtype, tokens, drawn) in enumerate(cases):
        x = torch.randn(tokens, linear.in_features, generator=generator).to(device, dtype)
        choice = torch.randint(len(drawn), (len(linears), tokens), generator=generator)
        drawn_widths.bits_LT = torch.tensor(drawn)[choice].to(device)
        linear.precision.bits = drawn[0] if len(drawn) == 1 else None
        error = max(
            _error(one, published, x, bits_T)
            for one, bits_T in zip(linears, drawn_widths.bits_LT, strict=True)
        )
        if not error <= TOLERANCES[dtype]:
            raise KernelError(
                f"{name} is wrong on {hardware_kind(device)}: {tokens} tokens of {dtype} at "
                f"{'/'.join(map(str, drawn))} bits are off by {error:.1e} (at most "
                f"{TOLERANCES[dtype]:.0e}); do not run this checkpoint there, and report it"
            )
        largest = max(largest, error)
        report((number + 1) / (len(cases) + 1))
    timings = _timings(published, device) if device.type == "cuda" else ()
    return ValidationRecord(
        linear=name,
        out_features=linear.out_features,
        in_features=linear.in_features,
        manifest_sha256=manifest_sha256,
        hardware=hardware_kind(device),
        checks=len(cases),
        largest_error=largest,
        timings=tuple(timings),
    )


@torch.inference_mode()
def _error(linear: ElasticLinear, published: ElasticLinear, x_TK: Tensor, bits_T: Tensor) -> float:
    """Largest error of an element over what is usual for its channel or, if more, for all.

    Usual is the norm of a channel's weights times the root mean square of the tokens, plus its
    bias: what rounding to 16 bits leaves grows with that. Infinite if an element is not finite.
    """
    # What is allocated next lies where this was: an element that is not written stays NaN.
    poison = x_TK.new_full((len(x_TK), linear.out_features), math.nan)
    del poison
    out_TN = linear(x_TK).double()
    largest = 0.0
    for bits in bits_T.unique().tolist():
        weight_NK = published.weight(bits)
        _, bias_N = unpack_pair(published.get_buffer(f"gain_bias_{bits}"))
        x = x_TK[bits_T == bits].double()
        norm_N = torch.linalg.vector_norm(weight_NK, dim=1, dtype=torch.float64)
        usual_N = norm_N * x.square().mean().sqrt() + bias_N.abs()
        usual_N = usual_N.clamp(min=max(usual_N.square().mean().sqrt().item(), _SMALLEST))
        for start in range(0, linear.out_features, _CHECKED_ROWS):
            rows = slice(start, start + _CHECKED_ROWS)
            expected = F.linear(x, weight_NK[rows].double(), bias_N[rows].double())
            off = ((out_TN[bits_T == bits, rows] - expected).abs() / usual_N[rows]).max().item()
            largest = max(largest, off if math.isfinite(off) else math.inf)
    return largest


def _timings(linear: ElasticLinear, device: torch.device) -> Iterable[KernelTiming]:
    """Every width at a few numbers of tokens, and the same product in bf16."""
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    for bits in widths_up_to(linear.stored_bits):
        copies = _copies(cache_bytes, linear.weights * bits // 8)
        rotated = [copy.deepcopy(linear) for _ in range(copies)]
        for other in rotated:
            other.precision.bits = bits
        for tokens in _TIMED_TOKENS:
            yield _timing(rotated, bits, tokens, linear.in_features, device)
    copies = _copies(cache_bytes, linear.weights * 2)
    shape = linear.out_features, linear.in_features
    full = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    products = [lambda x, w=weight: F.linear(x, w) for weight in full]
    for tokens in _TIMED_TOKENS:
        yield _timing(products, None, tokens, linear.in_features, device)


def _copies(cache_bytes: int, weight_bytes: int) -> int:
    return min(max(2, math.ceil(_ROTATIONS * cache_bytes / weight_bytes)), _MOST_COPIES)


@torch.inference_mode()
def _timing(
    rotated: Iterable[Callable[[Tensor], Tensor]],
    bits: int | None,
    tokens: int,
    in_features: int,
    device: torch.device,
) -> KernelTiming:
    products = list(rotated)
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    # What is made at first use is not a part of a call.
    for product in products:
        product(x)
    turn = itertools.cycle(products)
    seconds, spread = time_graph(lambda: next(turn)(x), max(len(products), 24))
    return KernelTiming(bits=bits, tokens=tokens, seconds=seconds, spread_seconds=spread)
