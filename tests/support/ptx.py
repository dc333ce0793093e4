"""The few PTX instructions that the kernels' assembly uses, on arrays of 32-bit registers."""

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint32]


def emulate(body: str, registers: dict[str, Register]) -> Register:
    """What an assembly string leaves in $0: shl, shr, mov and lop3, and no more."""
    held = dict(registers)
    shape = next(iter(registers.values()))
    for statement in filter(None, (part.strip() for part in body.strip("{} ").split(";"))):
        if statement.startswith(".reg"):
            continue
        operation, rest = statement.split(None, 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        if operation == "shl.b32":
            held[target] = held[operands[0]] << np.uint32(int(operands[1]))
        elif operation == "shr.u32":
            held[target] = held[operands[0]] >> np.uint32(int(operands[1]))
        elif operation == "mov.b32":
            (source,) = operands
            held[target] = held[source] if source in held else np.full_like(shape, int(source, 0))
        else:
            assert operation == "lop3.b32"
            values = [
                held[o] if o in held else np.full_like(shape, int(o, 0)) for o in operands[:3]
            ]
            held[target] = _lop3(*values, int(operands[3], 0))
    return held["$0"]


def _lop3(a: Register, b: Register, c: Register, table: int) -> Register:
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            picked = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            out |= picked
    return out
