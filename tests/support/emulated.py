"""Kernels that a test launches as on a Hopper GPU: compiled for one, and run in an emulator.

    with Compiler() as compiler:
        monkeypatch.setattr(triton_narrow, "_narrow_kernel", Emulated(compiler, ...))

What the package does before and after a launch happens as ever, on the CPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tests.support import ptx_machine

# Of launches on Hopper; in Triton's interpreter there are others.
_CONSTANTS = {"ASM": True, "PROGRAMMATIC": True}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
_TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiler:
    """A process that compiles, since Triton in this one interprets."""

    def __enter__(self) -> Self:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ptx_compiler"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def compile(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, f"{request['kernel']} was not compiled"
        made: dict[str, Any] = json.loads(answer)
        return made


@dataclass(frozen=True)
class Emulated:
    """Stands for a kernel: `kernel[grid](*arguments, **constants)`"""

    compiler: Compiler
    module: str
    kernel: str

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **named: Any) -> None:
            constants = {k: v for k, v in named.items() if k.isupper()}
            made = self.compiler.compile(
                {
                    "module": self.module,
                    "kernel": self.kernel,
                    "arguments": [
                        _TYPES[one.dtype] if isinstance(one, Tensor) else one for one in arguments
                    ],
                    "constants": constants
                    | {k: v for k, v in _CONSTANTS.items() if k in constants},
                    "options": {k: named[k] for k in _OPTIONS if named.get(k) is not None},
                }
            )
            given = [
                _array(arguments[i]) if isinstance(arguments[i], Tensor) else arguments[i]
                for i in made["kept"]
            ]
            ptx_machine.run(made["ptx"], grid, made["threads"], given, made["shared_bytes"])

        return launch


def _array(tensor: Tensor) -> Any:
    """Its memory; numpy knows no bfloat16."""
    assert tensor.is_contiguous()
    return (
        tensor.detach()
        .view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype)
        .numpy()
    )
