"""Which token gets how many bits: the run-time router, one per linear INPUT.

Linears that read the same input (q, k and v; gate and up) share a router. It sees each token and
gives one score per linear and extra width, that is, every width above the lowest:

    hidden   = silu(trunk @ (x / rms(x)) + offset)
    features = [hidden, log(rms(x)^2), 1]
    score    = head @ features

A score means nothing by itself. `knots` map it to the logarithm of what the step to that width is
expected to earn for that token: nats of loss per bit read, so that the earnings of all linears
compare. One threshold for the whole model, in the same unit, then decides between the two widths
around the average that is asked: who earns at least as much gets the upper one. Steps below these
widths are always taken, those above never (nested gates: residual bits without those before them
mean nothing). The norm is a feature of its own because a linear's error grows with it;
a trunk of no rows leaves only the norm, and without features every token of a linear gets the same.

Legend: T tokens, K in_features, L linears, E extra widths, H rows of the trunk,
F features (H + 2), Q knots.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.kernels.precision import Precision
from mbq.kernels.quantize import pack_pair, unpack_pair
from mbq.kernels.widths import WIDTHS, steps_up_to, widths_up_to

# What a router makes of its buffers and the width that is set.
_MADE = ("_threshold_EL", "_bits_L1", "_on_device", "_set_to", "_seen")
# Mean square of a token that is all zeros, so that its logarithm exists.
_SMALLEST_SQUARE = 1e-30


@dataclass(frozen=True)
class Gates:
    """A router as kernels read it; float32 but for the trunk.

    Attributes:
        trunk_HK: float16.
        threshold_EL: of the extra widths that may be used, in terms of scores.
    """

    trunk_HK: Tensor
    offset_H: Tensor
    head_ELF: Tensor
    threshold_EL: Tensor


class Router(nn.Module):
    """Widths for the linears that read one input.

    Buffers, all int32 so that casting the model leaves them alone: `trunk` [H, K/2] (pairs of
    float16), and the bits of float32 in `offset` [H], `head` [E, L, F] and `knots` [E, L, 2, Q]
    (scores, then log earnings, both ascending in Q). `width` is H: with 0 there is no trunk, with
    None no head either.
    """

    def __init__(
        self,
        in_features: int,
        linears: int,
        bits: int,
        width: int | None,
        knots: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.linears = linears
        self.width = width
        self.precision = precision
        extra = len(widths_up_to(bits)) - 1
        if width:
            self._empty("trunk", width, in_features // 2)
            self._empty("offset", width)
        if width is not None:
            self._empty("head", extra, linears, width + 2)
        self._empty("knots", extra, linears, 2, knots)
        self.in_features = in_features
        # In use for the width that is set; changed in place.
        self._threshold_EL: Tensor | None = None
        self._bits_L1: Tensor | None = None
        self._bits: tuple[int, ...] = ()
        self._on_device: Gates | Tensor | None = None
        self._set_to: tuple[object, ...] | None = None
        # One object, so that threads never meet the tensor of one and the widths of another.
        self._seen: tuple[weakref.ref[Tensor], Tensor] | None = None

    def forward(self, x: Tensor, linear: int) -> Tensor | int:
        """Bits that each token of `x` [..., K] gets in one of the linears.

        Returns int64 [T], or one number where it is the same for every token.
        """
        self.refresh()
        if self.width is None:
            return self._bits[linear]
        # The first linear of a pass computes for all; the others are given the same tensor.
        seen = self._seen
        if linear == 0 or seen is None or seen[0]() is not x:
            threshold_EL = self._loaded_thresholds()
            score_ELT = self.scores(x)[: len(threshold_EL)]
            widths_LT = bits_taken(score_ELT >= threshold_EL[..., None])
            seen = self._seen = weakref.ref(x), widths_LT
        return seen[1][linear]

    def on_device(self) -> Gates | Tensor:
        """What kernels need to decide: gates, or int32 [L, 1] where all tokens are alike.

        All of it stays where it is when the width is changed.
        """
        self.refresh()
        found = self._on_device
        if found is None:
            found = self._on_device = self._bits_L1 if self.width is None else self._gates()
        assert found is not None
        return found

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Score of every token in every linear for every extra width: float32 [E, L, T]."""
        assert self.width is not None, "a router without features has no scores"
        x_TK = x.reshape(-1, x.shape[-1]).float()
        trunk_HK, offset_H = x_TK.new_zeros(0, x_TK.shape[1]), x_TK.new_zeros(0)
        if self.width:
            trunk_HK = unpack_halves(self.get_buffer("trunk"))
            offset_H = _floats(self.get_buffer("offset"))
        # Thresholds were settled on float32 scores.
        with torch.autocast(x.device.type, enabled=False):
            return score(x_TK, trunk_HK, offset_H, _floats(self.get_buffer("head")))

    def log_earnings(self, x: Tensor) -> Tensor:
        """What each step is expected to earn: float32 [E, L, T], or [E, L, 1] without features."""
        knots = _floats(self.get_buffer("knots"))
        if self.width is None:
            return interpolate(knots[:, :, 0], knots[:, :, 1], torch.zeros_like(knots[:, :, 0, :1]))
        return interpolate(knots[:, :, 0], knots[:, :, 1], self.scores(x))

    def refresh(self) -> None:
        """Bring all that depends on the width that is set in line with it (`refresh`)."""
        if self._set_to != self._state():
            refresh([self])

    def _state(self) -> tuple[object, ...]:
        precision = self.precision
        return precision.bits, precision.between, precision.log_threshold

    def _wanted(self, knots_RELQ: Tensor) -> Tensor:
        """Scores [R, E, L] from which on a step is taken, of routers with these knots."""
        earning_E = knots_RELQ.new_tensor(self.precision.log_thresholds())[: knots_RELQ.shape[1]]
        earning_REL1 = earning_E[:, None, None].expand_as(knots_RELQ[..., 0, :1])
        return invert(knots_RELQ[..., 0, :], knots_RELQ[..., 1, :], earning_REL1).squeeze(-1)

    def _loaded_thresholds(self) -> Tensor:
        """Of the steps between widths that are loaded."""
        assert self._threshold_EL is not None
        return self._threshold_EL[: len(widths_up_to(self.precision.max_bits)) - 1]

    def _gates(self) -> Gates:
        head_ELF = _floats(self.get_buffer("head"))
        trunk_HK = head_ELF.new_empty(0, self.in_features, dtype=torch.float16)
        offset_H = head_ELF.new_empty(0)
        if self.width:
            trunk_HK = self.get_buffer("trunk").view(torch.float16)
            offset_H = _floats(self.get_buffer("offset"))
        return Gates(trunk_HK, offset_H, head_ELF, self._loaded_thresholds())

    def _forget(self) -> None:
        for name in _MADE:
            setattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled, and what was made in a copy's inference mode would
        # not change in place.
        return self.__dict__ | dict.fromkeys(_MADE)

    def _empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))


@torch.no_grad()
def refresh(routers: Iterable[Router]) -> None:
    """Bring all that depends on the width that is set in line with it, in place.

    Launches that were captured in a graph see it. Routers of one model; those of one shape are
    brought in line together, by few launches.
    """
    alike: dict[tuple[object, ...], list[Router]] = {}
    for router in routers:
        knots = router.get_buffer("knots")
        alike.setdefault((router.width is None, knots.shape, knots.device), []).append(router)
    # Made as ordinary tensors, so that they can be changed in and out of inference mode.
    with torch.inference_mode(False):
        for group in alike.values():
            _refresh_alike(group)


def _refresh_alike(routers: Sequence[Router]) -> None:
    first = routers[0]
    state = first._state()
    knots = torch.stack([_floats(router.get_buffer("knots")) for router in routers])
    for router, wanted_EL in zip(routers, first._wanted(knots), strict=True):
        router._threshold_EL = _in_place(router._threshold_EL, wanted_EL)
    if first.width is None:
        thresholds = [router._loaded_thresholds() for router in routers]
        bits_RL = bits_taken(torch.stack(thresholds, dim=1) <= 0)
        for router, bits_L, bits in zip(routers, bits_RL, bits_RL.tolist(), strict=True):
            router._bits_L1 = _in_place(router._bits_L1, bits_L.int()[:, None])
            router._bits = tuple(bits)
    # Last, so that no thread takes for made what is being made.
    for router in routers:
        router._set_to = state


def bits_taken(gate_EX: Tensor) -> Tensor:
    """Bits that nested gates read: int64, without the first dimension of `gate_EX`, boolean."""
    bits_X = gate_EX.new_full(gate_EX.shape[1:], WIDTHS[0], dtype=torch.int64)
    steps = steps_up_to(WIDTHS[len(gate_EX)])
    for step, taken_X in zip(steps, gate_EX.long().cumprod(0), strict=True):
        bits_X += step * taken_X
    return bits_X


def score(x_TK: Tensor, trunk_HK: Tensor, offset_H: Tensor, head_ELF: Tensor) -> Tensor:
    """Scores float32 [E, L, T] of float32 tokens; differentiable."""
    return torch.einsum("elf,tf->elt", head_ELF, features(x_TK, trunk_HK, offset_H))


def features(x_TK: Tensor, trunk_HK: Tensor, offset_H: Tensor) -> Tensor:
    """What the head sees of each token: float32 [T, F]."""
    square_T1 = x_TK.square().mean(1, keepdim=True).clamp(min=_SMALLEST_SQUARE)
    hidden_TH = F.silu(F.linear(x_TK * square_T1.rsqrt(), trunk_HK, offset_H))
    return torch.cat((hidden_TH, square_T1.log(), torch.ones_like(square_T1)), dim=1)


def interpolate(x_Q: Tensor, y_Q: Tensor, at: Tensor) -> Tensor:
    """Piecewise linear map through knots along the last dimension, with slope 1 beyond the ends.

    Both are logarithms of much the same quantity, hence the slope. Where knots share one x, the
    map jumps there and has the higher value.
    """
    return _through(x_Q, y_Q, at, upper=True)


def invert(x_Q: Tensor, y_Q: Tensor, at: Tensor) -> Tensor:
    """The smallest x at which `interpolate(x_Q, y_Q, x)` reaches `at`."""
    return _through(y_Q, x_Q, at, upper=False)


def _through(x_Q: Tensor, y_Q: Tensor, at: Tensor, upper: bool) -> Tensor:
    """Through the knots; `upper` says which end counts where several share one x."""
    if x_Q.shape[-1] == 1:
        return y_Q + (at - x_Q)
    right = torch.searchsorted(x_Q.contiguous(), at.contiguous(), right=upper)
    right = right.clamp(1, x_Q.shape[-1] - 1)
    x0, x1 = x_Q.gather(-1, right - 1), x_Q.gather(-1, right)
    y0, y1 = y_Q.gather(-1, right - 1), y_Q.gather(-1, right)
    inside = at.clamp(x_Q[..., :1], x_Q[..., -1:])
    beyond = (at >= x1) if upper else (at > x1)
    share = torch.where(x1 > x0, (inside - x0) / (x1 - x0), beyond.to(x_Q.dtype))
    return y0 + (y1 - y0) * share + (at - inside)


def pack_halves(value_HK: Tensor) -> Tensor:
    """Float values as pairs of float16 in int32: [H, K/2]."""
    return pack_pair(*value_HK.unflatten(1, (-1, 2)).unbind(2))


def unpack_halves(packed: Tensor) -> Tensor:
    """Inverse of `pack_halves`: float32 [H, K]."""
    return torch.stack(unpack_pair(packed), dim=2).flatten(1)


def _in_place(held: Tensor | None, value: Tensor) -> Tensor:
    """The value, where the tensor that is held lies."""
    return value.clone() if held is None else held.copy_(value)


def _floats(bits: Tensor) -> Tensor:
    return bits.view(torch.float32)
