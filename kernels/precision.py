"""How many bits the linears of one model use: one width for all tokens, or two and a threshold.

An average between two widths is a mix of these two: routers decide who takes the step from the one
to the other. `Precision` is shared by all elastic linears and routers of a model, so changing the
width of the whole model is one assignment; a `Curve` knows the thresholds of one step.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass

from mbq.kernels.widths import SLICE_BITS, WIDTHS, around, widths_up_to


@dataclass(frozen=True)
class Curve:
    """The threshold for every average between two widths.

    Attributes:
        average_bits: ascending, from the lower width to the upper one.
        log_thresholds: descending, one for each of them; logarithms of nats per bit.
    """

    average_bits: tuple[float, ...]
    log_thresholds: tuple[float, ...]

    def log_threshold(self, average_bits: float) -> float:
        """Threshold that gives an average between the first point and the last, linear between."""
        right = bisect.bisect_left(self.average_bits, average_bits, lo=1)
        x0, x1 = self.average_bits[right - 1 : right + 1]
        y0, y1 = self.log_thresholds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (average_bits - x0) / (x1 - x0)


class Precision:
    """How many bits the linears of one model use; `max_bits` are loaded.

    Attributes:
        bits: the same for every token, or None where the routers decide.
        between: the lowest and the highest width that these may give.
        log_threshold: what a step must earn, as the logarithm of nats per bit.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits
        self.bits: int | None = max_bits
        self.between = SLICE_BITS, max_bits
        self.log_threshold = math.inf

    def set_bits(self, bits: int) -> None:
        """Use `bits` bits per weight for every token from the next forward pass on.

        Raises:
            ValueError: it is no width that is loaded.
        """
        widths = list(widths_up_to(self.max_bits))
        if bits not in widths:
            raise ValueError(f"bits {bits!r} must be one of {widths}, the widths that are loaded")
        self.bits = int(bits)

    def set_average_bits(self, average_bits: float, curves: Mapping[int, Curve]) -> None:
        """Let the routers share `average_bits` bits per weight; at a width all tokens are equal.

        Args:
            curves: of the steps between widths, by the upper one.

        Raises:
            ValueError: the average is not between the widths that are loaded.
        """
        if not SLICE_BITS <= average_bits <= self.max_bits:
            raise ValueError(
                f"average bits {average_bits} must lie between {SLICE_BITS} and {self.max_bits}, "
                "the widths that are loaded"
            )
        low, high = around(average_bits)
        if low < high:
            self.log_threshold = curves[high].log_threshold(average_bits)
            self.between = low, high
        self.bits = low if low == high else None

    def log_thresholds(self) -> tuple[float, ...]:
        """What the step to each extra width must earn: nothing, the threshold, or never enough."""
        low, high = self.between if self.bits is None else (self.bits, self.bits)
        return tuple(
            -math.inf if bits <= low else self.log_threshold if bits <= high else math.inf
            for bits in WIDTHS[1:]
        )
