"""A model that was warmed up makes nothing more, whatever it is asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.loading import load_model
from mbq.kernels import (
    dispatch,
    triton_dequantize,
    triton_mixed,
    triton_narrow,
    triton_prepare,
    triton_uniform,
)
from mbq.kernels.widths import WIDTHS

KERNELS = (
    (triton_prepare, "_prepare_kernel"),
    (triton_narrow, "_narrow_kernel"),
    (triton_uniform, "_uniform_kernel"),
    (triton_mixed, "_mixed_kernel"),
    (triton_dequantize, "_dequantize_kernel"),
)


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, in Triton's interpreter, serve float16 tokens."""
    monkeypatch.setattr(dispatch, "packs", lambda x, _: x.dtype is torch.float16)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """What a compiler is asked for: kernels, their constants, and what is absent. None is run."""
    asked: set[Any] = set()

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **constants: Any) -> None:
                kinds = tuple(getattr(arg, "dtype", type(arg)) for arg in args)
                asked.add((self.name, kinds, tuple(sorted(constants.items()))))

            return launch

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Recorded(name))
    return asked


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("tokens", [1, 3, 5, 16, 66])
@torch.no_grad()
def test_no_width_asks_for_more(
    finished_run: Any, compiled: set[Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = load_model(finished_run.checkpoint, dtype=torch.float16)
    model.set_average_bits(2.5)
    model.warm_up(({3: 4, 5: 8}.get(tokens, tokens),))
    warmed = set(compiled)
    assert warmed
    ids = torch.arange(tokens)[None] % 320
    model(ids)
    for bits in WIDTHS:
        model.set_bits(bits)
        model(ids)
    assert compiled == warmed
    if tokens <= 64:
        monkeypatch.setattr(dispatch, "capturing", lambda _: True)
        model(ids)
        assert compiled == warmed


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_nothing_is_counted(finished_run: Any, compiled: set[Any]) -> None:
    model: Any = load_model(finished_run.checkpoint, dtype=torch.float16)
    model.warm_up([1])
    assert compiled
    with pytest.raises(InputError, match="no token has been processed"):
        model.realised_bits()


def test_where_torch_multiplies_nothing_is_made(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    model.warm_up()
    assert not any(linear._weights for linear in elastic_linears(model))


@pytest.mark.parametrize("tokens", [0, -3, 1.5, "8"])
def test_refuses_no_tokens(finished_run: Any, tokens: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    with pytest.raises(InputError, match=f"tokens {tokens!r}: give whole numbers"):
        model.warm_up([1, tokens])
