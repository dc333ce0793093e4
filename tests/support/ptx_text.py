"""The PTX of a kernel as the compiler writes it, to instructions.

What a text has beside instructions, labels, registers and targets of branches, as where lines come
from, is left out; so is all that follows the kernel. Registers of blocks, which inline assembly
opens, get names of their own. What an instruction means is for `ptx_machine.py` to say.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Where shared memory begins: not at zero, so that what forgets to add it is found.
SHARED_BASE = 1024


class Fault(Exception):
    """What PTX does that it must not, or that this machine does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    kind: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Address:
    base: "Register | Immediate | Parameter"
    offset: int


@dataclass(frozen=True)
class Parameter:
    place: int
    kind: str


@dataclass(frozen=True)
class Label:
    name: str


# `None` is `_`, a result that nobody wants; a tuple stands in braces.
Operand = Register | Immediate | Address | Label | tuple["Register | Immediate | None", ...] | None


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str

    @cached_property
    def registers(self) -> frozenset[str]:
        """Names of those among the operands, and in them."""
        each = [one for operand in self.operands for one in _parts(operand)]
        return frozenset(one.name for one in each if isinstance(one, Register))


def _parts(operand: Operand) -> tuple[Any, ...]:
    if isinstance(operand, Address):
        return (operand.base,)
    return operand if isinstance(operand, tuple) else (operand,)


@dataclass
class Text:
    """A parsed kernel.

    Attributes:
        labels: where each stands.
        threads: that it was compiled for, if it says so.
    """

    parameters: list[Parameter] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int | None = None

    @property
    def targets(self) -> set[int]:
        """Instructions that are branched to."""
        operands = [one for each in self.instructions for one in each.operands]
        return {self.labels[one.name] for one in operands if isinstance(one, Label)}


def parse(ptx: str) -> Text:
    """The only kernel of a text."""
    code = re.sub(r"//[^\n]*", "", ptx)
    code = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", code, flags=re.MULTILINE)
    entries = list(re.finditer(r"\.entry\s+\w+\s*\((.*?)\)([^{]*)\{", code, re.DOTALL))
    if len(entries) != 1 or ".func" in code:
        raise Fault(f"{len(entries)} kernels, or functions that are called: one kernel expected")
    text = Text()
    names: dict[str, Parameter] = {}
    for place, declared in enumerate(filter(str.strip, entries[0][1].split(","))):
        kind, name = declared.split()[1].lstrip("."), declared.split()[-1]
        names[name] = Parameter(place, kind)
    text.parameters = list(names.values())
    if threads := re.search(r"\.reqntid\s+(\d+)", entries[0][2]):
        text.threads = int(threads[1])
    scopes: list[_Scope] = [_Scope(names)]
    opened = 0
    for statement in _statements(code[entries[0].end() :]):
        if statement == "{":
            opened += 1
            scopes.append(_Scope(scopes[-1].known, opened))
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            text.labels[statement[:-1]] = len(text.instructions)
        elif statement.startswith(".reg"):
            scopes[-1].declare(statement)
        elif not statement.startswith(".pragma"):
            text.instructions.append(_instruction(statement, scopes[-1]))
    return text


def _statements(body: str) -> Iterator[str]:
    """Instructions and declarations, labels with their colons, and braces of blocks."""
    statement, depth = "", 1
    for piece in re.split(r"([{};])", body):
        if piece in ("{", "}") and not statement:
            depth += 1 if piece == "{" else -1
            if not depth:
                return
            yield piece
        elif piece == ";":
            yield statement
            statement = ""
        else:
            statement = (statement + piece).lstrip() if piece not in "{}" else statement + piece
            while label := re.match(r"([$\w]+):(?!:)\s*", statement):
                yield f"{label[1]}:"
                statement = statement[label.end() :]
    raise Fault("a block that does not end")


class _Scope:
    """Names that are known in a block; those of registers are made unique."""

    def __init__(self, known: dict[str, Any], number: int = 0) -> None:
        self.known, self._number = dict(known), number

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(None, 2)
        for name in map(str.strip, names.split(",")):
            counted = re.fullmatch(r"(.*)<(\d+)>", name)
            each = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            for one in each:
                unique = f"{one}@{self._number}" if self._number else one
                self.known[one] = Register(unique, kind.lstrip("."))

    def operand(self, written: str) -> Operand:
        if written.startswith("{"):
            return tuple(self._value(part.strip()) for part in written.strip("{} ").split(","))
        if written.startswith("["):
            inside = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+)\s*)?\]", written)
            if inside is None:
                raise Fault(f"an unknown address: {written}")
            base = self.known.get(inside[1]) or self._value(inside[1])
            assert base is not None
            return Address(base, int(inside[2] or "0", 0))
        if "|" in written:
            return tuple(self._value(part.strip()) for part in written.split("|"))
        return Label(written) if written.startswith("$") else self._value(written)

    def _value(self, written: str) -> Register | Immediate | None:
        if written == "_":
            return None
        if written == "global_smem":
            return Immediate(str(SHARED_BASE))
        if written in _SPECIAL:
            return Register(written, "b32")
        if isinstance(found := self.known.get(written), Register):
            return found
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fFdD][0-9a-fA-F]+", written):
            raise Fault(f"an unknown operand: {written}")
        return Immediate(written)


_SPECIAL = {f"%{n}.{axis}" for n in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}
_SPECIAL |= {"%laneid"}


def _instruction(statement: str, scope: _Scope) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)([%$\w]+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise Fault(f"an unknown statement: {statement}")
    negated, guard, opcode, rest = found.groups()
    written = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
    try:
        operands = tuple(scope.operand(one.strip()) for one in written)
        register = scope.operand(guard) if guard else None
    except Fault as fault:
        raise Fault(f"{fault}, in: {statement}") from None
    assert register is None or isinstance(register, Register)
    return Instruction(opcode, operands, register, bool(negated), statement)
