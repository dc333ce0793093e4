"""What a warp of the emulator began in the background: copies and products, in groups.

A warp commits what it began as a group, and waits for groups, oldest first. Registers of a product
on its way are nobody's, but that products may add to the same sums one after another. Those that
other instructions touched a product may take only past a fence.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

from tests.support.ptx_operations import Array
from tests.support.ptx_text import Fault, Register

T = TypeVar("T")


@dataclass(frozen=True)
class Copy:
    """Attributes:
    at: bytes of shared memory that it writes.
    """

    at: Array
    values: Array


@dataclass(frozen=True)
class Product:
    """Attributes:
    sums, factors: registers.
    at: bytes of shared memory that it reads.
    """

    sums: tuple[Register, ...]
    factors: tuple[Register, ...]
    at: Array

    @cached_property
    def registers(self) -> frozenset[str]:
        return frozenset(one.name for one in self.sums + self.factors)

    def follows(self, other: "Product") -> bool:
        """Whether it may begin while another is on its way."""
        if set(self.sums) & set(other.factors) or set(self.factors) & set(other.sums):
            return False
        return self.sums == other.sums or not set(self.sums) & set(other.sums)


class Groups(Generic[T]):
    """Oldest first; the last is not committed yet."""

    def __init__(self) -> None:
        self._groups: list[list[T]] = [[]]

    def __iter__(self) -> Iterator[T]:
        return (one for group in self._groups for one in group)

    def add(self, one: T) -> None:
        self._groups[-1].append(one)

    def commit(self) -> None:
        self._groups.append([])

    def wait(self, left: int) -> list[T]:
        """What is done where so many committed groups are left, or fewer."""
        done = max(len(self._groups) - 1 - left, 0)
        finished = [one for group in self._groups[:done] for one in group]
        del self._groups[:done]
        return finished


class Background:
    """Of one warp."""

    def __init__(self) -> None:
        self.copies: Groups[Copy] = Groups()
        self.products: Groups[Product] = Groups()
        self._touched: set[str] = set()

    def touch(self, registers: frozenset[str]) -> None:
        """By what is no product."""
        for product in self.products:
            if taken := registers & product.registers:
                raise Fault(f"{min(taken)} is in a product on its way")
        self._touched |= registers

    def fence(self) -> None:
        self._touched.clear()

    def multiply(self, product: Product) -> None:
        if touched := self._touched & product.registers:
            raise Fault(f"{min(touched)} was touched with no fence before a product")
        if not all(product.follows(other) for other in self.products):
            raise Fault("a product takes registers of another on its way")
        self.products.add(product)
