"""A program of the emulator as it stands, and how lanes of its warps reach registers and memory.

Registers are arrays of an element a thread. Those that nobody wrote, and shared memory, have all
bits set: a NaN, or an address outside all arrays. An access to memory is one of all lanes at once,
and a `Fault` if one of them is outside all arrays, not aligned to its size, or races another warp.

Legend: W warps, n lanes of the warps that are at an instruction.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_background import Background
from tests.support.ptx_operations import PACKED, TYPES, Array
from tests.support.ptx_shared import Shared
from tests.support.ptx_text import (
    SHARED_BASE,
    Address,
    Fault,
    Immediate,
    Instruction,
    Operand,
    Parameter,
    Register,
    Text,
)

Argument = np.ndarray[Any, Any] | int | float
# Addresses of arrays are these times their place among the arguments, from one.
REGION = 1 << 32
LANES = 32


@cache
def constant(text: str, kind: str) -> Array:
    """An array of one element; bits, where it is written as such."""
    if kind in PACKED:
        of, count = PACKED[kind]
        return constant(text, "b32").view(TYPES[of]).reshape(1, count)
    dtype = TYPES[kind]
    if text[1:2] in tuple("fFdD"):
        return np.array([int(text[2:], 16)], f"u{4 if text[1] in 'fF' else 8}").view(dtype)
    value = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.array([value != 0])
    return np.array([value & (1 << 8 * dtype.itemsize) - 1], f"u{dtype.itemsize}").view(dtype)


class Program:
    """Registers and memory of one program, and where its warps are."""

    def __init__(
        self,
        text: Text,
        values: list[Argument],
        arrays: dict[int, NDArray[np.uint8]],
        place: tuple[int, ...],
        grid: tuple[int, ...],
        threads: int,
        shared_bytes: int,
    ) -> None:
        self.text, self.values, self.arrays = text, values, arrays
        self.threads, self.shared = threads, Shared(shared_bytes)
        thread = np.arange(threads, dtype=np.uint32)
        known = {"%tid.x": thread, "%laneid": thread % LANES}
        sizes = {"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}
        sizes |= {f"%ctaid.{axis}": at for axis, at in zip("xyz", place, strict=True)}
        sizes |= {f"%nctaid.{axis}": count for axis, count in zip("xyz", grid, strict=True)}
        self.registers: dict[str, Array] = known | {
            name: np.full(threads, size, np.uint32) for name, size in sizes.items()
        }
        warps = threads // LANES
        # The next instruction of each warp, None if it has ended; whether it waits at a barrier.
        self.next: list[int | None] = [0] * warps
        self.waiting = [False] * warps
        self.background = [Background() for _ in range(warps)]


class Lanes:
    """The lanes of warps that are at the same instruction."""

    def __init__(self, program: Program, warps: list[int]) -> None:
        self.program, self.warps, self.count = program, warps, LANES * len(warps)
        self.warp = np.repeat(np.array(warps, np.uint32), LANES)
        # None for all of the program, which saves copies.
        self._places: Array | None = None
        if self.count < program.threads:
            self._places = (self.warp * LANES + np.tile(np.arange(LANES), len(warps))).astype(int)
        self.active: Array | None = None

    def go(self, places: Sequence[int | None]) -> None:
        for warp, place in zip(self.warps, places, strict=True):
            self.program.next[warp] = place

    def guarded(self, instruction: Instruction) -> Array | None:
        if instruction.guard is None:
            return None
        guard = self.read(instruction.guard, "pred")
        return ~guard if instruction.negated else guard

    def agreed(self, instruction: Instruction, values: Array) -> list[Any]:
        """The value of each warp, of those that its lanes have."""
        by_warp = values.reshape(-1, LANES)
        if (by_warp != by_warp[:, :1]).any():
            raise Fault("lanes of a warp part")
        agreed: list[Any] = by_warp[:, 0].tolist()
        return agreed

    def taken(self, instruction: Instruction) -> list[bool]:
        """Whether each warp executes an instruction that its lanes must agree on."""
        guard = self.guarded(instruction)
        return self.agreed(instruction, np.full(self.count, True) if guard is None else guard)

    def chosen(self) -> Array:
        """Which of the lanes execute an instruction."""
        return np.arange(self.count) if self.active is None else np.flatnonzero(self.active)

    def together(self) -> None:
        if self.active is not None:
            raise Fault("an instruction of whole warps under a guard")

    def read(self, operand: Operand, kind: str) -> Array:
        """[n], or [1] of a constant; of a wider register the lower bits."""
        if isinstance(operand, Immediate):
            return constant(operand.text, kind)
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
            -1, LANES, *value.shape[1:]
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
        if space == "shared":
            return self.program.shared.load(self.shared_places(addresses, size), warp)
        made = np.empty((len(addresses), size), np.uint8)
        for chosen, at, memory in self._found(addresses, size):
            made[chosen] = memory[at]
        return made

    def store(self, space: str, addresses: Array, values: Array, warp: Array) -> None:
        size = values.shape[1]
        if space == "shared":
            self.program.shared.store(self.shared_places(addresses, size), warp, values)
            return
        for chosen, at, memory in self._found(addresses, size):
            memory[at] = values[chosen]

    def shared_places(self, addresses: Array, size: int) -> Array:
        """[m, size], where their bytes are."""
        _must_be_aligned(addresses, size)
        count = self.program.shared.bytes.size
        return _places(addresses, size, SHARED_BASE, count, "shared memory")

    def _found(
        self, addresses: Array, size: int
    ) -> Iterator[tuple[Array, Array, NDArray[np.uint8]]]:
        """By array: those that lie in it, where their bytes are, and the array's bytes."""
        _must_be_aligned(addresses, size)
        regions = addresses >> np.uint64(32)
        for region in np.unique(regions).tolist():
            chosen = np.flatnonzero(regions == region)
            memory = self.program.arrays.get(region)
            if memory is None:
                raise Fault(f"{hex(addresses[chosen][0])} is in no array")
            name = f"argument {region - 1}"
            at = _places(addresses[chosen], size, region * REGION, memory.size, name)
            yield chosen, at, memory


def _must_be_aligned(addresses: Array, size: int) -> None:
    if (unaligned := addresses % np.uint64(size) != 0).any():
        raise Fault(f"{hex(addresses[unaligned][0])} is not aligned to {size} bytes")


def _places(addresses: Array, size: int, base: int, count: int, name: str) -> Array:
    """Where the bytes are of what lies at addresses, among so many from a base on."""
    offsets = addresses.astype(np.int64) - base
    if (outside := (offsets < 0) | (offsets > count - size)).any():
        raise Fault(f"{size} bytes at byte {offsets[outside][0]} of {name}, which has {count}")
    return offsets[:, None] + np.arange(size)


def _bits(kind: str) -> np.dtype[Any]:
    """Of a register."""
    dtype = TYPES[kind]
    return dtype if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")
