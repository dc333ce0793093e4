"""Elastic linears in what `torch.compile` makes: one operator for those of an input."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, library, nn

from mbq.kernels import dispatch
from mbq.kernels.precision import Curve, Precision
from mbq.kernels.shared_input import multiply_shared, share_input
from tests.support.routers import random_router
from tests.support.weights import random_linear

COLUMNS, GROUP = 96, 32
ROWS = (70, 10, 96)
CURVES = {
    3: Curve((2.0, 2.5, 3.0), (10.0, 0.4, -10.0)),
    4: Curve((3.0, 3.5, 4.0), (10.0, -0.6, -10.0)),
    6: Curve((4.0, 5.0, 6.0), (10.0, -1.0, -10.0)),
}


class Sum(nn.Module):
    """Three linears of one input, and a fourth that reads what they make."""

    def __init__(self, width: int | None, biased: bool) -> None:
        super().__init__()
        self.precision = Precision(8)
        bias = nn.Parameter(torch.randn(ROWS[0])) if biased else None
        self.first = random_linear(ROWS[0], COLUMNS, GROUP, self.precision, bias)
        self.second = random_linear(ROWS[1], COLUMNS, GROUP, self.precision)
        self.third = random_linear(ROWS[2], COLUMNS, GROUP, self.precision)
        self.last = random_linear(5, COLUMNS, GROUP, self.precision)
        knots = 6 if width is not None else 1
        inputs = ([self.first, self.second, self.third], [self.last])
        self.routers = nn.ModuleList(
            random_router(self.precision, COLUMNS, len(linears), width, knots) for linears in inputs
        )
        for linears, router in zip(inputs, self.routers, strict=True):
            share_input(linears, router)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.third(x).sin())
        return made + self.first(x).mean(-1, keepdim=True) - self.second(x).amax(-1, keepdim=True)


@pytest.fixture
def graphs() -> list[fx.GraphModule]:
    """What was compiled, run as it is."""
    return []


@pytest.fixture
def compiled(graphs: list[fx.GraphModule]) -> Callable[[nn.Module], Any]:
    def keep(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    return lambda module: torch.compile(module, backend=keep, fullgraph=True)


@pytest.fixture(params=["torch", "kernels"])
def x(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Tokens that torch multiplies, or kernels in Triton's interpreter."""
    if request.param == "torch":
        return torch.randn(2, 6, COLUMNS)
    monkeypatch.setattr(dispatch, "packs", lambda x, _: x.dtype is torch.float16)
    return torch.randn(2, 6, COLUMNS).half()


def _operators(graph: fx.GraphModule) -> int:
    return sum("multiply_shared" in str(node.target) for node in graph.graph.nodes)


@pytest.mark.parametrize(
    ("width", "x"), [(8, "torch"), (0, "torch"), (None, "torch"), (8, "kernels")], indirect=["x"]
)
@torch.no_grad()
def test_a_new_width_compiles_nothing(
    width: int | None, x: Tensor, graphs: list[fx.GraphModule], compiled: Callable[..., Any]
) -> None:
    module = Sum(width, biased=True)
    fast = compiled(module)
    for average in (2.5, 5.1, 8.0):
        module.precision.set_average_bits(average, CURVES)
        assert torch.allclose(fast(x), module(x), rtol=5e-3, atol=3e-2)
    for bits in (3, 6):
        module.precision.set_bits(bits)
        assert torch.allclose(fast(x), module(x), rtol=5e-3, atol=3e-2)
    # One for the three that read the same tokens, one for the fourth.
    (graph,) = graphs
    assert _operators(graph) == 2


@torch.no_grad()
def test_tallies_go_on(x: Tensor, compiled: Callable[..., Any]) -> None:
    module = Sum(8, biased=False)
    module.precision.set_bits(3)
    fast = compiled(module)
    for _ in range(3):
        fast(x)
    assert module.first.tally == module.last.tally == (36, 108)


@torch.no_grad()
def test_a_copy_has_a_width_of_its_own(x: Tensor, compiled: Callable[..., Any]) -> None:
    module = Sum(8, biased=False)
    other = copy.deepcopy(module)
    module.precision.set_bits(2)
    other.precision.set_bits(8)
    at_two, at_eight = compiled(module)(x), compiled(other)(x)
    # A compiled sum is rounded once, not after every term.
    assert torch.allclose(at_two, module(x), rtol=5e-3, atol=3e-2)
    assert torch.allclose(at_eight, other(x), rtol=5e-3, atol=3e-2)
    assert not torch.allclose(at_two, at_eight)


@torch.no_grad()
def test_what_was_captured_is_made_anew_when_the_model_moves(
    monkeypatch: pytest.MonkeyPatch, graphs: list[fx.GraphModule], compiled: Callable[..., Any]
) -> None:
    monkeypatch.setattr(dispatch, "packs", lambda x, _: x.dtype is torch.float16)
    module, x = Sum(None, biased=False), torch.randn(12, COLUMNS).half()
    module.precision.set_bits(2)
    fast = compiled(module)
    before = fast(x)
    # The planes are packed again, and lie elsewhere then.
    module.to("cpu")
    assert torch.equal(fast(x), before)
    assert len(graphs) == 2


@torch.no_grad()
def test_no_width_is_captured(
    monkeypatch: pytest.MonkeyPatch, compiled: Callable[..., Any]
) -> None:
    """Many tokens are multiplied at the width that the host knows, which a replay would keep."""
    module, many = Sum(8, biased=False), torch.randn(70, COLUMNS).half()
    monkeypatch.setattr(dispatch, "capturing", lambda _: True)
    for step in (compiled(module), module):
        with pytest.raises(RuntimeError, match=r"70 tokens in torch\.float16 cannot be captured"):
            step(many)
    # Torch multiplies these, too, however few they are.
    with pytest.raises(RuntimeError, match=r"3 tokens in torch\.float32 .* up to 32 tokens in 16"):
        module(torch.randn(3, COLUMNS))


def test_gradients_are_those_of_an_eager_model(
    graphs: list[fx.GraphModule], compiled: Callable[..., Any]
) -> None:
    module = Sum(8, biased=True)
    module.precision.set_bits(4)
    x = torch.randn(3, COLUMNS, requires_grad=True)
    fast = compiled(module)
    (found,) = torch.autograd.grad(fast(x).sum(), x)
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(_operators(graph) for graph in graphs)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_an_exported_program_needs_no_linears(strict: bool) -> None:
    module = Sum(8, biased=True)
    module.precision.set_bits(3)
    x = torch.randn(4, COLUMNS)
    program = torch.export.export(module, (x,), strict=strict)
    expected = module(x)
    assert not _operators(program.graph_module)
    assert torch.allclose(program.module()(x), expected, rtol=1e-4, atol=1e-4)


def test_the_operator_is_what_torch_takes_it_for(x: Tensor) -> None:
    module = Sum(8, biased=False)
    module.precision.set_bits(3)
    library.opcheck(multiply_shared, (x, module.last.shared._number, 128))
