"""What PTX instructions compute from registers alone, on numpy arrays of an element a lane.

`OPERATIONS` has, by opcode, a function and the types that it takes and makes. What an opcode is not
listed for is not supported. Types are PTX's, and `f16x2`, `s8x4` and such, of which an array has a
row a lane. Results are those of the PTX manual, but for

  - `fma.f32`, which rounds a float64 sum: once in about 2^29 that is a last bit;
  - what is only approximate, which is accurate here;
  - products of matrices of float16, summed in float64 and rounded once. Those of int8 are exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Function = Callable[..., Array]

_SIGNED = ("s8", "s16", "s32", "s64")
_INTEGERS = (*_SIGNED, "u8", "u16", "u32", "u64")
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}

# bfloat16 is unknown to numpy: its bits.
TYPES: dict[str, np.dtype[Any]] = {"pred": np.dtype(bool), "bf16": np.dtype("u2")}
TYPES |= {f"{sign}{8 * size}": np.dtype(f"u{size}") for sign, size in product("bu", (1, 2, 4, 8))}
TYPES |= {f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)}
TYPES |= {f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)}
# Several in a register of 32 bits.
PACKED = {"f16x2": ("f16", 2), "bf16x2": ("bf16", 2), "s8x4": ("s8", 4)}


@dataclass(frozen=True)
class Operation:
    """Attributes:
    result, sources: types.
    """

    function: Function
    result: str
    sources: tuple[str, ...]


def matrix_product(a: Array, b: Array, c: Array, saturate: bool) -> Array:
    """D = A B + C of `mma.m16n8`, for warps W: registers as they lie to registers.

    Args:
        a, b: [4, W, 32, E] and [2, W, 32, E], elements of a register; B by columns.
        c: [4, W, 32].
        saturate: keep int32 from wrapping.
    """
    warps, elements = a.shape[1], a.shape[3]
    # Lane 4 g + t has elements E t of row or column g.
    rows = a.reshape(2, 2, warps, 8, 4, elements).transpose(2, 1, 3, 0, 4, 5)
    columns = b.reshape(2, warps, 8, 4, elements).transpose(1, 2, 0, 3, 4)
    sums = c.reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
    left = rows.reshape(warps, 16, -1).astype(np.float64)
    right = columns.reshape(warps, 8, -1).astype(np.float64)
    made = left @ right.transpose(0, 2, 1) + sums
    if c.dtype.kind == "i":
        # 32 products of 16 bits and one of 32: exact in float64.
        made = (np.clip(made, -(2.0**31), 2.0**31 - 1) if saturate else made).astype(np.int64)
    placed = made.astype(c.dtype).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
    return np.ascontiguousarray(placed).reshape(4, warps, 32)


def shuffled_lane(mode: str, lane: Array, by: Array, control: Array) -> tuple[Array, Array]:
    """The lane that `shfl` reads, and whether it lies in the segment."""
    lane, by, control = (part.astype(np.int64) for part in (lane, by & 31, control))
    clamp, segment = control & 31, control >> 8 & 31
    least, most = lane & segment, lane & segment | clamp & ~segment
    if mode == "up":
        found = lane - by
        inside = found >= most
    else:
        found = {"down": lane + by, "bfly": lane ^ by, "idx": least | by & ~segment}[mode]
        inside = found <= most
    return np.where(inside, found, lane), inside


def rounded_to_bf16(x: Array) -> Array:
    """Float32 to the bits of bfloat16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    made: Array = np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)
    return made


def _shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    return np.where(by >= bits, 0, a << np.minimum(by, bits - 1).astype(a.dtype)).astype(a.dtype)


def _shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.itemsize
    made: Array = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return made if a.dtype.kind == "i" else np.where(by >= bits, 0, made).astype(a.dtype)


def _field(a: Array, position: Array, length: Array) -> Array:
    wide = a.astype(np.int64) >> np.minimum(position & 255, 63).astype(np.int64)
    spare = 64 - np.minimum(length & 255, 32).astype(np.int64)
    shifted = wide << np.minimum(spare, 63)
    kept = shifted if a.dtype.kind == "i" else shifted.view(np.uint64)
    made = kept >> np.minimum(spare, 63).astype(kept.dtype)
    field: Array = np.where(spare == 64, 0, made).astype(a.dtype)
    return field


def _permute(a: Array, b: Array, selector: Array) -> Array:
    together = b.astype(np.uint64) << np.uint64(32) | a
    out = np.zeros(np.broadcast_shapes(together.shape, selector.shape), np.uint32)
    for place in range(4):
        named = selector >> np.uint32(4 * place)
        byte = together >> (8 * (named & 7)).astype(np.uint64) & np.uint64(255)
        # Its highest bit says that the byte's sign is to be repeated.
        byte = np.where(named & 8, np.where(byte & np.uint64(128), 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * place)
    return out


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    out = np.zeros(shape, np.uint32)
    for row in range(8):
        if int(table[0]) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _funnel(left: bool, clamp: bool) -> Function:
    def shift(low: Array, high: Array, by: Array) -> Array:
        by = (np.minimum(by, 32) if clamp else by & np.uint32(31)).astype(np.uint64)
        together = high.astype(np.uint64) << np.uint64(32) | low
        made = together << by >> np.uint64(32) if left else together >> by
        return made.astype(np.uint32)

    return shift


def _divided(a: Array, b: Array) -> tuple[Array, Array]:
    """Quotient, towards zero, and remainder; all bits set of what is divided by zero."""
    rest = np.where(b == 0, -1, np.fmod(a, b))
    return np.where(b == 0, -1, (a - rest) // b), rest


def _chosen(a: Array, b: Array, first: Array) -> Array:
    return np.where(first, a, b)


def _fma(a: Array, b: Array, c: Array) -> Array:
    a, b, c = a.astype(np.float64), b.astype(np.float64), c.astype(np.float64)
    return a * b + c


def _in_float64(function: Function) -> Function:
    return lambda *sources: function(*(source.astype(np.float64) for source in sources))


def _flushing(function: Function) -> Function:
    """Without float32 below the smallest normal one."""

    def flushed(x: Array) -> Array:
        if x.dtype.kind != "f":
            return x
        return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x).astype(np.float32)

    def call(*sources: Array) -> Array:
        made = function(*map(flushed, sources))
        return flushed(made.astype(np.float32)) if made.dtype.kind == "f" else made

    return call


def _to_integer(rounding: Function, kind: str) -> Function:
    limits = np.iinfo(TYPES[kind])

    def convert(x: Array) -> Array:
        whole = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2e19, neginf=-2e19))
        # The largest int64 is no float64.
        inside = (whole > float(limits.min)) & (whole < float(limits.max))
        ends = np.where(whole > 0, limits.max, limits.min).astype(TYPES[kind])
        return np.where(inside, np.where(inside, whole, 0).astype(TYPES[kind]), ends)

    return convert


def _saturated(kind: str) -> Function:
    limits = np.iinfo(TYPES[kind])
    return lambda x: np.clip(
        x, max(limits.min, np.iinfo(x.dtype).min), min(limits.max, np.iinfo(x.dtype).max)
    )


def _pair(rounded: Function) -> Function:
    # The first source becomes the upper half.
    return lambda high, low: np.stack(np.broadcast_arrays(rounded(low), rounded(high)), axis=1)


_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_ROUNDINGS: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _integer_operations() -> Iterator[tuple[str, Function, str, tuple[str, ...]]]:
    two: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum,
        "max": np.maximum,
    }  # fmt: skip
    for kind in _INTEGERS:
        if kind in ("s8", "u8"):
            continue
        for name, function in two.items():
            yield f"{name}.{kind}", function, kind, (kind, kind)
        yield f"mad.lo.{kind}", lambda a, b, c: a * b + c, kind, (kind,) * 3
        if kind in _SIGNED:
            yield f"neg.{kind}", np.negative, kind, (kind,)
            yield f"abs.{kind}", np.abs, kind, (kind,)
        yield f"shr.{kind}", _shift_right, kind, (kind, "u32")
    for kind, wide in _WIDER.items():
        dtype = TYPES[wide]
        yield f"mul.wide.{kind}", lambda a, b, t=dtype: a.astype(t) * b.astype(t), wide, (kind,) * 2
        function = lambda a, b, c, t=dtype: a.astype(t) * b.astype(t) + c  # noqa: E731
        yield f"mad.wide.{kind}", function, wide, (kind, kind, wide)
    yield "div.s32", lambda a, b: _divided(a, b)[0], "s32", ("s32", "s32")
    yield "rem.s32", lambda a, b: _divided(a, b)[1], "s32", ("s32", "s32")
    for kind in ("s32", "u32"):
        yield f"bfe.{kind}", _field, kind, (kind, "u32", "u32")
    for kind in ("pred", "b16", "b32", "b64"):
        yield f"and.{kind}", np.bitwise_and, kind, (kind, kind)
        yield f"or.{kind}", np.bitwise_or, kind, (kind, kind)
        yield f"xor.{kind}", np.bitwise_xor, kind, (kind, kind)
        yield f"not.{kind}", np.invert, kind, (kind,)
        if kind != "pred":
            yield f"shl.{kind}", _shift_left, kind, (kind, "u32")
            yield f"shr.{kind}", _shift_right, kind, (kind, "u32")
    yield "prmt.b32", _permute, "b32", ("b32", "b32", "b32")
    yield "lop3.b32", _logic, "b32", ("b32",) * 4
    for to, end in product(("l", "r"), ("clamp", "wrap")):
        function = _funnel(left=to == "l", clamp=end == "clamp")
        yield f"shf.{to}.{end}.b32", function, "b32", ("b32", "b32", "u32")


def _float_operations() -> Iterator[tuple[str, Function, str, tuple[str, ...]]]:
    """Those of float32 also as they flush."""
    two: dict[str, Function] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply,
        "add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply,
        "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum,
    }  # fmt: skip
    for kind in ("f16", "f16x2", "f32"):
        for name, function in two.items():
            yield f"{name}.{kind}", function, kind, (kind, kind)
        yield f"fma.rn.{kind}", _fma, kind, (kind,) * 3
        yield f"neg.{kind}", np.negative, kind, (kind,)
        yield f"abs.{kind}", np.abs, kind, (kind,)
    for name in ("div.full.f32", "div.approx.f32", "div.rn.f32"):
        yield name, np.divide, "f32", ("f32", "f32")
    one: dict[str, Function] = {
        "ex2.approx": np.exp2, "lg2.approx": np.log2, "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    }  # fmt: skip
    for name, function in one.items():
        yield f"{name}.f32", _in_float64(function), "f32", ("f32",)
    for name, function in _ROUNDINGS.items():
        yield f"cvt.{name}.f32.f32", function, "f32", ("f32",)
        for to, source in product(_INTEGERS, ("f32", "f16")):
            yield f"cvt.{name}.{to}.{source}", _to_integer(function, to), to, (source,)
    for kind in _INTEGERS:
        yield f"cvt.rn.f32.{kind}", lambda x: x.astype(np.float32), "f32", (kind,)
        yield f"cvt.rn.f16.{kind}", lambda x: x.astype(np.float16), "f16", (kind,)
    yield "cvt.f32.f16", lambda x: x.astype(np.float32), "f32", ("f16",)
    yield "cvt.rn.f16.f32", lambda x: x.astype(np.float16), "f16", ("f32",)
    yield "cvt.rn.f16x2.f32", _pair(lambda x: x.astype(np.float16)), "f16x2", ("f32", "f32")
    yield "cvt.f32.bf16", lambda x: (x.astype(np.uint32) << 16).view(np.float32), "f32", ("bf16",)
    yield "cvt.rn.bf16.f32", rounded_to_bf16, "bf16", ("f32",)
    yield "cvt.rn.bf16x2.f32", _pair(rounded_to_bf16), "bf16x2", ("f32", "f32")


def _choices() -> Iterator[tuple[str, Function, str, tuple[str, ...]]]:
    for kind in TYPES:
        if kind not in ("pred", "bf16", "b8", "s8", "u8"):
            yield f"selp.{kind}", _chosen, kind, (kind, kind, "pred")
    for kind, (name, compare) in product(("f16", "f32"), _COMPARISONS.items()):
        # Not equal, as others, is false of what is no number, unless told otherwise.
        both = lambda a, b, f=compare: f(a, b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
        either = lambda a, b, f=compare: f(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
        yield f"setp.{name}.{kind}", both, "pred", (kind, kind)
        yield f"setp.{name}u.{kind}", either, "pred", (kind, kind)
    for kind in ("b16", "b32", "b64", *_INTEGERS):
        for name, compare in _COMPARISONS.items():
            if name in ("eq", "ne") or kind[0] != "b":
                yield f"setp.{name}.{kind}", compare, "pred", (kind, kind)
    for to, source in product(_INTEGERS, _INTEGERS):
        yield f"cvt.{to}.{source}", lambda x, t=TYPES[to]: x.astype(t), to, (source,)
        yield f"cvt.sat.{to}.{source}", _saturated(to), to, (source,)


OPERATIONS: dict[str, Operation] = {}
for _name, _function, _result, _sources in (
    *_integer_operations(),
    *_float_operations(),
    *_choices(),
):
    OPERATIONS[_name] = Operation(_function, _result, _sources)
    if "f32" in (_result, *_sources):
        # `setp.lt.ftz.f32`, `fma.rn.ftz.f32`, `cvt.rzi.ftz.s32.f32`.
        _stem, _types = _name.split(".", 1)[0], _name.split(".")[1:]
        _at = next(i for i, part in enumerate(_types) if part in TYPES or part in PACKED)
        _flushed = ".".join([_stem, *_types[:_at], "ftz", *_types[_at:]])
        OPERATIONS[_flushed] = Operation(_flushing(_function), _result, _sources)
