"""How many bits the linears of one model use: one width for all tokens, or a threshold for routers.

`Precision` is shared by all elastic linears and routers of a model, so changing the width of the
whole model is one assignment; `Curve` knows the threshold of every average width.
"""

import bisect
import math
from dataclasses import dataclass

from mbq.kernels.widths import SLICE_BITS, widths_up_to


@dataclass(frozen=True)
class Curve:
    """The threshold for every average width under one ceiling.

    Attributes:
        average_bits: ascending, from the lowest width to the ceiling.
        log_thresholds: descending, one for each of them; logarithms of nats per bit.
    """

    average_bits: tuple[float, ...]
    log_thresholds: tuple[float, ...]

    def log_threshold(self, average_bits: float) -> float:
        """Threshold that gives an average width, linear between the points.

        Raises:
            ValueError: the width is not between the lowest one and the ceiling.
        """
        low, high = self.average_bits[0], self.average_bits[-1]
        if not low <= average_bits <= high:
            raise ValueError(
                f"average bits {average_bits} must lie between {low:g} and {high:g}, the widths "
                "that are loaded"
            )
        if low == high:
            return self.log_thresholds[0]
        right = bisect.bisect_left(self.average_bits, average_bits, lo=1)
        x0, x1 = self.average_bits[right - 1 : right + 1]
        y0, y1 = self.log_thresholds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (average_bits - x0) / (x1 - x0)


class Precision:
    """How many bits the linears of one model use; `max_bits` are loaded.

    Attributes:
        bits: the same for every token, or None where the routers decide.
        log_threshold: what a step must earn, as the logarithm of nats per bit.
    """

    def __init__(self, max_bits: int) -> None:
        self.max_bits = max_bits
        self.bits: int | None = max_bits
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

    def set_average_bits(self, average_bits: float, curve: Curve) -> None:
        """Let the routers share `average_bits` bits per weight; at both ends all tokens are equal.

        Raises:
            ValueError: the curve does not reach that width.
        """
        self.log_threshold = curve.log_threshold(average_bits)
        ends = (SLICE_BITS, self.max_bits)
        self.bits = int(average_bits) if average_bits in ends else None
