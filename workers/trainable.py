"""A linear during calibration: what is trained of it, and the codes it becomes.

Trainable are the weight in units of its initial 2-bit step, within a part of a step from its
source, the two ends of every group's range (sigmoid of a logit times the smallest and largest
weight, as in OmniQuant's learnable weight clipping, arXiv 2308.13137), and a gain and a bias per
output channel and width, the bias in units of the linear's typical output: so one set of rates
serves models of any scale. The module shows the weight that its present width would reconstruct.

Legend: N out_features, K in_features, G groups, W widths.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbq.artifacts.errors import NumericError
from mbq.kernels.fake_linear import fake_linear
from mbq.kernels.quantize import (
    dequantize,
    group_bounds,
    pack_pair,
    powers_of_two,
    quantize,
    scale_and_zero,
)
from mbq.kernels.widths import CODE_BITS, WIDTHS
from mbq.workers.gptq import MARGIN, bin_ends, round_compensated

# sigmoid(4) = 0.982: ranges start almost unclipped (OmniQuant's initial value).
_INITIAL_LOGIT = 4.0
# How far from its source a weight is trained, in initial 2-bit steps: on real inputs, what lies
# further away is worse for text that was not seen, at high widths most (benchmarks/README.md).
_FARTHEST = 0.2
_LARGEST_HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class CalibratedLinear:
    """What one linear becomes.

    Attributes:
        code_NK: uint8 [N, K].
        exponent_K: int8 [K]; the columns of what the codes stand for are times 2 to these.
        scale_zero_NG: float16 pairs in int32 [N, G].
        gain_bias_WN: float16 pairs in int32 [W, N]; rows as WIDTHS.
    """

    code_NK: Tensor
    exponent_K: Tensor
    scale_zero_NG: Tensor
    gain_bias_WN: Tensor


class TrainableLinear(nn.Module):
    """Stands in for a linear during calibration; `bits` is the width it shows.

    Args:
        output_rms: root mean square of what the linear outputs at full precision.
        exponent_K: of its columns (`balance.py`): they are quantized without these powers of two.
    """

    def __init__(
        self, linear: nn.Linear, group_size: int, output_rms: float, exponent_K: Tensor
    ) -> None:
        super().__init__()
        self.output_rms = output_rms
        self.exponent_K, self.power_K = exponent_K, powers_of_two(exponent_K)
        self.source = linear.weight
        weight_NK = self._source_NK()
        self.low_NG, self.high_NG = group_bounds(weight_NK, group_size)
        self.unit_NG, _ = scale_and_zero(self.low_NG, self.high_NG)
        self.value = nn.Parameter(weight_NK / self.unit_NG.repeat_interleave(group_size, dim=1))
        self.low_logit = nn.Parameter(torch.full_like(self.low_NG, _INITIAL_LOGIT))
        self.high_logit = nn.Parameter(torch.full_like(self.low_NG, _INITIAL_LOGIT))
        rows = len(WIDTHS), linear.out_features
        self.gain = nn.ParameterList(weight_NK.new_ones(rows).unbind())
        self.bias = nn.ParameterList(weight_NK.new_zeros(rows).unbind())
        self.original_bias = linear.bias
        self.bits = CODE_BITS

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of every group under the present ranges."""
        return scale_and_zero(
            self.low_logit.sigmoid() * self.low_NG, self.high_logit.sigmoid() * self.high_NG
        )

    def forward(self, x: Tensor) -> Tensor:
        scale_NG, zero_NG = self.grid()
        row = WIDTHS.index(self.bits)
        bias_N = self.output_rms * self.bias[row]
        if self.original_bias is not None:
            bias_N = bias_N + self.original_bias.float()
        return fake_linear(
            x,
            self.value,
            self.unit_NG,
            scale_NG,
            zero_NG,
            self.gain[row],
            bias_N,
            self.power_K,
            self.bits,
        )

    @torch.no_grad()
    def compensate(self, kept_bits: int, factors: Mapping[int, Tensor]) -> None:
        """Keep the first bits and choose those below so that they make up for each other's errors.

        Args:
            factors: `gptq.factor` of the inputs [K, K], by the widths that bits are chosen for.
        """
        grid = self.grid()
        code_NK = quantize(self.value * self._unit_NK(), *grid) if kept_bits else None
        rounded_NK = round_compensated(self._source_NK(), *grid, factors, code_NK, kept_bits)
        self.value.copy_(rounded_NK / self._unit_NK())

    @torch.no_grad()
    def correct(self, input_mean_K: Tensor, widths: Iterable[int]) -> None:
        """Set biases of widths to what these lose of the product with the mean input.

        Bias correction (arXiv 1906.04721, section 4.2).

        Args:
            input_mean_K: float32.
        """
        # Biases are in units of the output: without one there is none.
        if not self.output_rms:
            return
        grid = self.grid()
        code_NK = quantize(self.value * self._unit_NK(), *grid)
        source_NK, scaled_K = self._source_NK(), input_mean_K * self.power_K
        for bits in widths:
            row = WIDTHS.index(bits)
            weight_NK = self.gain[row][:, None] * dequantize(code_NK, *grid, bits)
            self.bias[row].copy_((source_NK - weight_NK) @ scaled_K / self.output_rms)

    @torch.no_grad()
    def finish(self) -> CalibratedLinear:
        """The codes; the module itself then shows exactly these at every width.

        Raises:
            NumericError: a gain or a bias is more than float16 can hold.
        """
        grid = self.grid()
        code_NK = quantize(self.value * self._unit_NK(), *grid)
        self.value.copy_(dequantize(code_NK, *grid, CODE_BITS) / self._unit_NK())
        gain_WN, bias_WN = torch.stack([*self.gain]), self.output_rms * torch.stack([*self.bias])
        largest = max(gain_WN.abs().max().item(), bias_WN.abs().max().item())
        if not largest <= _LARGEST_HALF:
            raise NumericError(
                f"a gain or bias is {largest:.3g}, and float16 ends at {_LARGEST_HALF:,.0f}: look "
                "at what the model's linears output, or lower optimisation.gain_rate"
            )
        return CalibratedLinear(
            code_NK.cpu(),
            self.exponent_K.cpu(),
            pack_pair(*grid).cpu(),
            pack_pair(gain_WN, bias_WN).cpu(),
        )

    @torch.no_grad()
    def limits(self, kept_bits: int) -> tuple[Tensor, Tensor]:
        """Values [N, K] between which a weight is trained: near its source, in a kept bin.

        Args:
            kept_bits: the first bits, which stay as they are under the present ranges; 0 for none.
        """
        source_NK = self._source_NK() / self._unit_NK()
        low_NK, high_NK = source_NK - _FARTHEST, source_NK + _FARTHEST
        if not kept_bits:
            return low_NK, high_NK
        scale_NG, zero_NG = self.grid()
        code_NK = quantize(self.value * self._unit_NK(), scale_NG, zero_NG)
        first_NK = code_NK >> (CODE_BITS - kept_bits)
        group_size = code_NK.shape[1] // scale_NG.shape[1]
        scale_NK, zero_NK = (
            t.repeat_interleave(group_size, dim=1) for t in (scale_NG / self.unit_NG, zero_NG)
        )
        bin_NK = [(end - zero_NK) * scale_NK for end in bin_ends(first_NK, kept_bits, MARGIN)]
        return low_NK.clamp(*bin_NK), high_NK.clamp(*bin_NK)

    def _source_NK(self) -> Tensor:
        return self.source.detach().float() / self.power_K

    def _unit_NK(self) -> Tensor:
        group_size = self.value.shape[1] // self.unit_NG.shape[1]
        return self.unit_NG.repeat_interleave(group_size, dim=1)
