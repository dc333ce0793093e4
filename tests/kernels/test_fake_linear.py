"""Fake quantization: values against the ladder, gradients against plain autograd."""

import pytest
import torch
from torch import Tensor

from mbq.kernels.fake_linear import fake_linear, fake_weight
from mbq.kernels.quantize import dequantize, group_bounds, quantize, scale_and_zero

ROWS, COLUMNS, GROUP = 6, 96, 32


def _setup(clip: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    low, high = group_bounds(weight, GROUP)
    unit, _ = scale_and_zero(low, high)
    scale, zero = scale_and_zero(clip * low, clip * high)
    return weight / unit.repeat_interleave(GROUP, 1), unit, scale, zero


def _constants() -> tuple[Tensor, Tensor, Tensor]:
    """Gains, biases and powers that change nothing."""
    return torch.ones(ROWS), torch.zeros(ROWS), torch.ones(COLUMNS)


def _plain(
    x: Tensor,
    value: Tensor,
    unit: Tensor,
    scale: Tensor,
    zero: Tensor,
    gain: Tensor,
    bias: Tensor,
    power: Tensor,
    bits: int,
) -> Tensor:
    """The definition with a straight-through floor, left to autograd."""
    weight = value.unflatten(1, (-1, GROUP)) * unit[..., None]
    exact = weight / scale[..., None] + zero[..., None]
    clamped = exact.clamp(0, 4 - 1e-6)
    bins = 2.0 ** (bits - 2)
    quantized = ((clamped * bins).floor() + 0.5) / bins
    straight = clamped + (quantized - clamped).detach()
    rebuilt = ((straight - zero[..., None]) * scale[..., None]).flatten(1)
    return x @ (rebuilt * gain[:, None] * power).T + bias


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_gradients_equal_plain_autograd(bits: int, clip: float) -> None:
    generator = torch.Generator().manual_seed(2)
    value, unit, scale, zero = _setup(clip)
    x = torch.randn(2, 5, COLUMNS, generator=generator)
    gain = 1 + 0.1 * torch.randn(ROWS, generator=generator)
    bias = torch.randn(ROWS, generator=generator)
    power = 0.5 + torch.rand(COLUMNS, generator=generator)
    upstream = torch.randn(2, 5, ROWS, generator=generator)
    results = []
    for function in (fake_linear, _plain):
        leaves = [t.clone().requires_grad_() for t in (x, value, scale, zero, gain, bias)]
        out = function(leaves[0], leaves[1], unit, *leaves[2:], power, bits)
        out.backward(upstream)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_shows_the_weight_that_will_be_stored(bits: int) -> None:
    value, unit, scale, zero = _setup(0.9)
    weight = value * unit.repeat_interleave(GROUP, 1)
    stored = dequantize(quantize(weight, scale, zero), scale, zero, bits)
    shown = fake_weight(value, unit, scale, zero, bits)
    # A weight on the edge of a bin may fall to either side; there are next to none.
    assert ((stored - shown).abs() > 1e-5).float().mean() < 1e-3


def test_keeps_no_quantized_copy_for_the_backward_pass() -> None:
    value, unit, scale, zero = _setup(1.0)
    value.requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(3, COLUMNS)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake_linear(x, value, unit, scale, zero, *_constants(), 4)
    of_weight_size = [tensor for tensor in saved if tensor.shape == value.shape]
    assert [tensor.data_ptr() for tensor in of_weight_size] == [value.data_ptr()]


def test_computes_in_the_dtype_of_its_input() -> None:
    value, unit, scale, zero = _setup(1.0)
    x = torch.randn(3, COLUMNS).bfloat16()
    arguments = (value, unit, scale, zero, *_constants(), 8)
    out = fake_linear(x, *arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), fake_linear(x.float(), *arguments), rtol=0.05, atol=0.2)
