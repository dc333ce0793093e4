"""The few PTX instructions that the kernels' assembly uses, on arrays of 32-bit registers."""

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_operations import OPERATIONS, TYPES

Register = NDArray[np.uint32]


def emulate(body: str, registers: dict[str, Register]) -> dict[str, Register]:
    """What an assembly string leaves in registers."""
    held = dict(registers)
    shape = next(iter(registers.values()))

    def value(operand: str) -> Register:
        return held[operand] if operand in held else np.full_like(shape, int(operand, 0))

    statements = body.replace("{", ";").replace("}", ";").split(";")
    for statement in filter(None, (part.strip() for part in statements)):
        if statement.startswith(".reg"):
            continue
        opcode, rest = statement.split(None, 1)
        target, *operands = [operand.strip() for operand in rest.split(",")]
        if opcode == "mov.b32":
            held[target] = value(operands[0])
            continue
        operation = OPERATIONS[opcode]
        sources = zip(operands, operation.sources, strict=True)
        made = operation.function(*(value(one).view(TYPES[kind]) for one, kind in sources))
        held[target] = made.view(np.uint32)
    return held
