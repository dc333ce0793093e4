"""A linear layer that runs at any stored width.

It holds the published bit planes and, per width, a gain and a bias per output channel:

    y = gain_b * ((2^e x) @ w_b.T) + bias_b + bias

with an exponent e for each input (`workers/balance.py`), where b is the same for every token, or
what the router of its input gives each of them; tokens of one width are then multiplied together.
All elastic linears of a model share one `Precision`, so changing the width of the whole model is
one assignment.

16-bit tokens on a GPU are multiplied by the codes themselves where they are few, together with the
other linears that read them (`shared_input.py`), and by a weight that is made and thrown away where
they are many (`triton_dequantize.py`). For that the planes are exchanged, at first use, for the
layout of `digits.py`; the state is planes all the same.

On a CPU, and on a GPU for other dtypes and group sizes or without Triton, torch dequantizes a
weight. That costs more than multiplying by it, so it is kept in the dtype of its input: on a CPU
for every width used so far, on a GPU, where memory is short, for the last one only.

Legend: N out_features, K in_features, G groups, W words (K / 32), T tokens.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.kernels import dispatch
from mbq.kernels.bitplanes import pack_planes, unpack_planes
from mbq.kernels.digits import Digits, pack_digits, unpack_digits
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import reconstruct, unpack_pair
from mbq.kernels.shared_input import SharedInput
from mbq.kernels.widths import WIDTHS, WORD_BITS, slices_of, widths_up_to


class ElasticLinear(nn.Module):
    """Replaces `nn.Linear`; `precision` may be shared with other linears.

    Buffers: `plane_0` ... int32 [N, K/32], one per stored bit, `exponent` int8 [K], `scale_zero`
    int32 [N, G] and, per width, `gain_bias_2`, `gain_bias_3`, `gain_bias_4` ... int32 [N]; the
    pairs are float16 in one int32 so that casting the model leaves them alone.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        precision: Precision,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.precision = precision
        # `precision` may be asked to use fewer than are stored.
        self.stored_bits = precision.max_bits
        for p in range(self.stored_bits):
            self._empty(f"plane_{p}", out_features, in_features // WORD_BITS)
        self.register_buffer("exponent", torch.zeros(in_features, dtype=torch.int8))
        self._empty("scale_zero", out_features, in_features // group_size)
        for bits in widths_up_to(self.stored_bits):
            self._empty(f"gain_bias_{bits}", out_features)
        self.bias = bias
        self._weights: dict[tuple[int, torch.dtype], Tensor] = {}
        self.packed = False
        self.shared = SharedInput((self,), None)
        self.number = 0
        self._tokens = 0
        self._bits_read: int | Tensor = 0

    def share(self, shared: SharedInput, number: int) -> None:
        """Become one of the linears of an input (`shared_input.share_input`)."""
        self._unpack()
        self.shared, self.number = shared, number

    @property
    def tally(self) -> tuple[int, int]:
        """Tokens that passed since it was reset, and the sum of the bits they read of a weight."""
        tokens, bits_read = self.shared.tally(self.number)
        return self._tokens + tokens, int(self._bits_read) + bits_read

    def reset_tally(self) -> None:
        """Forget how many bits were read."""
        self._tokens = self._bits_read = 0
        self.shared.reset_tally(self.number)

    @property
    def weights(self) -> int:
        """How many weights (parameters) it has."""
        return self.out_features * self.in_features

    def weight(self, bits: int) -> Tensor:
        """Dequantized weight at a width, gain and powers of two included: float32 [N, K]."""
        exponent_K, scale_zero_NG = self.get_buffer("exponent"), self.get_buffer("scale_zero")
        gain_bias_N = self.get_buffer(f"gain_bias_{bits}")
        return reconstruct(self._code(bits), exponent_K, scale_zero_NG, gain_bias_N, bits)

    def forward(self, x: Tensor) -> Tensor:
        if _opaque(x):
            return self.shared.trace(x, self.number)
        decoded = self.shared.decode(x, self.number)
        if decoded is not None:
            return decoded
        dispatch.refuse_capture(x, self.group_size)
        widths = self.shared.widths(x, self.number)
        tokens = x.numel() // self.in_features
        self._tokens += tokens
        read = widths * tokens if isinstance(widths, int) else widths.sum()
        self._bits_read = self._bits_read + read
        if isinstance(widths, int):
            return self._multiply(x, widths)
        # The one time that the host waits for a GPU.
        counts = (widths == widths.new_tensor(WIDTHS)[:, None]).sum(1).tolist()
        if tokens in counts:
            return self._multiply(x, WIDTHS[counts.index(tokens)])
        order = widths.argsort(stable=True)
        parts = x.reshape(-1, self.in_features)[order].split(counts)
        alike = zip(parts, WIDTHS, strict=True)
        joined_TN = torch.cat([self._multiply(part, bits) for part, bits in alike if len(part)])
        out_TN = torch.empty_like(joined_TN)
        out_TN[order] = joined_TN
        return out_TN.view(*x.shape[:-1], self.out_features)

    def pack(self) -> Digits:
        """The run-time layout; the planes, now in it, are let go."""
        bits = self.stored_bits
        gains = [self.get_buffer(f"gain_bias_{width}") for width in widths_up_to(bits)]
        digits = pack_digits(
            self._code(bits),
            self.get_buffer("exponent"),
            self.get_buffer("scale_zero"),
            torch.stack(gains),
            slices_of(bits),
        )
        for p in range(bits):
            self._empty(f"plane_{p}", 0)
        self.packed = True
        return digits

    def _code(self, bits: int) -> Tensor:
        if self.packed:
            return unpack_digits(self.shared.digits(self.number))
        return unpack_planes([self.get_buffer(f"plane_{p}") for p in range(bits)])

    def _unpack(self) -> None:
        """Planes again, and nothing remembered."""
        self._weights = {}
        if self.packed:
            # What was captured reads the layout where it lay.
            self.shared.register()
            planes = pack_planes(self._code(self.stored_bits))
            self.packed = False
            for p, plane_NW in enumerate(planes):
                self.register_buffer(f"plane_{p}", plane_NW.clone())
        self.shared.release()

    def _multiply(self, x: Tensor, bits: int) -> Tensor:
        weight_NK = self._dequantized(x, bits)
        _, bias_N = unpack_pair(self.get_buffer(f"gain_bias_{bits}"))
        if self.bias is not None:
            bias_N = bias_N + self.bias.float()
        return F.linear(x, weight_NK, bias_N.to(x.dtype))

    def _dequantized(self, x: Tensor, bits: int) -> Tensor:
        """The weight in the dtype of `x`."""
        if dispatch.packs(x, self.group_size):
            with torch.no_grad():
                return dispatch.dequantize(self.shared.digits(self.number), bits, x.dtype)
        key = (bits, x.dtype)
        found = self._weights.get(key)
        if found is None:
            if x.is_cuda:
                self._weights = {}
            # Made as an ordinary tensor, so that it also serves calls that record gradients.
            with torch.inference_mode(False), torch.no_grad():
                found = self.weight(bits).to(x.dtype)
            self._weights = {**self._weights, key: found}
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or loading the module makes every remembered weight wrong.
        self._unpack()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            # Stays packed: captured graphs read the layout where it lies.
            for p, plane_NW in enumerate(pack_planes(self._code(self.stored_bits))):
                destination[f"{prefix}plane_{p}"] = plane_NW.clone()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"max_bits={self.precision.max_bits}, bias={self.bias is not None}"
        )

    def _empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))


def _opaque(x: Tensor) -> bool:
    """Whether `torch.compile` is tracing a pass that records no gradients.

    One that does, or that is exported, is traced through, at the width that is set.
    """
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return traced and not (x.requires_grad and torch.is_grad_enabled())
