"""Runs the compiled PTX of a kernel without a GPU.

A text is parsed into instructions once (`ptx_text.py`); then programs run one after another. Of a
program each warp is somewhere in the text: those that are furthest behind go on, together where
they are at the same place, until a branch, a barrier or a place that others may come to. An
instruction is a function of all their lanes at once, found by its opcode: what needs registers only
is in `ptx_operations.py`, what goes on in the background in `ptx_async.py`, the rest in
`ptx_instructions.py`.

Nothing is guessed. These end a run with a `Fault`:

  - an opcode that is in neither table, or a form of operand that it does not take
  - an access to memory that is outside all arrays, or not aligned to its size
  - lanes of a warp that part at a branch, or meet at an instruction of the whole warp under a guard
  - a byte of shared memory that one warp writes and another reads or writes (another value) with no
    barrier between the two, in whatever order they came
  - a byte or a register that is touched while a copy or a product in the background has it, and
    what the background is not shown by a fence
  - a warp that waits at a barrier for one that has ended; a program that does not end
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_instructions import CONTROL, HANDLERS, execute
from tests.support.ptx_lanes import REGION, Argument, Lanes, Program
from tests.support.ptx_operations import OPERATIONS
from tests.support.ptx_text import Fault, Instruction, Text, parse

# Parts of a program that are run before it counts as endless.
_MOST_PARTS = 10_000
# Where a value is cached, and who sees it when, makes no difference here.
_HINTS = {
    "relaxed", "acquire", "release", "acq_rel", "weak", "volatile", "cta", "gpu", "sys", "ca",
    "cg", "cs", "cv", "lu", "nc", "wb", "wt", "L1::evict_last", "L1::evict_first",
    "L1::evict_normal", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B",
}  # fmt: skip


def run(
    ptx: str,
    grid: tuple[int, ...],
    threads: int,
    arguments: Sequence[Argument],
    shared_bytes: int,
) -> None:
    """Run every program of a kernel, on arrays that it changes in place.

    Args:
        grid: programs along x, y and z; 1 where there are fewer numbers.
        threads: of a program.
        arguments: those that the compiled kernel takes, in order; arrays are pointers to their
            first element. Those left out at the end must not be read.

    Raises:
        Fault: see this module's header.
    """
    grid = (*grid, 1, 1)[:3]
    text = parse(ptx)
    if text.threads not in (None, threads):
        raise Fault(f"compiled for {text.threads} threads, run with {threads}")
    text.instructions = [_known(instruction) for instruction in text.instructions]
    values, arrays = _arguments(text, arguments)
    with np.errstate(all="ignore"):
        for x, y, z in product(range(grid[0]), range(grid[1]), range(grid[2])):
            place = x, y, z
            _run_program(Program(text, values, arrays, place, grid, threads, shared_bytes))


def _known(instruction: Instruction) -> Instruction:
    """Under the opcode that the tables have."""
    if any(instruction.opcode in table for table in (OPERATIONS, CONTROL, HANDLERS)):
        return instruction
    opcode = ".".join(part for part in instruction.opcode.split(".") if part not in _HINTS)
    if opcode not in HANDLERS:
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
            argument = (place + 1) * REGION
        values.append(argument)
    return values, arrays


def _run_program(program: Program) -> None:
    targets = program.text.targets
    for _ in range(_MOST_PARTS):
        ready = [at for at, waits in zip(program.next, program.waiting, strict=True) if not waits]
        behind = min((at for at in ready if at is not None), default=None)
        if behind is not None:
            _run_part(program, behind, targets)
        elif not any(program.waiting):
            return
        elif None in program.next:
            raise Fault("a warp waits at a barrier for one that has ended")
        else:
            program.shared.meet()
            program.waiting = [False] * len(program.waiting)
    raise Fault(f"a program that does not end, near instruction {program.next}")


def _run_part(program: Program, at: int, targets: set[int]) -> None:
    """Run those warps that are at an instruction up to where they may meet or leave others."""
    warps = [
        warp
        for warp, (place, waits) in enumerate(zip(program.next, program.waiting, strict=True))
        if place == at and not waits
    ]
    lanes = Lanes(program, warps)
    while True:
        instruction = program.text.instructions[at]
        try:
            control = CONTROL.get(instruction.opcode)
            if control is not None:
                control(lanes, instruction, at)
                return
            execute(lanes, instruction)
        except Fault as fault:
            raise Fault(f"{fault}, in: {instruction.text}") from None
        at += 1
        if at in targets:
            lanes.go([at] * len(warps))
            return
