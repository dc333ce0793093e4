"""Linears of one input: run as one, tallied, and captured in a graph."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from mbq.kernels import (
    dispatch,
    triton_mixed,
    triton_narrow,
    triton_prepare,
    triton_uniform,
)
from mbq.kernels.digits import Digits, unpack_digits
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Curve, Precision
from mbq.kernels.router import Router
from mbq.kernels.shared_input import share_input
from tests.support.routers import random_router
from tests.support.weights import random_linear

COLUMNS, GROUP = 96, 32
ROWS = (70, 10, 100)
CURVES = {
    3: Curve((2.0, 2.5, 3.0), (10.0, 0.4, -10.0)),
    4: Curve((3.0, 3.5, 4.0), (10.0, -0.6, -10.0)),
    6: Curve((4.0, 5.0, 6.0), (10.0, -1.0, -10.0)),
}
ROUTERS = pytest.mark.parametrize("width", [8, 0, None])


def _linears(width: int | None, columns: int = COLUMNS) -> tuple[list[ElasticLinear], Router]:
    torch.manual_seed(1)
    precision = Precision(8)
    linears = [random_linear(rows, columns, GROUP, precision) for rows in ROWS]
    knots = 6 if width is not None else 1
    router = random_router(precision, columns, len(ROWS), width, knots)
    share_input(linears, router)
    precision.set_average_bits(3.5, CURVES)
    return linears, router


def _same(outs: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        torch.allclose(out.float(), other.float(), rtol=5e-3, atol=2e-2)
        for out, other in zip(outs, expected, strict=True)
    )


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels, in Triton's interpreter, serve float16 tokens; torch serves all others.

    Products of few tokens are cut to few programs: the interpreter runs one after another.
    """
    monkeypatch.setattr(dispatch, "packs", lambda x, _: x.dtype is torch.float16)
    monkeypatch.setattr(
        dispatch, "_narrow_tile", lambda *_: dispatch.triton_tiles.Tile(32, 1, 1, 1)
    )
    dispatch.tile.cache_clear()
    yield
    dispatch.tile.cache_clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Every launch of the kernels, to be repeated with the very same arguments."""
    seen: list[Callable[[], None]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                seen.append(lambda: self.kernel[grid](*args, **kwargs))
                self.kernel[grid](*args, **kwargs)

            return launch

    kernels = (
        (triton_prepare, "_prepare_kernel"),
        (triton_uniform, "_uniform_kernel"),
        (triton_narrow, "_narrow_kernel"),
        (triton_mixed, "_mixed_kernel"),
    )
    for module, name in kernels:
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    return seen


@ROUTERS
@torch.no_grad()
def test_together_they_give_what_each_gives_alone(
    width: int | None, launches: list[Callable[[], None]]
) -> None:
    linears, _ = _linears(width)
    x = torch.randn(2, 4, COLUMNS).half()
    outs = [linear(x) for linear in linears]
    # The tokens are prepared once, and one launch multiplies by all.
    assert len(launches) == 2
    assert [out.shape for out in outs] == [(2, 4, rows) for rows in ROWS]
    assert _same(outs, [linear(x.float()) for linear in linears])


@ROUTERS
@torch.no_grad()
def test_tallies_as_torch_does(width: int | None) -> None:
    linears, _ = _linears(width)
    for tokens in (1, 5):
        x = torch.randn(tokens, COLUMNS).half()
        for linear in linears:
            linear(x)
    decoded = [linear.tally for linear in linears]
    assert [tokens for tokens, _ in decoded] == [6] * 3
    linears[0].reset_tally()
    assert linears[0].tally == (0, 0)
    assert linears[1].tally == decoded[1]
    torch.manual_seed(5)
    x = torch.randn(4, COLUMNS)
    both = []
    for tokens in (x.half(), x.half().float()):
        for linear in linears:
            linear.reset_tally()
        for linear in linears:
            linear(tokens)
        both.append([linear.tally for linear in linears])
    assert both[0] == both[1]


@torch.no_grad()
def test_nothing_stale_is_handed_out() -> None:
    linears, _ = _linears(8)
    first, second = torch.randn(2, 3, COLUMNS).half()
    linears[0](first)
    assert _same([linears[1](second)], [linears[1](second.float())])
    outs = [linear(first) for linear in linears]
    # The same memory with other values, from the first linear on.
    first.mul_(-2.0)
    again = [linear(first) for linear in linears]
    assert not _same(again, outs)
    assert _same(again, [linear(first.float()) for linear in linears])
    # Whoever is called alone, or twice, is served too.
    assert torch.equal(linears[2](first), linears[2](first))


@ROUTERS
@torch.no_grad()
def test_a_captured_step_follows_the_width(
    width: int | None, launches: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    linears, router = _linears(width)
    x = torch.randn(3, COLUMNS).half()
    precision = linears[0].precision
    settings = {
        3.5: [partial(precision.set_average_bits, bits, CURVES) for bits in (2.5, 8.0)],
        8.0: [partial(precision.set_bits, 3), partial(precision.set_average_bits, 2.0, CURVES)],
    }
    for captured_at, later in settings.items():
        precision.set_average_bits(captured_at, CURVES)
        router.refresh()
        # Once before, as whoever captures does: then nothing but launches is left to record.
        for linear in linears:
            linear(x)
        launches.clear()
        with monkeypatch.context() as capture:
            capture.setattr(dispatch, "capturing", lambda _: True)
            capture.setattr(router, "_wanted", None)
            outs = [linear(x) for linear in linears]
        captured = list(launches)
        for set_width in (*later, partial(precision.set_bits, 6)):
            set_width()
            router.refresh()
            for replay in captured:
                replay()
            assert _same(outs, [linear(x.float()) for linear in linears])


def test_a_product_without_gradients_is_not_handed_to_whoever_wants_them() -> None:
    linears, _ = _linears(8)
    x = torch.randn(2, COLUMNS).half().requires_grad_()
    with torch.no_grad():
        linears[0](x)
    assert linears[1](x).requires_grad


@torch.no_grad()
def test_prompts_and_the_state_come_from_what_is_joined() -> None:
    linears, _ = _linears(8)
    state = [copy.deepcopy(linear.state_dict()) for linear in linears]
    linears[0].precision.set_bits(4)
    few, many = torch.randn(2, COLUMNS).half(), torch.randn(70, COLUMNS).half()
    linears[0](few)
    # All three were packed, and none keeps its planes beside that.
    assert all(linear.get_buffer("plane_0").numel() == 0 for linear in linears)
    assert _same([linears[1](many)], [linears[1](many.float())])
    place = linears[0].shared.digits(0).digits_SHBN16.data_ptr()
    for linear, before in zip(linears, state, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())
    # What a captured graph reads is where it was.
    assert linears[0].shared.digits(0).digits_SHBN16.data_ptr() == place
    assert _same([linear(few) for linear in linears], [linear(few.float()) for linear in linears])
    # Of some that are joined one is made of planes again; the others go on.
    linears[1].load_state_dict(state[1])
    assert not linears[1].packed and linears[0].packed
    assert _same([linear(few) for linear in linears], [linear(few.float()) for linear in linears])


@torch.no_grad()
def test_packed_linears_are_moved_and_shared_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, _ = _linears(8)
    state = [copy.deepcopy(linear.state_dict()) for linear in linears]
    x = torch.randn(2, COLUMNS).half()
    linears[0].precision.set_bits(4)
    expected = [linear(x) for linear in linears]
    with monkeypatch.context() as moving:
        # Planes again, one linear after the other: none is packed for another's sake.
        moving.setattr(ElasticLinear, "pack", None)
        for linear in linears:
            linear.to(torch.float64)
    for linear in linears:
        linear(x)
    share_input(linears, random_router(linears[0].precision, COLUMNS, len(ROWS), 4))
    assert _same([linear(x) for linear in linears], expected)
    for linear, before in zip(linears, state, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in linear.state_dict().items())


@torch.no_grad()
def test_what_waits_is_let_go() -> None:
    linears, _ = _linears(8)
    x = torch.randn(2, COLUMNS).half()
    linears[0].precision.set_bits(2)
    linears[0](x)
    linears[0].precision.set_bits(8)
    linears[0].shared.release()
    assert _same([linears[1](x)], [linears[1](x.float())])


def test_linears_that_share_an_input_go_as_soon_as_nobody_needs_them() -> None:
    linears, router = _linears(8)
    gone = [weakref.ref(linear) for linear in linears]
    gc.disable()
    try:
        del linears, router
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()


@torch.no_grad()
def test_a_linear_copied_alone_says_what_it_lacks() -> None:
    linears, _ = _linears(8)
    with pytest.raises(RuntimeError, match="copied without those that share its input"):
        copy.deepcopy(linears[0])(torch.randn(2, COLUMNS).half())


def test_a_copy_made_in_inference_mode_still_changes_its_width() -> None:
    linears, router = _linears(8)
    x = torch.randn(3, COLUMNS).half()
    with torch.inference_mode():
        for linear in linears:
            linear(x)
        others = copy.deepcopy(torch.nn.ModuleList([*linears, router]))
        others[0].precision.set_bits(2)
        others[3].refresh()
        out = others[0](x)
    linears[0].precision.set_bits(2)
    with torch.no_grad():
        assert _same([out], [linears[0](x)])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies_stand_on_their_own(copied: Callable[[Any], Any]) -> None:
    linears, router = _linears(8)
    x = torch.randn(3, COLUMNS).half()
    expected = [linear(x) for linear in linears]
    linears[0](x)
    others = copied(torch.nn.ModuleList([*linears, router]))
    linears[0].precision.set_bits(8)
    assert _same([linear(x) for linear in others[:3]], expected)
    assert others[0].shared is not linears[0].shared


@torch.no_grad()
def test_two_threads_that_come_first_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linears, _ = _linears(None)
    codes = [unpack_digits(copy.deepcopy(linear).pack()) for linear in linears]
    found: dict[int, torch.Tensor] = {}

    def read(number: int) -> None:
        found[number] = unpack_digits(linears[number].shared.digits(number))

    second = threading.Thread(target=read, args=(2,))
    pack = ElasticLinear.pack

    def overtaken(linear: ElasticLinear) -> Digits:
        packed = pack(linear)
        if linear is linears[0]:
            # It has to wait; one that did not would be through by then.
            second.start()
            second.join(timeout=0.5)
        return packed

    monkeypatch.setattr(ElasticLinear, "pack", overtaken)
    read(0)
    second.join()
    assert all(torch.equal(found[number], codes[number]) for number in (0, 2))
