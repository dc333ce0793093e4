"""Instructions of the emulator that need more than registers: memory, other lanes, where to go on.

`CONTROL` has those after which warps may be in different places, `HANDLERS` the rest, with
what goes on in the background (`ptx_async.py`); `execute` also knows what registers alone decide
(`ptx_operations.py`). Atomics take effect lane after lane.
`griddepcontrol` does nothing, as programs take turns.

Legend: W warps, n lanes of the warps that are at an instruction.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from tests.support.ptx_async import BACKGROUND, PRODUCTS
from tests.support.ptx_lanes import LANES, Lanes, constant
from tests.support.ptx_operations import OPERATIONS, TYPES, Array, matrix_product, shuffled_lane
from tests.support.ptx_text import (
    Address,
    Fault,
    Immediate,
    Instruction,
    Label,
    Operand,
    Parameter,
    Register,
)


def execute(lanes: Lanes, instruction: Instruction) -> None:
    """One that is not in `CONTROL`."""
    lanes.active = lanes.guarded(instruction)
    if instruction.opcode not in PRODUCTS:
        for warp in lanes.warps:
            lanes.program.background[warp].touch(instruction.registers)
    operation = OPERATIONS.get(instruction.opcode)
    if operation is None:
        HANDLERS[instruction.opcode](lanes, *instruction.operands)
        return
    target, *sources = instruction.operands
    if len(sources) != len(operation.sources):
        raise Fault(f"{len(sources)} sources, not {len(operation.sources)}")
    values = [lanes.read(*pair) for pair in zip(sources, operation.sources, strict=True)]
    lanes.write(target, operation.result, operation.function(*values))


def _branch(lanes: Lanes, instruction: Instruction, at: int) -> None:
    (label,) = instruction.operands
    assert isinstance(label, Label)
    there = lanes.program.text.labels[label.name]
    lanes.go([there if taken else at + 1 for taken in lanes.taken(instruction)])


def _leave(lanes: Lanes, instruction: Instruction, at: int) -> None:
    lanes.go([None if taken else at + 1 for taken in lanes.taken(instruction)])


def _wait(lanes: Lanes, instruction: Instruction, at: int) -> None:
    if len(instruction.operands) != 1 or instruction.operands[0] != Immediate("0"):
        raise Fault("only barrier 0 of all threads is known")
    for warp, taken in zip(lanes.warps, lanes.taken(instruction), strict=True):
        lanes.program.waiting[warp] = taken
    lanes.go([at + 1] * len(lanes.warps))


CONTROL: dict[str, Callable[[Lanes, Instruction, int], None]] = {
    "bra": _branch, "bra.uni": _branch, "ret": _leave, "bar.sync": _wait,
}  # fmt: skip


def _nothing(lanes: Lanes, *operands: Operand) -> None:
    pass


def _move(kind: str, lanes: Lanes, target: Operand, source: Operand) -> None:
    """Also of several registers to one, lowest first, and of one to several."""
    parts = next((one for one in (target, source) if isinstance(one, tuple)), None)
    if parts is None:
        lanes.write(target, kind, lanes.read(source, kind))
        return
    part = np.dtype(f"u{TYPES[kind].itemsize // len(parts)}")
    part_kind = f"b{8 * part.itemsize}"
    if isinstance(source, tuple):
        whole = np.stack([lanes.full(one, part_kind) for one in source], axis=1)
        lanes.write(target, kind, whole.view(TYPES[kind]).reshape(-1))
    else:
        apart = lanes.full(source, kind).copy().view(part).reshape(lanes.count, -1)
        for i, one in enumerate(parts):
            lanes.write(one, part_kind, np.ascontiguousarray(apart[:, i]))


def _load_parameter(kind: str, lanes: Lanes, target: Operand, source: Operand) -> None:
    if not isinstance(source, Address) or not isinstance(source.base, Parameter) or source.offset:
        raise Fault(f"not a parameter: {source}")
    if source.base.place >= len(lanes.program.values):
        raise Fault(f"argument {source.base.place} was not given")
    value = lanes.program.values[source.base.place]
    if source.base.kind[0] == "f":
        bits = np.array([value], TYPES[source.base.kind]).view(TYPES[kind])
    else:
        assert isinstance(value, int)
        bits = constant(str(value), kind)
    lanes.write(target, kind, bits)


def _load(space: str, kind: str, lanes: Lanes, target: Operand, source: Operand) -> None:
    targets = target if isinstance(target, tuple) else (target,)
    dtype = TYPES[kind]
    chosen = lanes.chosen()
    values = np.zeros((lanes.count, len(targets)), dtype)
    size = dtype.itemsize * len(targets)
    found = lanes.load(space, lanes.addresses(source, space)[chosen], size, lanes.warp[chosen])
    values[chosen] = found.view(dtype)
    for i, one in enumerate(targets):
        lanes.write(one, kind, np.ascontiguousarray(values[:, i]))


def _store(space: str, kind: str, lanes: Lanes, target: Operand, source: Operand) -> None:
    sources = source if isinstance(source, tuple) else (source,)
    chosen = lanes.chosen()
    values = np.stack([lanes.full(one, kind) for one in sources], axis=1)[chosen]
    addresses = lanes.addresses(target, space)[chosen]
    lanes.store(space, addresses, values.view(np.uint8), lanes.warp[chosen])


def _vector(
    count: int,
    move: Callable[..., None],
    space: str,
    kind: str,
    lanes: Lanes,
    target: Operand,
    source: Operand,
) -> None:
    braced = target if move is _load else source
    # Single registers may stand in braces, too.
    if (len(braced) if isinstance(braced, tuple) else 1) != count:
        raise Fault(f"not {count} registers")
    move(space, kind, lanes, target, source)


def _atomic(
    change: Callable[..., Any], kind: str, lanes: Lanes, target: Operand, *rest: Operand
) -> None:
    address, *sources = rest
    addresses = lanes.addresses(address, "global")
    values = [lanes.full(source, kind) for source in sources]
    before = np.zeros(lanes.count, TYPES[kind])
    for i in lanes.chosen().tolist():
        at, warp = addresses[i : i + 1], lanes.warp[i : i + 1]
        old = lanes.load("global", at, before.itemsize, warp).view(before.dtype)[:, 0]
        made = change(old, *(value[i : i + 1] for value in values)).astype(before.dtype)
        lanes.store("global", at, made[:, None].view(np.uint8), warp)
        before[i] = old[0]
    lanes.write(target, kind, before)


def _full_mask(lanes: Lanes, mask: Operand) -> None:
    lanes.together()
    if (lanes.full(mask, "u32") != 0xFFFFFFFF).any():
        raise Fault("lanes are left out")


def _shuffle(
    mode: str, lanes: Lanes, target: Operand, source: Operand, by: Operand, control: Operand,
    mask: Operand,
) -> None:  # fmt: skip
    _full_mask(lanes, mask)
    found, inside = shuffled_lane(
        mode, np.arange(LANES), lanes.by_warp(by, "u32"), lanes.by_warp(control, "u32")
    )
    made = np.take_along_axis(lanes.by_warp(source, "b32"), found, axis=1).reshape(-1)
    value, there = target if isinstance(target, tuple) else (target, None)
    lanes.write(value, "b32", made)
    lanes.write(there, "pred", inside.reshape(-1))


def _reduce(
    function: Any, kind: str, lanes: Lanes, target: Operand, source: Operand, mask: Operand
) -> None:
    _full_mask(lanes, mask)
    values = lanes.by_warp(source, kind)
    reduced = function.reduce(values, axis=1, dtype=values.dtype)
    lanes.write(target, kind, np.repeat(reduced, LANES))


def _multiply_matrices(
    inputs: str, sums: str, saturate: bool, lanes: Lanes, *operands: Operand
) -> None:
    lanes.together()
    targets, *sources = operands
    if [len(one) if isinstance(one, tuple) else 0 for one in operands] != [4, 4, 2, 4]:
        raise Fault("not the registers of a matrix product")
    kinds = (inputs, inputs, sums)
    a, b, c = (
        np.stack([lanes.by_warp(one, kind) for one in source])  # type: ignore[union-attr]
        for source, kind in zip(sources, kinds, strict=True)
    )
    made = matrix_product(a, b, c, saturate)
    for one, value in zip(targets, made, strict=True):  # type: ignore[arg-type]
        lanes.write(one, sums, value.reshape(-1))


def _rows(lanes: Lanes, address: Operand, count: int) -> tuple[Array, Array]:
    """Addresses of the 8 rows of so many matrices, which 8 lanes each have, and their warps."""
    lanes.together()
    used = lanes.addresses(address, "shared").reshape(-1, LANES)[:, : 8 * count]
    return used.reshape(-1), np.repeat(np.array(lanes.warps, np.uint32), 8 * count)


def _load_matrices(
    count: int, transposed: bool, lanes: Lanes, target: Operand, source: Operand
) -> None:
    addresses, warp = _rows(lanes, source, count)
    found = lanes.load("shared", addresses, 16, warp).view(np.uint16).reshape(-1, count, 8, 8)
    placed = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found)
    registers = placed.view(np.uint32).reshape(-1, count, LANES)
    for i, one in enumerate(_counted(target, count)):
        lanes.write(one, "b32", np.ascontiguousarray(registers[:, i]).reshape(-1))


def _store_matrices(
    count: int, transposed: bool, lanes: Lanes, target: Operand, source: Operand
) -> None:
    addresses, warp = _rows(lanes, target, count)
    registers = np.stack([lanes.by_warp(one, "b32") for one in _counted(source, count)], axis=1)
    placed = registers.view(np.uint16).reshape(-1, count, 8, 8)
    rows = np.ascontiguousarray(placed.swapaxes(2, 3) if transposed else placed)
    lanes.store("shared", addresses, rows.view(np.uint8).reshape(-1, 16), warp)


def _counted(operand: Operand, count: int) -> tuple[Register | Immediate | None, ...]:
    if not isinstance(operand, tuple) or len(operand) != count:
        raise Fault(f"not {count} registers: {operand}")
    return operand


def _handlers() -> dict[str, Callable[..., None]]:
    made: dict[str, Callable[..., None]] = dict.fromkeys(
        ("griddepcontrol.wait", "griddepcontrol.launch_dependents"), _nothing,
    )  # fmt: skip
    for kind in TYPES:
        made[f"mov.{kind}"] = partial(_move, kind)
        if kind == "pred":
            continue
        made[f"ld.param.{kind}"] = partial(_load_parameter, kind)
        for space, (name, count) in product(
            ("global", "shared"), (("", 1), ("v2.", 2), ("v4.", 4))
        ):
            made[f"ld.{space}.{name}{kind}"] = partial(_vector, count, _load, space, kind)
            made[f"st.{space}.{name}{kind}"] = partial(_vector, count, _store, space, kind)
    changes: dict[str, Callable[..., Any]] = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
        "or": np.bitwise_or, "xor": np.bitwise_xor, "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(old == expected, new, old),
    }  # fmt: skip
    for name, kinds in {
        "add": "u32 s32 u64 f32", "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64",
        "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64", "exch": "b32 b64", "cas": "b32 b64",
    }.items():  # fmt: skip
        for kind in kinds.split():
            made[f"atom.global.{name}.{kind}"] = partial(_atomic, changes[name], kind)
    for mode in ("up", "down", "bfly", "idx"):
        made[f"shfl.sync.{mode}.b32"] = partial(_shuffle, mode)
    for name, kind in product(("add", "min", "max"), ("u32", "s32")):
        made[f"redux.sync.{name}.{kind}"] = partial(_reduce, changes[name], kind)
    mma = "mma.sync.aligned.m16n8"
    made[f"{mma}k16.row.col.f32.f16.f16.f32"] = partial(_multiply_matrices, "f16x2", "f32", False)
    for saturating in ("", ".satfinite"):
        name = f"{mma}k32.row.col{saturating}.s32.s8.s8.s32"
        made[name] = partial(_multiply_matrices, "s8x4", "s32", bool(saturating))
    for count, transposed in product((1, 2, 4), (False, True)):
        form = f"matrix.sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
        made[f"ld{form}"] = partial(_load_matrices, count, transposed)
        made[f"st{form}"] = partial(_store_matrices, count, transposed)
    return made


HANDLERS = _handlers() | BACKGROUND | PRODUCTS
