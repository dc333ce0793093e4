"""A linear layer that runs at any stored number of slices.

It holds the published bit planes and, per slice count, a gain and a bias per output channel:

    y = gain_k * (x @ w_k.T) + bias_k + bias

All elastic linears of a model share one `Precision`, so changing the width of the whole model is
one assignment. Unpacking a weight costs more than multiplying by it, so the dequantized weight is
kept in the dtype of its input: on a CPU for every slice count used so far, on a GPU, where memory
is short, for the last one only.

Legend: N out_features, K in_features, G groups, S slices, W words (K / 32).
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.kernels.bitplanes import WORD_BITS, unpack_planes
from mbq.kernels.quantize import SLICE_BITS, dequantize, unpack_pair


class Precision:
    """How many slices the linears of one model use; `max_slices` are loaded."""

    def __init__(self, max_slices: int) -> None:
        self.max_slices = max_slices
        self.slices = max_slices

    def set_bits(self, bits: int) -> None:
        """Use `bits` bits per weight from the next forward pass on.

        Raises:
            ValueError: no whole number of the loaded slices has that many bits.
        """
        widths = [SLICE_BITS * k for k in range(1, self.max_slices + 1)]
        if bits not in widths:
            raise ValueError(f"bits {bits} must be one of {widths}, the widths that are loaded")
        self.slices = bits // SLICE_BITS


class ElasticLinear(nn.Module):
    """Replaces `nn.Linear`; `precision` may be shared with other linears.

    Buffers: `plane_0` ... `plane_{2S-1}` int32 [N, K/32], `scale_zero` int32 [N, G] and
    `gain_bias_1` ... `gain_bias_S` int32 [N]; the pairs are float16 in one int32 so that casting
    the model leaves them alone.
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
        self.precision = precision
        for p in range(SLICE_BITS * precision.max_slices):
            self._empty(f"plane_{p}", out_features, in_features // WORD_BITS)
        self._empty("scale_zero", out_features, in_features // group_size)
        for k in range(1, precision.max_slices + 1):
            self._empty(f"gain_bias_{k}", out_features)
        self.bias = bias
        self._weights: dict[tuple[int, torch.dtype], Tensor] = {}

    def weight(self, slices: int) -> Tensor:
        """Dequantized weight at a slice count, gain included: float32 [N, K]."""
        planes = [self.get_buffer(f"plane_{p}") for p in range(SLICE_BITS * slices)]
        scale_NG, zero_NG = unpack_pair(self.get_buffer("scale_zero"))
        gain_N, _ = unpack_pair(self.get_buffer(f"gain_bias_{slices}"))
        return dequantize(unpack_planes(planes), scale_NG, zero_NG, slices).mul_(gain_N[:, None])

    def forward(self, x: Tensor) -> Tensor:
        slices = self.precision.slices
        key = (slices, x.dtype)
        if key not in self._weights:
            if x.is_cuda:
                self._weights = {}
            # Made as an ordinary tensor, so that it also serves calls that record gradients.
            with torch.inference_mode(False), torch.no_grad():
                self._weights[key] = self.weight(slices).to(x.dtype)
        _, bias_N = unpack_pair(self.get_buffer(f"gain_bias_{slices}"))
        if self.bias is not None:
            bias_N = bias_N + self.bias.float()
        return F.linear(x, self._weights[key], bias_N.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moving or loading the module makes every remembered weight wrong.
        self._weights = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._weights = {}
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"max_bits={SLICE_BITS * self.precision.max_slices}, bias={self.bias is not None}"
        )

    def _empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
