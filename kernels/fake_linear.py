"""A linear layer with fake-quantized weights that remembers no quantized copy of them.

Training on the joint loss over several widths would, in plain autograd, keep one quantized
weight per linear alive until its backward pass: more memory than the weight itself. `fake_linear`
keeps only what exists anyway and computes the quantized weight again when gradients are due.

The trainable weight is stored in units of the group's initial 2-bit step (`weight = unit * value`),
so that one learning rate fits every linear of every model.

Gradients pass the floor straight through inside the range and stop outside it. With
u = value * unit / s + z, q = (floor(2^(b-2) u) + 1/2) / 2^(b-2) and w_b = s (q - z) at b bits:

    dw_b/dvalue = unit [in],   dw_b/ds = q - z - [in] value unit / s,   dw_b/dz = s ([in] - 1)

where [in] is 1 for 0 <= u < 4 and 0 elsewhere.

Legend: N out_features, K in_features, G groups, g inputs per group, T tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def fake_weight(
    value_NK: Tensor, unit_NG: Tensor, scale_NG: Tensor, zero_NG: Tensor, bits: int
) -> Tensor:
    """Weight as `bits` bits will reconstruct it: float32 [N, K]; no gradient."""
    weight_NGg, _ = _bins(value_NK, unit_NG, scale_NG, zero_NG, bits)
    return weight_NGg.sub_(zero_NG[..., None]).mul_(scale_NG[..., None]).flatten(1)


def fake_linear(
    x_TK: Tensor,
    value_NK: Tensor,
    unit_NG: Tensor,
    scale_NG: Tensor,
    zero_NG: Tensor,
    gain_N: Tensor,
    bias_N: Tensor,
    power_K: Tensor,
    bits: int,
) -> Tensor:
    """`x @ (gain * w_b * power).T + bias`, differentiable in all but `unit` and `power`.

    `x_TK` may have any number of leading dimensions and any float dtype; the product is computed
    in that dtype, the quantization in float32.
    """
    out: Tensor = _FakeLinear.apply(  # type: ignore[no-untyped-call]
        x_TK.flatten(0, -2), value_NK, unit_NG, scale_NG, zero_NG, gain_N, bias_N, power_K, bits
    )
    # Not inside: what a function returns cannot be changed in place, as models do, if it is a view.
    return out.reshape(*x_TK.shape[:-1], -1)


def _bins(
    value_NK: Tensor, unit_NG: Tensor, scale_NG: Tensor, zero_NG: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Quantized position q and exact position u of every weight, in 2-bit bins: [N, G, g]."""
    ratio_NG1 = (unit_NG / scale_NG)[..., None]
    exact = torch.addcmul(
        zero_NG[..., None], value_NK.unflatten(1, (unit_NG.shape[1], -1)), ratio_NG1
    )
    bins = 2**bits
    quantized = (exact * (bins / 4)).floor_().clamp_(0, bins - 1).add_(0.5).mul_(4 / bins)
    return quantized, exact


class _FakeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        value, unit, scale, zero, gain, bias, power, bits = parameters
        ctx.save_for_backward(x, value, unit, scale, zero, gain, power)
        ctx.bits = bits
        weight = fake_weight(value, unit, scale, zero, bits).mul_(gain[:, None]).mul_(power)
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        x, value, unit, scale, zero, gain, power = ctx.saved_tensors
        (grad_TN,) = grad_outputs
        quantized, exact = _bins(value, unit, scale, zero, ctx.bits)
        inside = (exact >= 0) & (exact < 4)

        weight = (quantized - zero[..., None]).mul_(scale[..., None]).flatten(1)
        scaled = (weight * gain[:, None]).mul_(power).to(x.dtype)
        grad_x = grad_TN @ scaled if ctx.needs_input_grad[0] else None

        grad_weight = (grad_TN.T @ x).float().mul_(power)
        grad_gain = (grad_weight * weight).sum(1)
        grad_weight = grad_weight.mul_(gain[:, None]).unflatten(1, (unit.shape[1], -1))
        grad_inside = grad_weight * inside

        grad_zero = (grad_inside.sum(2) - grad_weight.sum(2)) * scale
        # dw/ds = (q - z) - [in] (u - z): the distance the quantizer moved the weight, in bins.
        grad_scale = (grad_weight * (quantized - zero[..., None])).sum(2)
        grad_scale -= (grad_inside * (exact - zero[..., None])).sum(2)
        grad_value = grad_inside.mul_(unit[..., None]).flatten(1)
        return (
            grad_x,
            grad_value,
            None,
            grad_scale,
            grad_zero,
            grad_gain,
            grad_TN.float().sum(0),
            None,
            None,
        )
