"""Runs the compiled PTX of a kernel without a GPU.

A text is parsed into instructions once (`ptx_text.py`); then programs run one after another. Of a
program each warp is somewhere in the text: those that are furthest behind go on, together where
they are at the same place, until a branch, a barrier or a place that others may come to. An
instruction is a function of all their lanes at once, found by its opcode: what needs registers only
is in `ptx_operations.py`, the rest in `_HANDLERS` below.

Nothing is guessed. These end a run with a `Fault`:

  - an opcode that is in neither table, or a form of operand that it does not take
  - an access to memory that is outside all arrays, or not aligned to its size
  - lanes of a warp that part at a branch, or meet at an instruction of the whole warp under a guard
  - a byte of shared memory that one warp writes and another reads or writes (another value) with no
    barrier between the two, in whatever order they came
  - a warp that waits at a barrier for one that has ended; a program that does not end

Registers that nobody wrote, and shared memory, have all bits set: a NaN, or an address outside all
arrays. Atomics take effect lane after lane. `griddepcontrol` does nothing, as programs take turns.

Legend: W warps, n lanes of the warps that are at an instruction.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_operations import (
    OPERATIONS,
    PACKED,
    TYPES,
    Array,
    matrix_product,
    shuffled_lane,
)
from tests.support.ptx_text import (
    SHARED_BASE,
    Address,
    Fault,
    Immediate,
    Instruction,
    Label,
    Operand,
    Parameter,
    Register,
    Text,
    parse,
)

Argument = np.ndarray[Any, Any] | int | float
# Addresses of arrays are these times their place among the arguments, from one.
_REGION = 1 << 32
_LANES = 32
# Parts of a program that are run before it counts as endless.
_MOST_PARTS = 10_000
# Where a value is cached, and who sees it when, makes no difference here.
_HINTS = {
    "relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "cta", "gpu", "sys", "ca",
    "cg", "cs", "cv", "lu", "nc", "wb", "wt", "L1::evict_last", "L1::evict_first",
    "L1::evict_normal", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip


def run(
    ptx: str, grid: int, threads: int, arguments: Sequence[Argument], shared_bytes: int
) -> None:
    """Run every program of a kernel, on arrays that it changes in place.

    Args:
        grid: programs, along x.
        threads: of a program.
        arguments: those that the compiled kernel takes, in order; arrays are pointers to their
            first element. Those left out at the end must not be read.

    Raises:
        Fault: see this module's header.
    """
    text = parse(ptx)
    if text.threads not in (None, threads):
        raise Fault(f"compiled for {text.threads} threads, run with {threads}")
    text.instructions = [_known(instruction) for instruction in text.instructions]
    values, arrays = _arguments(text, arguments)
    with np.errstate(all="ignore"):
        for place in range(grid):
            _Program(text, values, arrays, place, grid, threads, shared_bytes).run()


def _known(instruction: Instruction) -> Instruction:
    """Under the opcode that the tables have."""
    if instruction.opcode in OPERATIONS or instruction.opcode in _CONTROL:
        return instruction
    opcode = ".".join(part for part in instruction.opcode.split(".") if part not in _HINTS)
    if opcode not in _HANDLERS:
        raise Fault(f"an unknown instruction: {instruction.text}")
    return replace(instruction, opcode=opcode)


def _arguments(
    text: Text, arguments: Sequence[Argument]
) -> tuple[list[Argument], dict[int, NDArray[np.uint8]]]:
    """Arguments with addresses in place of arrays, and the bytes of arrays by region."""
    if len(arguments) > len(text.parameters):
        raise Fault(f"{len(arguments)} arguments for {len(text.parameters)} parameters")
    values: list[Argument] = []
    arrays: dict[int, NDArray[np.uint8]] = {}
    for place, argument in enumerate(arguments):
        pointer = text.parameters[place].kind == "u64"
        if isinstance(argument, np.ndarray):
            if not pointer or not argument.flags.c_contiguous:
                raise Fault(f"argument {place}: an array must be contiguous, and a pointer")
            arrays[place + 1] = argument.reshape(-1).view(np.uint8)
            argument = (place + 1) * _REGION
        values.append(argument)
    return values, arrays


@cache
def _constant(text: str, kind: str) -> Array:
    """An array of one element; bits, where it is written as such."""
    if kind in PACKED:
        of, count = PACKED[kind]
        return _constant(text, "b32").view(TYPES[of]).reshape(1, count)
    dtype = TYPES[kind]
    if text[1:2] in tuple("fFdD"):
        return np.array([int(text[2:], 16)], f"u{4 if text[1] in 'fF' else 8}").view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array([value != 0])
    return np.array([value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)


class _Shared:
    """Shared memory, and which warps, a bit each, touched its bytes since the last barrier."""

    def __init__(self, count: int) -> None:
        self.bytes = np.full(count, 0xFF, np.uint8)
        self._read, self._written = np.zeros((2, count), np.uint32)

    def meet(self) -> None:
        self._read[:] = self._written[:] = 0

    def note(self, at: Array, warp: Array, written: Array | None) -> None:
        """Bytes at [n, size] by warps [n], what they write before it is written."""
        mine = np.broadcast_to((np.uint32(1) << warp.astype(np.uint32))[:, None], at.shape)
        # Several warps may write one value, as they do where they have the same.
        against = self._written[at] if written is None else self._read[at] | self._written[at]
        others = against & ~mine != 0
        if written is not None:
            same = (self._read[at] & ~mine == 0) & (self.bytes[at] == written)
            others &= ~same
        if others.any():
            byte = int(at[others][0])
            raise Fault(f"byte {byte} of shared memory is raced for by two warps")
        np.bitwise_or.at(self._read if written is None else self._written, at, mine)


class _Program:
    """One program as it runs."""

    def __init__(
        self,
        text: Text,
        values: list[Argument],
        arrays: dict[int, NDArray[np.uint8]],
        place: int,
        grid: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        self.text, self.values, self.arrays = text, values, arrays
        self.threads, self.shared = threads, _Shared(shared_bytes)
        thread = np.arange(threads, dtype=np.uint32)
        known = {"%tid.x": thread, "%laneid": thread % _LANES}
        sizes = {"%ntid.x": threads, "%ctaid.x": place, "%nctaid.x": grid}
        sizes |= {f"%{name}.{axis}": 1 for name in ("ntid", "nctaid") for axis in "yz"}
        sizes |= {f"%{name}.{axis}": 0 for name in ("tid", "ctaid") for axis in "yz"}
        self.registers: dict[str, Array] = known | {
            name: np.full(threads, size, np.uint32) for name, size in sizes.items()
        }
        warps = threads // _LANES
        # The next instruction of each warp, None if it has ended; whether it waits at a barrier.
        self.next: list[int | None] = [0] * warps
        self.waiting = [False] * warps

    def run(self) -> None:
        targets = self.text.targets
        for _ in range(_MOST_PARTS):
            ready = [at for at, waits in zip(self.next, self.waiting, strict=True) if not waits]
            behind = min((at for at in ready if at is not None), default=None)
            if behind is not None:
                self._run_part(behind, targets)
            elif not any(self.waiting):
                return
            elif None in self.next:
                raise Fault("a warp waits at a barrier for one that has ended")
            else:
                self.shared.meet()
                self.waiting = [False] * len(self.waiting)
        raise Fault(f"a program that does not end, near instruction {self.next}")

    def _run_part(self, at: int, targets: set[int]) -> None:
        """Run those warps that are at an instruction up to where they may meet or leave others."""
        warps = [
            warp
            for warp, (place, waits) in enumerate(zip(self.next, self.waiting, strict=True))
            if place == at and not waits
        ]
        lanes = _Lanes(self, warps)
        while True:
            instruction = self.text.instructions[at]
            try:
                control = _CONTROL.get(instruction.opcode)
                if control is not None:
                    control(lanes, instruction, at)
                    return
                lanes.run(instruction)
            except Fault as fault:
                raise Fault(f"{fault}, in: {instruction.text}") from None
            at += 1
            if at in targets:
                lanes.go([at] * len(warps))
                return


class _Lanes:
    """The lanes of warps that are at the same instruction."""

    def __init__(self, program: _Program, warps: list[int]) -> None:
        self.program, self.warps, self.count = program, warps, _LANES * len(warps)
        self.warp = np.repeat(np.array(warps, np.uint32), _LANES)
        # None for all of the program, which saves copies.
        self._places: Array | None = None
        if self.count < program.threads:
            self._places = (self.warp * _LANES + np.tile(np.arange(_LANES), len(warps))).astype(int)
        self.active: Array | None = None

    def run(self, instruction: Instruction) -> None:
        self.active = self._guarded(instruction)
        operation = OPERATIONS.get(instruction.opcode)
        if operation is None:
            _HANDLERS[instruction.opcode](self, *instruction.operands)
            return
        target, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise Fault(f"{len(sources)} sources, not {len(operation.sources)}")
        values = [self.read(*pair) for pair in zip(sources, operation.sources, strict=True)]
        self.write(target, operation.result, operation.function(*values))

    def go(self, places: Sequence[int | None]) -> None:
        for warp, place in zip(self.warps, places, strict=True):
            self.program.next[warp] = place

    def _guarded(self, instruction: Instruction) -> Array | None:
        if instruction.guard is None:
            return None
        guard = self.read(instruction.guard, "pred")
        return ~guard if instruction.negated else guard

    def agreed(self, instruction: Instruction, values: Array) -> list[Any]:
        """The value of each warp, of those that its lanes have."""
        by_warp = values.reshape(-1, _LANES)
        if (by_warp != by_warp[:, :1]).any():
            raise Fault("lanes of a warp part")
        agreed: list[Any] = by_warp[:, 0].tolist()
        return agreed

    def taken(self, instruction: Instruction) -> list[bool]:
        """Whether each warp executes an instruction that its lanes must agree on."""
        guard = self._guarded(instruction)
        return self.agreed(instruction, np.full(self.count, True) if guard is None else guard)

    def together(self) -> None:
        if self.active is not None:
            raise Fault("an instruction of whole warps under a guard")

    def read(self, operand: Operand, kind: str) -> Array:
        """[n], or [1] of a constant; of a wider register the lower bits."""
        if isinstance(operand, Immediate):
            return _constant(operand.text, kind)
        if not isinstance(operand, Register):
            raise Fault(f"not a value: {operand}")
        held = self._held(operand)
        if kind in PACKED:
            of, count = PACKED[kind]
            return held.view(TYPES[of]).reshape(-1, count)
        dtype = TYPES[kind]
        if held.itemsize == dtype.itemsize:
            return held.view(dtype)
        if held.itemsize < dtype.itemsize or "pred" in (kind, operand.kind):
            raise Fault(f"{operand.name} is no {kind}")
        return held.astype(f"u{dtype.itemsize}").view(dtype)

    def full(self, operand: Operand, kind: str) -> Array:
        return np.broadcast_to(self.read(operand, kind), (self.count,))

    def _held(self, register: Register) -> Array:
        held = self.program.registers.get(register.name)
        if held is None:
            dtype = _bits(register.kind)
            poison = dtype.kind == "b" or np.iinfo(dtype).max
            held = np.full(self.program.threads, poison, dtype)
            self.program.registers[register.name] = held
        return held if self._places is None else held[self._places]

    def write(self, operand: Operand, kind: str, value: Array) -> None:
        """What is narrower than a register is extended, by its sign if it has one."""
        if operand is None:
            return
        if not isinstance(operand, Register):
            raise Fault(f"not a register: {operand}")
        if kind in PACKED:
            of = TYPES[PACKED[kind][0]]
            value = np.ascontiguousarray(value.astype(of, copy=False)).view(np.uint32).reshape(-1)
        else:
            value = value.astype(TYPES[kind], copy=False)
        dtype = _bits(operand.kind)
        if (value.dtype.kind == "b") != (dtype.kind == "b") or value.itemsize > dtype.itemsize:
            raise Fault(f"{operand.name} takes no {kind}")
        if value.itemsize < dtype.itemsize:
            value = value.astype(dtype if value.dtype.kind == "u" else f"i{dtype.itemsize}")
        value = value.view(dtype)
        if len(value) != self.count:
            value = np.repeat(value, self.count)
        if self.active is not None:
            value = np.where(self.active, value, self._held(operand))
        if self._places is not None:
            held = self.program.registers.get(operand.name)
            if held is None:
                self._held(operand)
                held = self.program.registers[operand.name]
            # Other registers may be the same array.
            made = held.copy()
            made[self._places] = value
            value = made
        self.program.registers[operand.name] = value

    def by_warp(self, operand: Operand, kind: str) -> Array:
        """[W, 32], or [W, 32, E] of packed ones."""
        value = self.read(operand, kind)
        return np.broadcast_to(value, (self.count, *value.shape[1:])).reshape(
            -1, _LANES, *value.shape[1:]
        )

    def addresses(self, operand: Operand, space: str) -> Array:
        """[n] uint64."""
        if not isinstance(operand, Address) or isinstance(operand.base, Parameter):
            raise Fault(f"not an address: {operand}")
        wide = isinstance(operand.base, Register) and operand.base.kind[1:] == "64"
        base = self.full(operand.base, "u64" if wide or space == "global" else "u32")
        return base.astype(np.uint64) + np.uint64(operand.offset & 2**64 - 1)

    def load(self, space: str, addresses: Array, size: int, warp: Array) -> Array:
        """Bytes [m, size] at addresses [m], for warps [m]."""
        made = np.empty((len(addresses), size), np.uint8)
        for chosen, at, memory in self._found(space, addresses, size):
            if space == "shared":
                self.program.shared.note(at, warp[chosen], None)
            made[chosen] = memory[at]
        return made

    def store(self, space: str, addresses: Array, values: Array, warp: Array) -> None:
        for chosen, at, memory in self._found(space, addresses, values.shape[1]):
            if space == "shared":
                self.program.shared.note(at, warp[chosen], values[chosen])
            memory[at] = values[chosen]

    def _found(
        self, space: str, addresses: Array, size: int
    ) -> Iterator[tuple[Array, Array, NDArray[np.uint8]]]:
        """By array: those that lie in it, where their bytes are, and the array's bytes."""
        if (unaligned := addresses % np.uint64(size) != 0).any():
            raise Fault(f"{hex(addresses[unaligned][0])} is not aligned to {size} bytes")
        regions = addresses >> np.uint64(32)
        for region in [0] if space == "shared" else np.unique(regions).tolist():
            if space == "shared":
                memory, base = self.program.shared.bytes, SHARED_BASE
            else:
                if region not in self.program.arrays:
                    raise Fault(f"{hex(addresses[regions == region][0])} is in no array")
                memory, base = self.program.arrays[region], region * _REGION
            chosen = np.flatnonzero(regions == region if space == "global" else addresses >= 0)
            offsets = addresses[chosen].astype(np.int64) - base
            if (outside := (offsets < 0) | (offsets > memory.size - size)).any():
                raise Fault(
                    f"{size} bytes at byte {offsets[outside][0]} of "
                    + (f"argument {region - 1}" if space == "global" else "shared memory")
                    + f", which has {memory.size}"
                )
            yield chosen, offsets[:, None] + np.arange(size), memory


def _bits(kind: str) -> np.dtype[Any]:
    """Of a register."""
    dtype = TYPES[kind]
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")


def _branch(lanes: _Lanes, instruction: Instruction, at: int) -> None:
    (label,) = instruction.operands
    assert isinstance(label, Label)
    there = lanes.program.text.labels[label.name]
    lanes.go([there if taken else at + 1 for taken in lanes.taken(instruction)])


def _leave(lanes: _Lanes, instruction: Instruction, at: int) -> None:
    lanes.go([None if taken else at + 1 for taken in lanes.taken(instruction)])


def _wait(lanes: _Lanes, instruction: Instruction, at: int) -> None:
    if len(instruction.operands) != 1 or instruction.operands[0] != Immediate("0"):
        raise Fault("only barrier 0 of all threads is known")
    for warp, taken in zip(lanes.warps, lanes.taken(instruction), strict=True):
        lanes.program.waiting[warp] = taken
    lanes.go([at + 1] * len(lanes.warps))


_CONTROL: dict[str, Callable[[_Lanes, Instruction, int], None]] = {
    "bra": _branch, "bra.uni": _branch, "ret": _leave, "bar.sync": _wait,
}  # fmt: skip


def _nothing(lanes: _Lanes, *operands: Operand) -> None:
    pass


def _move(kind: str, lanes: _Lanes, target: Operand, source: Operand) -> None:
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


def _load_parameter(kind: str, lanes: _Lanes, target: Operand, source: Operand) -> None:
    if not isinstance(source, Address) or not isinstance(source.base, Parameter) or source.offset:
        raise Fault(f"not a parameter: {source}")
    if source.base.place >= len(lanes.program.values):
        raise Fault(f"argument {source.base.place} was not given")
    value = lanes.program.values[source.base.place]
    if source.base.kind[0] == "f":
        bits = np.array([value], TYPES[source.base.kind]).view(TYPES[kind])
    else:
        assert isinstance(value, int)
        bits = _constant(str(value), kind)
    lanes.write(target, kind, bits)


def _load(space: str, kind: str, lanes: _Lanes, target: Operand, source: Operand) -> None:
    targets = target if isinstance(target, tuple) else (target,)
    dtype = TYPES[kind]
    chosen = np.arange(lanes.count) if lanes.active is None else np.flatnonzero(lanes.active)
    values = np.zeros((lanes.count, len(targets)), dtype)
    size = dtype.itemsize * len(targets)
    found = lanes.load(space, lanes.addresses(source, space)[chosen], size, lanes.warp[chosen])
    values[chosen] = found.view(dtype)
    for i, one in enumerate(targets):
        lanes.write(one, kind, np.ascontiguousarray(values[:, i]))


def _store(space: str, kind: str, lanes: _Lanes, target: Operand, source: Operand) -> None:
    sources = source if isinstance(source, tuple) else (source,)
    chosen = np.arange(lanes.count) if lanes.active is None else np.flatnonzero(lanes.active)
    values = np.stack([lanes.full(one, kind) for one in sources], axis=1)[chosen]
    addresses = lanes.addresses(target, space)[chosen]
    lanes.store(space, addresses, values.view(np.uint8), lanes.warp[chosen])


def _vector(
    count: int,
    move: Callable[..., None],
    space: str,
    kind: str,
    lanes: _Lanes,
    target: Operand,
    source: Operand,
) -> None:
    braced = target if move is _load else source
    # Single registers may stand in braces, too.
    if (len(braced) if isinstance(braced, tuple) else 1) != count:
        raise Fault(f"not {count} registers")
    move(space, kind, lanes, target, source)


def _atomic(
    change: Callable[..., Any], kind: str, lanes: _Lanes, target: Operand, *rest: Operand
) -> None:
    address, *sources = rest
    addresses = lanes.addresses(address, "global")
    values = [lanes.full(source, kind) for source in sources]
    before = np.zeros(lanes.count, TYPES[kind])
    active = range(lanes.count) if lanes.active is None else np.flatnonzero(lanes.active).tolist()
    for i in active:
        at, warp = addresses[i : i + 1], lanes.warp[i : i + 1]
        old = lanes.load("global", at, before.itemsize, warp).view(before.dtype)[:, 0]
        made = change(old, *(value[i : i + 1] for value in values)).astype(before.dtype)
        lanes.store("global", at, made[:, None].view(np.uint8), warp)
        before[i] = old[0]
    lanes.write(target, kind, before)


def _full_mask(lanes: _Lanes, mask: Operand) -> None:
    lanes.together()
    if (lanes.full(mask, "u32") != 0xFFFFFFFF).any():
        raise Fault("lanes are left out")


def _shuffle(
    mode: str, lanes: _Lanes, target: Operand, source: Operand, by: Operand, control: Operand,
    mask: Operand,
) -> None:  # fmt: skip
    _full_mask(lanes, mask)
    found, inside = shuffled_lane(
        mode, np.arange(_LANES), lanes.by_warp(by, "u32"), lanes.by_warp(control, "u32")
    )
    made = np.take_along_axis(lanes.by_warp(source, "b32"), found, axis=1).reshape(-1)
    value, there = target if isinstance(target, tuple) else (target, None)
    lanes.write(value, "b32", made)
    lanes.write(there, "pred", inside.reshape(-1))


def _reduce(
    function: Any, kind: str, lanes: _Lanes, target: Operand, source: Operand, mask: Operand
) -> None:
    _full_mask(lanes, mask)
    values = lanes.by_warp(source, kind)
    reduced = function.reduce(values, axis=1, dtype=values.dtype)
    lanes.write(target, kind, np.repeat(reduced, _LANES))


def _multiply_matrices(
    inputs: str, sums: str, saturate: bool, lanes: _Lanes, *operands: Operand
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


def _rows(lanes: _Lanes, address: Operand, count: int) -> tuple[Array, Array]:
    """Addresses of the 8 rows of so many matrices, which 8 lanes each have, and their warps."""
    lanes.together()
    used = lanes.addresses(address, "shared").reshape(-1, _LANES)[:, : 8 * count]
    return used.reshape(-1), np.repeat(np.array(lanes.warps, np.uint32), 8 * count)


def _load_matrices(
    count: int, transposed: bool, lanes: _Lanes, target: Operand, source: Operand
) -> None:
    addresses, warp = _rows(lanes, source, count)
    found = lanes.load("shared", addresses, 16, warp).view(np.uint16).reshape(-1, count, 8, 8)
    placed = np.ascontiguousarray(found.swapaxes(2, 3) if transposed else found)
    registers = placed.view(np.uint32).reshape(-1, count, _LANES)
    for i, one in enumerate(_counted(target, count)):
        lanes.write(one, "b32", np.ascontiguousarray(registers[:, i]).reshape(-1))


def _store_matrices(
    count: int, transposed: bool, lanes: _Lanes, target: Operand, source: Operand
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


_HANDLERS = _handlers()
