"""Sensitivities against plain autograd through the whole model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MistralConfig, Qwen3Config

from mbq.artifacts.errors import NumericError
from mbq.artifacts.source import open_source
from mbq.workers.model import linears, open_model
from mbq.workers.sensitivity import backward_block, importance, measure_sensitivity

IDS = torch.arange(5 * 24).view(5, 24) * 7 % 320


def _by_autograd(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def keep(module: object, arguments: object, out: torch.Tensor) -> None:
            out.retain_grad()
            outputs[name] = out

        return keep

    for index, block in enumerate(model.model.layers):
        for name, linear in linears(block).items():
            linear.register_forward_hook(watch(f"model.layers.{index}.{name}"))
    logits = model(IDS).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum").backward()
    found = {}
    for name, out in outputs.items():
        assert out.grad is not None
        found[name] = out.grad.square().mean((0, 1))
    return found


@pytest.mark.parametrize("kind", [None, Qwen3Config, MistralConfig])
def test_equals_the_mean_squared_gradient(make_model: Callable[..., Path], kind: type) -> None:
    folder = make_model() if kind is None else make_model(kind)
    model = open_model(open_source(str(folder), "main"), torch.float32, torch.device("cpu"))
    expected = _by_autograd(folder)
    seen: list[float] = []
    for microbatch in (2, 5):
        found = measure_sensitivity(model, IDS, microbatch, seen.append)
        assert list(found) == sorted(expected)
        for name, expected_N in expected.items():
            assert torch.allclose(found[name], expected_N, rtol=1e-3, atol=1e-3 * expected_N.mean())
    assert seen[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.float32, "look at the model's weights"), (torch.bfloat16, "use dtype float32")],
)
def test_gradients_that_are_not_finite_are_an_error(
    tiny_model: Path, dtype: torch.dtype, remedy: str
) -> None:
    model = open_model(open_source(str(tiny_model), "main"), dtype, torch.device("cpu"))
    hidden_BTH = torch.ones(1, 4, model.config.hidden_size, dtype=dtype)
    with pytest.raises(NumericError, match=f"are not finite; {remedy}"):
        backward_block(model, 1, hidden_BTH, hidden_BTH * torch.nan, 1)


def test_channels_count_by_one_on_average() -> None:
    assert torch.equal(importance(torch.tensor([0.0, 1.0, 3.0])), torch.tensor([0.0, 0.75, 2.25]))
    assert torch.equal(importance(torch.zeros(3)), torch.ones(3))
    # A mean that is no number any more.
    assert torch.equal(importance(torch.tensor([1e-45] + 999 * [0.0])), torch.ones(1000))
