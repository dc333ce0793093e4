"""Compile kernels for GPUs that are not here, and print what they take, as JSON.

    python tests/support/compiled.py

Runs in a process of its own, without TRITON_INTERPRET. Triton's package brings the assembler and
the disassembler. `instructions` are those of the largest loop, per digit (2 bits of one weight), or
of the whole kernel, per weight, where it has no loop.
"""

import itertools
import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mbq.kernels import dispatch
from mbq.kernels.triton_dequantize import _ROWS, _WARPS, _dequantize_kernel
from mbq.kernels.triton_mixed import MOST_TILE_TOKENS, _mixed_kernel
from mbq.kernels.triton_narrow import _narrow_kernel, most_registers, turns
from mbq.kernels.triton_operands import loads_ahead
from mbq.kernels.triton_prepare import _prepare_kernel, rows_ahead, warps_for
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.triton_uniform import _uniform_kernel
from mbq.kernels.widths import WIDTHS, slices_of

# Of LLaMA-2-7B's gate and up.
ROWS = 22016
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "x_ptr": "*fp16",
    "digits_ptr": "*i16",
    "out_ptr": "*bf16",
    "trunk_ptr": "*fp16",
    "x16_ptr": "*fp16",
    "bytes_ptr": "*i8",
    "given_ptr": "*i64",
    "tally_ptr": "*i64",
}
WHOLE = (
    "scale_zero_ptr",
    "gain_bias_ptr",
    "bits_ptr",
    "steps_ptr",
    "arrived_ptr",
)
# What the launcher finds to be multiples of 16 at every real shape.
ALIGNED = (
    "out_features",
    "in_features",
    "padded_inputs",
    "x_stride",
    "rows",
    "plane_stride",
    "block_stride",
    "group_stride",
    "gain_stride",
)
# Matrix instructions.
MATRIX = r"\b(HMMA|HGMMA|IMMA)\b"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?);", re.MULTILINE)


def main() -> None:
    mixed, uniform, dequantizing, preparing, elsewhere = {}, {}, {}, {}, {}
    for architecture in (80, 90):
        for tokens in (1, 8, 16, 64):
            name = f"sm_{architecture}, {_tokens(tokens)}"
            if tokens == 16:
                mixed[name] = build_mixed(architecture, tokens, 2)
            for bits in (2, 3, 4, 8, 0):
                made = build_uniform(architecture, tokens, 2, bits)
                uniform[f"{name}, {bits or 'any'} bits"] = made
        # The tightest of small groups.
        name = f"sm_{architecture}, {MOST_TILE_TOKENS} tokens, groups of 32"
        mixed[name] = build_mixed(architecture, MOST_TILE_TOKENS, 8)
        for bits in (4, 8):
            uniform[f"{name}, {bits} bits"] = build_uniform(architecture, MOST_TILE_TOKENS, 8, bits)
        for bits in WIDTHS:
            name = f"sm_{architecture}, {bits} bits"
            dequantizing[name] = build_dequantizing(architecture, bits)
        for inputs in (4096, 5120, 14336):
            preparing[f"sm_{architecture}, {inputs} inputs"] = build_preparing(architecture, inputs)
        preparing[f"sm_{architecture}, one width"] = build_preparing(architecture, 4096, alike=True)
    # Those that have less shared memory, and those whose sums lie elsewhere, at the largest tiles.
    for architecture, tokens in itertools.product((89, 100), (32, 64)):
        name = f"sm_{architecture}, {tokens} tokens, 8 bits"
        elsewhere[name] = build_uniform(architecture, tokens, 2, 8)
    document = {
        "triton": triton.__version__,
        "differing": {f"sm_90, up to {bits} bits": build_differing(90, bits) for bits in (3, 4, 8)},
        # As it is launched. The compiler's loops lie within each other there.
        "launched": {"sm_90, 8 tokens": build_differing(90, 0)},
        "cuts": {
            "1 token, 4 bits, few rows": build_cut(4096, 1, 2, 4),
            "1 token, 4 bits, few rows, groups of 256": build_cut(4096, 1, 1, 4),
            "1 token, 8 bits, few rows, groups of 32": build_cut(4096, 1, 8, 8),
            "2 tokens, 8 bits": build_cut(22016, 2, 2, 8),
            "4 tokens, 2 bits": build_cut(22016, 4, 2, 2),
            "2 tokens, 8 bits, groups of 32": build_cut(22016, 2, 8, 8),
            "4 tokens, 8 bits, groups of 64": build_cut(22016, 4, 4, 8),
            "8 tokens, 4 bits, groups of 32": build_cut(22016, 8, 8, 4),
            "8 tokens, 8 bits, groups of 256": build_cut(22016, 8, 1, 8),
        },
        "shipped": shipped(),
        "mixed": mixed,
        "uniform": uniform,
        "dequantizing": dequantizing,
        "preparing": preparing,
        "elsewhere": elsewhere,
    }
    print(json.dumps(document))


def _tokens(count: int) -> str:
    return f"{count} tokens" if count > 1 else "1 token"


def build_mixed(architecture: int, tokens: int, groups: int) -> dict[str, Any]:
    """The default tile of LLaMA-2-7B's gate and up; `instructions` are those per digit."""
    tile = _tile(architecture, tokens, dispatch.MIXED, groups)
    return _multiplying(_mixed_kernel, {"BLOCK_GROUPS": groups}, architecture, tokens, tile)


def build_differing(architecture: int, bits: int) -> dict[str, Any]:
    """Few tokens whose widths may differ; one loop serves them and those that agree."""
    constants = {"BITS": bits, "MIXED": True, "GROUPS": 2}
    return _narrow(architecture, 8, dispatch.MIXED, constants)


def build_uniform(architecture: int, tokens: int, groups: int, bits: int) -> dict[str, Any]:
    """The same at one width; 0 for one that only the device knows, `instructions` per weight."""
    kind = dispatch.kind_of(False, bits or None)
    if dispatch.narrow(tokens):
        constants = {"BITS": bits, "MIXED": False, "GROUPS": groups}
        return _narrow(architecture, tokens, kind, constants)
    tile = _tile(architecture, tokens, kind, groups)
    constants = {"BITS": bits, "MOST_SLICES": 4, "BLOCK_GROUPS": groups}
    return _multiplying(_uniform_kernel, constants, architecture, tokens, tile)


def build_cut(rows: int, tokens: int, groups: int, bits: int) -> dict[str, Any]:
    """Few tokens of one width times so many rows, as the rule of thumb cuts them."""
    kind = dispatch.kind_of(False, bits)
    return _narrow(90, tokens, kind, {"BITS": bits, "MIXED": False, "GROUPS": groups}, rows)


def shipped() -> dict[str, Any]:
    """Few tokens as the tiles cut them that ship with the package, each cut once."""
    file = Path(dispatch.__file__).with_name("tiles_sm90.json")
    made = {}
    for kind, shapes in json.loads(file.read_text(encoding="utf-8")).items():
        for tokens, cut in [item for by_tokens in shapes.values() for item in by_tokens.items()]:
            bits = 0 if kind == dispatch.ANY else kind
            if kind == dispatch.MIXED or not dispatch.narrow(int(tokens)):
                continue
            constants = {"BITS": int(bits), "MIXED": False, "GROUPS": 2}
            name = f"{tokens} tokens, {kind} bits, {cut}"
            if name not in made:
                made[name] = _cut(90, int(tokens), Tile(*cut), constants)
    return made


def _narrow(
    architecture: int, tokens: int, kind: str, constants: dict[str, Any], rows: int = ROWS
) -> dict[str, Any]:
    tile = _tile(architecture, tokens, kind, constants["GROUPS"], rows)
    return _cut(architecture, tokens, tile, constants)


def _cut(architecture: int, tokens: int, tile: Tile, constants: dict[str, Any]) -> dict[str, Any]:
    constants = {"MOST_SLICES": 4, "T": tokens} | constants
    blocks = tile.warps * turns(tokens, constants["GROUPS"], constants["MIXED"])
    return _multiplying(_narrow_kernel, constants, architecture, tokens, tile, blocks)


def _tile(architecture: int, tokens: int, kind: str, groups: int, rows: int = ROWS) -> Tile:
    capability = divmod(architecture, 10)
    return dispatch.default_tile(rows, 16, tokens, kind, groups > 2, capability)


def _multiplying(
    kernel: Any,
    constants: dict[str, Any],
    architecture: int,
    tokens: int,
    tile: Tile,
    blocks: int = 1,
) -> dict[str, Any]:
    """What a kernel takes that multiplies by so many blocks of 256 inputs in a turn of its loop."""
    cut = {
        "ROWS": tile.rows,
        "TOKENS": tokens,
        "SPLIT": tile.split,
        "WARPS": tile.warps,
        "AHEAD": loads_ahead(tile.warps, divmod(architecture, 10)),
    }
    constants = constants | {name: cut[name] for name in cut if name in kernel.arg_names}
    constants |= {"ASM": True, "PROGRAMMATIC": architecture >= 90}
    most = None
    if kernel is _narrow_kernel:
        most = most_registers(tokens, tile, 256 // constants["GROUPS"])
    made = _compile(kernel, constants, architecture, tile.warps, most, tile.stages)
    assembly = made.pop("assembly")
    weights = blocks * tile.rows * 256 / (32 * tile.warps)
    loops = _loops(assembly)
    largest = max(loops, key=len)
    early, waits, _ = assembly.partition("ACQBULK")
    spilled = [one for loop in loops for one in loop if re.search(r"\b(LDL|STL)\b", one)]
    return made | {
        "warps": tile.warps,
        "spills_in_loops": len(spilled),
        # Before it waits for the launch before.
        "early_loads": early.count("LDG.E.128") if waits else 0,
        "wide_loads": len(re.findall(r"LDGSTS\.E\.BYPASS\.128|LDG\.E\.128", assembly)),
        "matrix": len(re.findall(MATRIX, assembly)),
        # For products of warps that multiply in groups, in a turn.
        "product_waits": len([one for one in largest if "WARPGROUP.DEPBAR" in one]),
        # Loads that never happen aside, which only take time.
        "shared": len(
            [one for one in largest if re.search(r"^(?!@!PT ).*\b(LDS|LDSM|STS|SHFL)\b", one)]
        ),
        "copies": len([one for one in largest if "LDGSTS" in one]),
        "moving": len([one for one in largest if re.search(r"\b(LDS|LDSM|STS|SHFL|BAR)\b", one)]),
        "returns_to_loads": _returns_to_loads(largest),
        "instructions": len(largest) / weights,
    }


def _returns_to_loads(loop: list[str]) -> int:
    """How often products are followed by loads."""
    loads = [
        bool(re.search(r"\bLDG\b", one)) for one in loop if re.search(rf"\bLDG\b|{MATRIX}", one)
    ]
    return sum(not before and after for before, after in itertools.pairwise(loads))


def build_dequantizing(architecture: int, bits: int) -> dict[str, Any]:
    """Groups of 128."""
    constants = {
        "BITS": bits,
        "SLICES": slices_of(bits),
        "GAIN_ROW": WIDTHS.index(bits),
        "BLOCK_GROUPS": 2,
        "ROWS": _ROWS,
        "ASM": True,
    }
    made = _compile(_dequantize_kernel, constants, architecture, _WARPS)
    assembly = made.pop("assembly")
    return made | {"instructions": len(_INSTRUCTION.findall(assembly)) * 32 * _WARPS / _ROWS / 256}


def build_preparing(architecture: int, inputs: int, alike: bool = False) -> dict[str, Any]:
    """A router of 8 rows that decides for three linears; or one width for a single token."""
    rows = 0 if alike else 8
    absent = ["x16", "sum", "bias_sum", "unscale", "steps"]
    absent += ["given", "trunk", "offset", "head", "threshold", "tally"] if alike else []
    constants: dict[str, Any] = {f"{name}_ptr": None for name in absent} | {
        "CHUNKS": triton.next_power_of_2(inputs // 32),
        "GROUP_CHUNKS": 4,
        "LINEARS": 3,
        "GIVEN": False,
        "EXTRA": 0 if alike else 4,
        "HIDDEN": rows,
        "FEATURES": max(rows, 1),
        "AHEAD": min(rows, rows_ahead(inputs)),
        "TALLIED": not alike,
        "T": 1 if alike else 8,
        "STEPS": False,
        "PROGRAMMATIC": architecture >= 90,
    }
    made = _compile(_prepare_kernel, constants, architecture, warps_for(inputs))
    assembly = made.pop("assembly")
    return made | {"instructions": len(_INSTRUCTION.findall(assembly))}


def _compile(
    kernel: Any,
    constants: dict[str, Any],
    architecture: int,
    warps: int,
    registers: int | None = None,
    stages: int = 3,
) -> dict[str, Any]:
    """Bytes that it takes, and its assembly."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _kind(name) for name in names}
    aligned = [
        name
        for name in names
        if name not in constants and (name.endswith("_ptr") or name in ALIGNED)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "maxnreg": registers, "num_stages": stages},
    )
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        assembly = _run("nvdisasm", "-c", cubin)
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None
    return {
        "stack_bytes": int(stack[1]),
        "shared_bytes": compiled.metadata.shared,
        # Of 512, where sums do not lie in registers.
        "tensor_columns": getattr(compiled.metadata, "tmem_size", None) or 0,
        "assembly": assembly,
    }


def _kind(name: str) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    return POINTERS.get(name, "*i32" if name in WHOLE else "*fp32")


def _run(tool: str, *arguments: object) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(assembly: str) -> list[list[str]]:
    """Instructions from a label to the farthest branch back to it."""
    labels: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    instructions: list[str] = []
    for line in assembly.splitlines():
        if label := re.match(r"^(\.L_\S+):", line.strip()):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*`\((\.L_\S+?)\)", instruction[1])
            if branch and branch[1] in labels:
                found[branch[1]] = instructions[labels[branch[1]] :]
    return list(found.values())


if __name__ == "__main__":
    main()
