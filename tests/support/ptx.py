"""The few PTX instructions that the kernels' assembly uses, on arrays of 32-bit registers."""

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint32]


def emulate(body: str, registers: dict[str, Register]) -> dict[str, Register]:
    """What an assembly string leaves in registers: shl, shr, shf, mov, and, prmt, lop3, mul."""
    held = dict(registers)
    shape = next(iter(registers.values()))

    def value(operand: str) -> Register:
        return held[operand] if operand in held else np.full_like(shape, int(operand, 0))

    statements = body.replace("{", ";").replace("}", ";").split(";")
    for statement in filter(None, (part.strip() for part in statements)):
        if statement.startswith(".reg"):
            continue
        operation, rest = statement.split(None, 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        if operation == "shl.b32":
            held[target] = value(operands[0]) << np.uint32(int(operands[1]))
        elif operation == "shr.u32":
            held[target] = value(operands[0]) >> np.uint32(int(operands[1]))
        elif operation in ("shf.l.wrap.b32", "shf.r.wrap.b32"):
            held[target] = _shf(*map(value, operands), left=operation[4] == "l")
        elif operation == "mov.b32":
            held[target] = value(operands[0])
        elif operation == "prmt.b32":
            held[target] = _prmt(*map(value, operands))
        elif operation == "mul.rn.f16x2":
            a, b = (value(operand).view(np.float16) for operand in operands)
            held[target] = (a * b).view(np.uint32)
        elif operation == "and.b32":
            held[target] = value(operands[0]) & value(operands[1])
        else:
            assert operation == "lop3.b32"
            *sources, table = operands
            held[target] = _lop3(*map(value, sources), table=int(table, 0))
    return held


def _shf(low: Register, high: Register, by: Register, left: bool) -> Register:
    """64 bits shifted by the five low bits of `by`: the high half to the left, or the low half."""
    together = high.astype(np.uint64) << np.uint64(32) | low
    by = by.astype(np.uint64) & np.uint64(31)
    made = together << by >> np.uint64(32) if left else together >> by
    return made.astype(np.uint32)


def _prmt(a: Register, b: Register, selector: Register) -> Register:
    """Of the eight bytes of a and, above it, b, those that the four low digits of selector name."""
    together = b.astype(np.uint64) << np.uint64(32) | a
    out = np.zeros_like(a)
    for place in range(4):
        named = (selector >> np.uint32(4 * place) & np.uint32(7)).astype(np.uint64)
        byte = (together >> (np.uint64(8) * named) & np.uint64(255)).astype(np.uint32)
        out |= byte << np.uint32(8 * place)
    return out


def _lop3(a: Register, b: Register, c: Register, table: int) -> Register:
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            picked = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            out |= picked
    return out
