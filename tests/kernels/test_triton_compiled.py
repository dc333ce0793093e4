"""What the compiler makes of the kernels for GPUs that are not here.

`instructions.json` holds instructions by Triton version and kernel, per digit, or per weight for
products by whole codes: a ratchet. Where a version is not listed, all but that is checked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "compiled.py"
SHARED_BYTES = {"sm_80": 166912, "sm_90": 232448}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _multiplying(compiled: dict[str, Any]) -> dict[str, Any]:
    return compiled["kernels"] | compiled["whole"]


def test_fits_the_hardware(compiled: dict[str, Any]) -> None:
    for name, kernel in _multiplying(compiled).items():
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        assert kernel["shared_bytes"] <= SHARED_BYTES[name[:5]], name


def test_loads_are_wide_and_digits_meet_matrix_units(compiled: dict[str, Any]) -> None:
    for name, kernel in _multiplying(compiled).items():
        assert kernel["wide_loads"] > 0, name
        assert kernel["matrix"] > 0, name


def test_dequantizing_waits_for_memory_only(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["dequantizing"].items():
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        # An H200 issues about 17 for each weight in the time that its memory takes.
        assert kernel["instructions"] < 16, name


def test_whole_codes_take_fewer_instructions_than_their_slices(compiled: dict[str, Any]) -> None:
    for architecture in ("sm_80", "sm_90"):
        by_slice = compiled["kernels"][f"{architecture}, 32 tokens"]["instructions"]
        for bits, slices in ((4, 2), (6, 3), (8, 4)):
            whole = compiled["whole"][f"{architecture}, {bits} bits, 32 tokens"]["instructions"]
            assert whole < slices * by_slice


def test_preparing_stays_in_registers(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["preparing"].items():
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        assert kernel["shared_bytes"] <= SHARED_BYTES[name[:5]], name


def test_widths_unknown_to_the_host_cost_little(compiled: dict[str, Any]) -> None:
    kernels = compiled["kernels"]
    plain_names = [name for name in kernels if name.endswith("tokens")]
    assert plain_names
    for plain in plain_names:
        for variant, factor in (("halvable", 1.1), ("mixed", 1.2)):
            name = f"{plain}, {variant}"
            assert kernels[name]["instructions"] <= factor * kernels[plain]["instructions"], name
            assert kernels[name]["shared_bytes"] <= kernels[plain]["shared_bytes"], name


def test_no_more_instructions_than_before(compiled: dict[str, Any]) -> None:
    known = json.loads((Path(__file__).parent / "instructions.json").read_text(encoding="utf-8"))
    limits = known.get(compiled["triton"], {})
    found = {name: kernel["instructions"] for name, kernel in _multiplying(compiled).items()}
    assert found
    for name, limit in limits.items():
        assert found[name] <= limit * 1.05, f"{name}: {found[name]:.2f} instructions"
