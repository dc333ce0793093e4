"""Shared memory of a program of the emulator, and who may touch which byte of it.

A byte that one warp writes is not for another before a barrier. A copy in the background owns the
bytes that it goes to until it is waited for; a product in the background reads its bytes until
then. Products see what was written only past a fence between the two, by a warp that sees it.
"""

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_operations import Array
from tests.support.ptx_text import Fault


class Shared:
    """Bytes, and which warps, a bit each, touched them since the last barrier."""

    def __init__(self, count: int) -> None:
        self.bytes: NDArray[np.uint8] = np.full(count, 0xFF, np.uint8)
        self._read, self._written = np.zeros((2, count), np.uint32)
        self._copied, self._unfenced = np.zeros((2, count), bool)
        # How many products read a byte.
        self._multiplied = np.zeros(count, np.uint32)

    def meet(self) -> None:
        self._read[:] = self._written[:] = 0

    def load(self, at: Array, warp: Array) -> Array:
        """Bytes at [n, size], for warps [n]."""
        self._touch(at, warp, None)
        return self.bytes[at]

    def store(self, at: Array, warp: Array, values: Array) -> None:
        self._touch(at, warp, values)
        self.bytes[at] = values
        self._unfenced[at] = True

    def begin_copy(self, at: Array, warp: Array, values: Array) -> None:
        self._touch(at, warp, values)
        self._copied[at] = True

    def end_copy(self, at: Array, warp: Array, values: Array) -> None:
        self._copied[at] = False
        self.store(at, warp, values)

    def begin_product(self, at: Array, warp: Array) -> None:
        self._touch(at, warp, None)
        if self._unfenced[at].any():
            raise Fault(f"{_first(at, self._unfenced[at])} was written with no fence for products")
        self._multiplied[at] += 1

    def end_product(self, at: Array, warp: Array) -> None:
        self._touch(at, warp, None)
        self._multiplied[at] -= 1

    def fence(self, warp: int) -> None:
        """Show products what a warp sees."""
        self._unfenced &= self._written & ~(np.uint32(1) << np.uint32(warp)) != 0

    def _touch(self, at: Array, warp: Array, written: Array | None) -> None:
        """Bytes at [n, size] by warps [n], what they write before it is written."""
        if self._copied[at].any():
            raise Fault(f"{_first(at, self._copied[at])} has a copy on its way")
        if written is not None and self._multiplied[at].any():
            raise Fault(f"{_first(at, self._multiplied[at] > 0)} is in a product on its way")
        mine = np.broadcast_to((np.uint32(1) << warp.astype(np.uint32))[:, None], at.shape)
        # Several warps may write one value, as they do where they have the same.
        against = self._written[at] if written is None else self._read[at] | self._written[at]
        others = against & ~mine != 0
        if written is not None:
            same = (self._read[at] & ~mine == 0) & (self.bytes[at] == written)
            others &= ~same
        if others.any():
            raise Fault(f"{_first(at, others)} is raced for by two warps")
        np.bitwise_or.at(self._read if written is None else self._written, at, mine)


def _first(at: Array, chosen: Array) -> str:
    return f"byte {int(at[chosen][0])} of shared memory"
