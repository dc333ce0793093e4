"""Linears that read the same input, run as one where kernels serve them.

Query, key and value, or gate and up: whichever is called first prepares the tokens, lets the router
decide for all, and multiplies by all; the others find their product waiting. Elsewhere each linear
asks for its widths and multiplies alone.

A launch captured in a graph always asks the router on the device, even where all tokens have one
width: replayed, it follows whatever width was set last.

For `torch.compile` all linears of an input are one operator, which decides when it is called: a
width that is set later compiles nothing anew.

Legend: N out_features, N' N padded (`digits.py`), K in_features, T tokens, L linears.
"""

import itertools
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library, nn

from mbq.kernels import dispatch
from mbq.kernels.digits import MOST_LINEARS, Digits, join_digits, part_of, sides, starts_of
from mbq.kernels.router import Gates, Router

if TYPE_CHECKING:
    from mbq.kernels.linear import ElasticLinear

# By number, which stands for one in what `torch.compile` makes.
_SHARED: "weakref.WeakValueDictionary[int, SharedInput]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()


class SharedInput:
    """What the linears of one input share; `router` answers `router(x, number)` with widths."""

    def __init__(self, linears: Sequence["ElasticLinear"], router: nn.Module | None) -> None:
        # Each of them holds this: held weakly, a block goes as soon as nobody needs it.
        self._linears = tuple(weakref.ref(linear) for linear in linears)
        self.router = router
        self._out_features = tuple(linear.out_features for linear in linears)
        self._starts = starts_of(self._out_features)
        self.register()
        self._digits: Digits | None = None
        # One thread makes the layout, others wait for it.
        self._packing = threading.RLock()
        self._tally_2L: Tensor | None = None
        # One object, so that threads never meet the tensor of one and the products of another.
        self._waiting: tuple[weakref.ref[Tensor], dict[int, Tensor]] | None = None
        # The same while `torch.compile` traces, which knows no weak references.
        self._traced: tuple[Tensor, dict[int, Tensor]] | None = None

    @property
    def linears(self) -> tuple["ElasticLinear", ...]:
        """Those that share the input."""
        found = tuple(linear for ref in self._linears if (linear := ref()) is not None)
        if len(found) < len(self._linears):
            raise RuntimeError("a linear was copied without those that share its input; copy both")
        return found

    def widths(self, x: Tensor, number: int) -> Tensor | int:
        """Bits that each token of `x` [..., K] gets in one linear: int64 [T], or one for all."""
        uniform = self.linears[0].precision.bits
        if uniform is not None:
            return uniform
        if self.router is None:
            raise RuntimeError("the tokens of this linear are to be routed, but it has no router")
        widths: Tensor | int = self.router(x, number)
        return widths

    def decode(self, x: Tensor, number: int) -> Tensor | None:
        """Few tokens [..., K] times the codes of one linear: [..., N], gain and bias included.

        None where kernels do not serve these tokens.
        """
        waiting = self._waiting
        recorded = x.requires_grad and torch.is_grad_enabled()
        if recorded or waiting is None or waiting[0]() is not x or number not in waiting[1]:
            out = self._decode(x)
            if out is None:
                return None
            waiting = self._waiting = weakref.ref(x), dict(enumerate(self._sides(out)))
        return waiting[1].pop(number)

    def trace(self, x: Tensor, number: int) -> Tensor:
        """What `torch.compile` makes of tokens [..., K] times one linear: [..., N]."""
        traced = self._traced
        if traced is None or traced[0] is not x or number not in traced[1]:
            out = multiply_shared(x, self._number, self._starts[-1])
            traced = x, dict(enumerate(self._sides(out)))
        product = traced[1].pop(number)
        self._traced = traced if traced[1] else None
        return product

    def multiply_all(self, x: Tensor) -> Tensor:
        """Tokens [..., K] times all linears, side by side: [..., N'].

        Where kernels serve the tokens the router is asked on the device, as in a graph: what
        `torch.compile` makes may be captured after any call.

        Raises:
            RuntimeError: tokens that kernels do not serve are being captured in a graph.
        """
        out = self._decode(x, compiled=True)
        if out is None:
            dispatch.refuse_capture(x, self.linears[0].group_size)
            out = x.new_zeros(*x.shape[:-1], self._starts[-1])
            for linear, side in zip(self.linears, self._sides(out), strict=True):
                side.copy_(linear(x))
        return out

    def digits(self, number: int) -> Digits:
        """The run-time layout of one linear."""
        with self._packing:
            if not self.linears[number].packed:
                self._packed()
            assert self._digits is not None
            return part_of(self._digits, number)

    def tally(self, number: int) -> tuple[int, int]:
        """Tokens that one linear decoded, and the bits that they read."""
        if self._tally_2L is None:
            return 0, 0
        tokens, bits = self._tally_2L[:, number].tolist()
        return tokens, bits

    def reset_tally(self, number: int) -> None:
        """Forget those of one linear."""
        if self._tally_2L is not None:
            self._tally_2L[:, number] = 0

    def release(self) -> None:
        """Let go of products nobody asked for, and of a layout that no linear needs any more."""
        self._waiting = self._traced = None
        if not any(linear.packed for linear in self.linears):
            self._digits = None

    def _decode(self, x: Tensor, compiled: bool = False) -> Tensor | None:
        """Few tokens times all linears: [..., N']; None where kernels do not serve them."""
        linears = self.linears
        first = linears[0]
        tokens = x.numel() // first.in_features
        served = dispatch.decodes(x, tokens, first.group_size)
        if not served or len(linears) > MOST_LINEARS:
            return None
        with torch.no_grad():
            out = dispatch.decode(
                x.reshape(tokens, first.in_features),
                self._widths_of_all(x, compiled or dispatch.capturing(x)),
                first.stored_bits,
                self._packed(),
                self._tally(x.device),
            ).view(*x.shape[:-1], -1)
            biases = [linear.bias for linear in linears]
            if any(bias is not None for bias in biases):
                for bias, side in zip(biases, self._sides(out), strict=True):
                    if bias is not None:
                        side += bias
        return out

    def _sides(self, out: Tensor) -> tuple[Tensor, ...]:
        return sides(out, self._starts, self._out_features)

    def _widths_of_all(self, x: Tensor, on_device: bool) -> int | Tensor | Gates:
        """Widths as the kernel takes them; those of a router stay on the device."""
        uniform = self.linears[0].precision.bits
        if isinstance(self.router, Router):
            if uniform is None or on_device:
                return self.router.on_device()
            # A capture must find it made, not record how it is made.
            self.router.refresh()
        if uniform is not None:
            return uniform
        tokens = x.numel() // x.shape[-1]
        found = [self.widths(x, number) for number in range(len(self.linears))]
        return torch.stack([torch.as_tensor(w, device=x.device).expand(tokens) for w in found])

    def _packed(self) -> Digits:
        """All linears in the run-time layout; their planes, now in it, are let go."""
        with self._packing:
            if self._digits is None or not all(linear.packed for linear in self.linears):
                with torch.inference_mode(False), torch.no_grad():
                    parts = [
                        self.digits(number) if linear.packed else linear.pack()
                        for number, linear in enumerate(self.linears)
                    ]
                    self._digits = join_digits(parts)
                if self._digits.digits_SHBN16.is_cuda:
                    # Kernels read it before they wait for the launches before them to end.
                    torch.cuda.synchronize(self._digits.digits_SHBN16.device)
            return self._digits

    def _tally(self, device: torch.device) -> Tensor:
        if self._tally_2L is None or self._tally_2L.device != device:
            with torch.inference_mode(False):
                fresh = torch.zeros(2, len(self.linears), dtype=torch.int64, device=device)
                self._tally_2L = fresh if self._tally_2L is None else self._tally_2L.to(device)
        return self._tally_2L

    def __getstate__(self) -> dict[str, Any]:
        # Weak references and locks cannot be pickled. A copy begins to count anew.
        fresh = dict.fromkeys(("_waiting", "_traced", "_tally_2L", "_packing"))
        return self.__dict__ | fresh | {"_linears": self.linears}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._packing = threading.RLock()
        self._linears = tuple(weakref.ref(linear) for linear in state["_linears"])
        self.register()

    def register(self) -> None:
        """Be another one to what `torch.compile` made: that is made anew."""
        self._number = next(_NUMBERS)
        _SHARED[self._number] = self


@library.custom_op("mbq::multiply_shared", mutates_args=())
def multiply_shared(x: Tensor, shared: int, rows: int) -> Tensor:
    """`SharedInput.multiply_all` by number; `rows` is N'."""
    return _SHARED[shared].multiply_all(x)


@multiply_shared.register_fake
def _(x: Tensor, shared: int, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def share_input(linears: Sequence["ElasticLinear"], router: nn.Module | None) -> None:
    """Run linears that read the same input together; a router decides where it is left to one."""
    shared = SharedInput(linears, router)
    for number, linear in enumerate(linears):
        linear.share(shared, number)
