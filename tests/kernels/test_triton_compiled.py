"""What the compiler makes of the kernels for GPUs that are not here.

`instructions.json` holds instructions by Triton version and kernel, per digit where widths are
mixed, else per weight: a ratchet. Where a version is not listed, all but that is checked.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mbq.kernels.widths import slices_of

SCRIPT = Path(__file__).parents[1] / "support" / "compiled.py"
FEW = ("sm_90, 1 token", "sm_90, 8 tokens")
SHARED_BYTES = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _multiplying(compiled: dict[str, Any]) -> dict[str, Any]:
    mixed = {f"{name}, mixed": kernel for name, kernel in compiled["mixed"].items()}
    return mixed | compiled["uniform"]


def test_fits_the_hardware(compiled: dict[str, Any]) -> None:
    for name, kernel in _multiplying(compiled).items():
        assert kernel["spills_in_loops"] == 0, f"{name} spills"
        assert kernel["shared_bytes"] <= SHARED_BYTES[name.split(",")[0]], name


def test_fits_hardware_that_it_was_not_made_for(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["elsewhere"].items():
        assert kernel["shared_bytes"] <= SHARED_BYTES[name.split(",")[0]], name
        assert kernel["tensor_columns"] <= 512, name


def test_loads_are_wide_and_digits_meet_matrix_units(compiled: dict[str, Any]) -> None:
    for name, kernel in _multiplying(compiled).items():
        assert kernel["wide_loads"] > 0, name
        assert kernel["matrix"] > 0, name


def test_few_tokens_meet_codes_in_registers(compiled: dict[str, Any]) -> None:
    found = {n: k for n, k in compiled["uniform"].items() if ", 8 tokens" in n or ", 1 token" in n}
    assert found
    for name, kernel in found.items():
        assert kernel["moving"] == 0, f"{name} moves them between threads"


def test_few_tokens_that_differ_stay_in_registers(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["launched"].items():
        assert kernel["spills_in_loops"] == 0, f"{name} spills"
        assert kernel["shared_bytes"] <= SHARED_BYTES[name.split(",")[0]], name
        assert kernel["matrix"] > 0, name
    for name, kernel in compiled["differing"].items():
        assert kernel["moving"] == 0, f"{name} moves them between threads"


def test_few_tokens_ask_for_weights_before_the_launch_before_has_ended(
    compiled: dict[str, Any],
) -> None:
    """Whether the host knows the width, only the device, or that launch is to decide it."""
    found = {n: k for n, k in compiled["uniform"].items() if n.startswith(FEW)}
    assert found
    for name, kernel in (found | compiled["launched"]).items():
        assert kernel["early_loads"] > 0, name


def test_many_tokens_meet_codes_in_registers_and_wait_once_a_group(
    compiled: dict[str, Any],
) -> None:
    """On Hopper: only tokens go through shared memory, words of the first turn come early."""
    for tokens, copied in ((16, 2 * 256 * 16 // 16 // 32), (64, 2 * 256 * 64 // 16 // 32)):
        for bits in (2, 3, 4, 8, "any"):
            kernel = compiled["uniform"][f"sm_90, {tokens} tokens, {bits} bits"]
            name = f"{tokens} tokens, {bits} bits"
            assert kernel["product_waits"] == 2, name
            assert kernel["copies"] * kernel["warps"] == copied, name
            assert kernel["shared"] == 0, f"{name} moves them between threads"
            assert kernel["early_loads"] > 0, name


def test_few_tokens_load_before_they_multiply(compiled: dict[str, Any]) -> None:
    """All loads of a turn come before its first product, and the loop has two turns."""
    for name in (name for name in compiled["uniform"] if name.startswith(FEW)):
        assert compiled["uniform"][name]["returns_to_loads"] == 1, name


def test_few_tokens_fit_the_registers_however_they_are_cut(compiled: dict[str, Any]) -> None:
    """By rule, where registers are limited and in small groups, too; and as shipped."""
    for name, kernel in (compiled["cuts"] | compiled["shipped"]).items():
        assert kernel["spills_in_loops"] == 0, f"{name} spills"
        assert kernel["moving"] == 0, f"{name} moves codes between threads"


def test_three_bits_read_less_than_four(compiled: dict[str, Any]) -> None:
    found = {n: k for n, k in compiled["uniform"].items() if n.endswith(", 3 bits")}
    assert found
    for name, three in found.items():
        four = compiled["uniform"][name.replace("3 bits", "4 bits")]
        assert three["wide_loads"] < four["wide_loads"], name


def test_dequantizing_waits_for_memory_only(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["dequantizing"].items():
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        # An H200 issues about 17 for each weight in the time that its memory takes.
        assert kernel["instructions"] < 16, name


def test_one_product_for_a_weight_takes_less_than_one_for_each_slice(
    compiled: dict[str, Any],
) -> None:
    for name, mixed in compiled["mixed"].items():
        for bits in (4, 8):
            uniform = compiled["uniform"][f"{name}, {bits} bits"]["instructions"]
            assert uniform < slices_of(bits) * mixed["instructions"], name


def test_a_width_that_only_the_device_knows_costs_no_more_than_the_largest(
    compiled: dict[str, Any],
) -> None:
    for name in (name for name in compiled["mixed"] if f"{name}, any bits" in compiled["uniform"]):
        known, unknown = (compiled["uniform"][f"{name}, {bits} bits"] for bits in (8, "any"))
        # The largest loop is that of 8 bits.
        assert unknown["instructions"] <= 1.05 * known["instructions"], name
        assert unknown["shared_bytes"] <= 1.05 * known["shared_bytes"], name


def test_preparing_stays_in_registers(compiled: dict[str, Any]) -> None:
    for name, kernel in compiled["preparing"].items():
        assert kernel["stack_bytes"] == 0, f"{name} spills"
        assert kernel["shared_bytes"] <= SHARED_BYTES[name.split(",")[0]], name


def test_no_more_instructions_than_before(compiled: dict[str, Any]) -> None:
    known = json.loads((Path(__file__).parent / "instructions.json").read_text(encoding="utf-8"))
    limits = known.get(compiled["triton"], {})
    found = {name: kernel["instructions"] for name, kernel in _multiplying(compiled).items()}
    assert found
    for name, limit in limits.items():
        assert found[name] <= limit * 1.05, f"{name}: {found[name]:.2f} instructions"
