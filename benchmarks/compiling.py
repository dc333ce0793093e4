"""Fill Triton's cache from many processes, so that nothing is compiled while it is timed."""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import click
import torch
from weights import hungry_tokens, multiply, random_digits, tokens_at

from mbq.kernels.triton_prepare import Prepared
from mbq.kernels.triton_tiles import Tile
from mbq.kernels.widths import CODE_BITS

# Any will do: kernels are the same for all shapes.
_INPUTS = 4096


@dataclass(frozen=True)
class Product:
    """A product to be compiled; `bits` None where only the device knows."""

    bits: int | None
    mixed: bool
    tokens: int
    tile: Tile


def compile_products(products: Iterable[Product]) -> None:
    """Compile each of them once; what cannot be compiled is said, and meets whoever times it."""
    workers = max((os.cpu_count() or 2) - 2, 1)
    # Those of any width take several times as long: first, so that none is left over at the end.
    wanted = sorted(set(products), key=lambda p: (p.bits is not None or p.mixed, repr(p)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            faults = [fault for fault in pool.map(_compile, wanted) if fault]
        except BrokenProcessPool as error:
            faults = [f"a compiling process died: {error}"]
    click.echo("\n".join([f"{len(wanted)} kernels, {len(faults)} not compiled", *faults]))


def tokens_of(mixed: bool, m: int, k: int, bits: int) -> Prepared:
    """Random tokens of one width, as the kernel for mixed ones takes them or not.

    A single token cannot be mixed: there are two then.
    """
    return hungry_tokens(max(m, 2), k, bits, 0) if mixed else tokens_at(m, k, bits)


def _compile(product: Product) -> str | None:
    prepared = tokens_of(product.mixed, product.tokens, _INPUTS, product.bits or CODE_BITS)
    try:
        multiply(prepared, product.bits, random_digits(256, _INPUTS), product.tile)
        torch.cuda.synchronize()
    except Exception as error:  # too much shared memory, or whatever the compiler raises
        return f"{product}: {error}"[:200]
    return None
