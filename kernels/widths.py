"""The widths at which an 8-bit code can be read: its slices, and half of the second one.

A code is stored as four nested 2-bit slices. From 2 to 4 bits a model gains most of what it can
gain, so there the first bit of the second slice can be read alone. Imports nothing of ours.
"""

from itertools import pairwise

SLICE_BITS = 2
MAX_SLICES = 4
CODE_BITS = SLICE_BITS * MAX_SLICES
# Of a stored word of a plane: one for each of as many inputs.
WORD_BITS = 32
WIDTHS = (2, 3, 4, 6, 8)


def widths_up_to(max_bits: int) -> tuple[int, ...]:
    """The widths at which a code of `max_bits` bits can be read, ascending."""
    return tuple(bits for bits in WIDTHS if bits <= max_bits)


def around(average_bits: float) -> tuple[int, int]:
    """The widths next to an average from 2 to 8: at or below it, and at or above it."""
    below = max(bits for bits in WIDTHS if bits <= average_bits)
    above = min(bits for bits in WIDTHS if bits >= average_bits)
    return below, above


def slices_of(bits: int) -> int:
    """How many slices a width needs."""
    return -(-bits // SLICE_BITS)


def steps_up_to(max_bits: int) -> tuple[int, ...]:
    """What each of those widths but the lowest adds to the one before it, in bits."""
    return tuple(high - low for low, high in pairwise(widths_up_to(max_bits)))
