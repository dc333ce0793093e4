"""Compiles kernels for sm_90 as they would be launched there: JSON, a request and an answer a line.

    python -m tests.support.ptx_compiler

Runs in a process of its own, without TRITON_INTERPRET (`emulated.py`).

A request has `module` and `kernel`; `arguments`, in order: null, a type such as "*fp16", or an
integer; `constants`; and `options` of the compiler. The answer has `ptx`, `shared_bytes`, `threads`
and `kept`, the places of the arguments that the compiled kernel takes.
"""

import json
import sys
from importlib import import_module
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        kernel = getattr(import_module(request["module"]), request["kernel"])
        made = compile_launch(
            kernel, request["arguments"], request["constants"], request["options"]
        )
        print(json.dumps(made), flush=True)


def compile_launch(
    kernel: Any, arguments: list[Any], constants: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """Integers are taken as Triton's launcher takes them, arrays to begin at multiples of 16."""
    names = kernel.arg_names
    signature, constants, attributes = {}, dict(constants), {}
    for place, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=False)):
        specialized = not parameter.do_not_specialize
        if argument is None or (specialized and argument == 1):
            constants[names[place]] = argument
        elif isinstance(argument, str) or (specialized and argument % 16 == 0):
            attributes[place,] = [["tt.divisibility", 16]]
        signature[names[place]] = argument if isinstance(argument, str) else "i32"
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    return {
        "ptx": compiled.asm["ptx"],
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "kept": [i for i in range(len(arguments)) if names[i] not in constants],
    }


if __name__ == "__main__":
    main()
