"""Instructions of the emulator that begin something in the background, and wait for it.

`BACKGROUND` has copies from global to shared memory, fences, and waits; `PRODUCTS` those of warp
groups, four warps together, times a matrix in shared memory. What a copy brings is in its place
once its warp waited for it. Products are made when they begin: nobody may change what they read
(`ptx_shared.py`) or look at what they write (`ptx_background.py`) before they are waited for.

Legend: W warps, J blocks of 8 columns, n lanes of the warps that are at an instruction.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from tests.support.ptx_background import Background, Copy, Groups, Product
from tests.support.ptx_lanes import LANES, Lanes
from tests.support.ptx_operations import Array, matrix_product
from tests.support.ptx_text import Fault, Immediate, Operand, Register

# Warps that multiply together, and inputs that they multiply at once.
_GROUP = 4
_INPUTS = 16
# What a descriptor may have set: start, leading and stride bytes, and how rows are swizzled.
_FIELDS = 0x3FFF << 0 | 0x3FFF << 16 | 0x3FFF << 32 | 3 << 62


def _number(operand: Operand) -> int:
    if not isinstance(operand, Immediate):
        raise Fault(f"not a number: {operand}")
    return int(operand.text, 0)


def _copy(
    sizes: tuple[int, ...], lanes: Lanes, target: Operand, source: Operand, size: Operand,
    given: Operand = None,
) -> None:  # fmt: skip
    """Of so many bytes; zeros where none are `given`."""
    count = _number(size)
    if count not in sizes:
        raise Fault(f"copies of {count} bytes, not of {sizes}")
    chosen = lanes.chosen()
    warp = lanes.warp[chosen]
    there = lanes.full(size if given is None else given, "u32")[chosen]
    if not np.isin(there, (0, count)).all():
        raise Fault("a copy that is zero in part")
    whole = there > 0
    values = np.zeros((len(chosen), count), np.uint8)
    addresses = lanes.addresses(source, "global")[chosen][whole]
    values[whole] = lanes.load("global", addresses, count, warp[whole])
    at = lanes.shared_places(lanes.addresses(target, "shared")[chosen], count)
    lanes.program.shared.begin_copy(at, warp, values)
    for one in lanes.warps:
        mine = warp == one
        lanes.program.background[one].copies.add(Copy(at[mine], values[mine]))


def _commit(of: Callable[[Background], Groups[Any]], lanes: Lanes) -> None:
    lanes.together()
    for warp in lanes.warps:
        of(lanes.program.background[warp]).commit()


def _await_copies(lanes: Lanes, left: Operand) -> None:
    lanes.together()
    for warp in lanes.warps:
        for copy in lanes.program.background[warp].copies.wait(_number(left)):
            lanes.program.shared.end_copy(copy.at, np.full(len(copy.at), warp), copy.values)


def _await_products(lanes: Lanes, left: Operand) -> None:
    lanes.together()
    for warp in lanes.warps:
        for product in lanes.program.background[warp].products.wait(_number(left)):
            lanes.program.shared.end_product(product.at, np.full(len(product.at), warp))


def _fence_registers(lanes: Lanes) -> None:
    lanes.together()
    for warp in lanes.warps:
        lanes.program.background[warp].fence()


def _fence_memory(lanes: Lanes) -> None:
    lanes.together()
    for warp in lanes.warps:
        lanes.program.shared.fence(warp)


def row_addresses(descriptor: int, columns: int) -> Array:
    """Where a matrix lies, 16 bytes, which are 8 inputs of a column, after another: [columns, 2].

    Columns are rows of 128, 64 or 32 bytes, 8 in a block. The 16 bytes of a row change places, by
    the number of the row or, where rows are narrower, of every second or fourth one.
    """
    start, _, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = descriptor >> 62
    if descriptor & ~_FIELDS or not mode:
        raise Fault(f"an unknown descriptor: {descriptor:#x}")
    width = 256 >> mode
    if start % (8 * width) > width - 2 * _INPUTS:
        raise Fault(f"a matrix at {start:#x}, not in the first of 8 rows of {width} bytes")
    column = np.arange(columns, dtype=np.uint64)[:, None]
    at = start + column // 8 * stride + column % 8 * width + np.array([0, 16], np.uint64)
    made: Array = at ^ (at >> 7 & width // 16 - 1) << 4
    return made


def _multiply(columns: int, lanes: Lanes, *operands: Operand) -> None:
    """Add a product to, or put it in place of, sums of 64 rows a group and so many columns."""
    lanes.together()
    sums, factors, descriptor, adding, *form = operands
    if form != [Immediate("1"), Immediate("1"), Immediate("0")]:
        raise Fault("a matrix that is negated, or whose columns lie side by side")
    targets, sources = _registers(sums, columns // 2), _registers(factors, 4)
    groups = np.array(lanes.warps).reshape(-1, _GROUP) if len(lanes.warps) % _GROUP == 0 else None
    if groups is None or (groups != groups[:, :1] // _GROUP * _GROUP + np.arange(_GROUP)).any():
        raise Fault(f"warps {lanes.warps} are no whole groups")
    described = _agreed(lanes.full(descriptor, "u64"))
    added = np.repeat(_agreed(lanes.full(adding, "pred")), _GROUP)
    right = []
    for group, one in zip(groups.tolist(), described.tolist(), strict=True):
        at = lanes.shared_places(row_addresses(one, columns).reshape(-1), 16)
        for warp in group:
            lanes.program.background[warp].multiply(Product(targets, sources, at))
            lanes.program.shared.begin_product(at, np.full(len(at), warp))
        right.append(_by_lane(lanes.program.shared.bytes[at].view(np.float16)))
    left = np.stack([lanes.by_warp(one, "f16x2") for one in sources])
    before = np.stack([lanes.by_warp(one, "f32") for one in targets])
    before = np.where(added[:, None], before, np.float32(0))
    made = _by_blocks(left, np.repeat(right, _GROUP, axis=0), before)
    for target, value in zip(targets, made, strict=True):
        lanes.write(target, "f32", value.reshape(-1))


def _registers(operand: Operand, count: int) -> tuple[Register, ...]:
    each = operand if isinstance(operand, tuple) else ()
    registers = tuple(one for one in each if isinstance(one, Register))
    if len(registers) != count or len(each) != count:
        raise Fault(f"not {count} registers: {operand}")
    return registers


def _agreed(values: Array) -> Array:
    """The value of each group, of those that its lanes have."""
    by_group = values.reshape(-1, _GROUP * LANES)
    if (by_group != by_group[:, :1]).any():
        raise Fault("lanes of a group differ")
    first: Array = by_group[:, 0]
    return first


def _by_lane(columns: Array) -> Array:
    """Columns [8 J, 16] to the registers that a warp multiplies by: [J, 2, 32, 2]."""
    return columns.reshape(-1, 8, 2, 4, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2, LANES, 2)


def _by_blocks(left: Array, right: Array, before: Array) -> Array:
    """Sums [4 J, W, 32] as a warp would make them that multiplies by a block after another.

    Args:
        left: [4, W, 32, 2].
        right: [W, J, 2, 32, 2].
        before: [4 J, W, 32].
    """
    warps, blocks = right.shape[:2]
    made = matrix_product(
        np.repeat(left, blocks, axis=1),
        right.transpose(2, 0, 1, 3, 4).reshape(2, warps * blocks, LANES, 2),
        before.reshape(blocks, 4, warps, LANES).transpose(1, 2, 0, 3).reshape(4, -1, LANES),
        saturate=False,
    )
    return made.reshape(4, warps, blocks, LANES).transpose(2, 0, 1, 3).reshape(-1, warps, LANES)


BACKGROUND: dict[str, Callable[..., None]] = {
    "cp.async.ca.shared.global": partial(_copy, (4, 8, 16)),
    "cp.async.cg.shared.global": partial(_copy, (16,)),
    "cp.async.commit_group": partial(_commit, lambda warp: warp.copies),
    "cp.async.wait_group": _await_copies,
    "fence.proxy.async.shared::cta": _fence_memory,
    "wgmma.fence.sync.aligned": _fence_registers,
    "wgmma.commit_group.sync.aligned": partial(_commit, lambda warp: warp.products),
    "wgmma.wait_group.sync.aligned": _await_products,
}
PRODUCTS: dict[str, Callable[..., Any]] = {
    f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16": partial(_multiply, columns)
    for columns in range(8, 257, 8)
}
