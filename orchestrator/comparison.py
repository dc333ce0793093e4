"""What a run compares: its model variants, the ways of sharing bits, and what each of them reads.

Pure functions of a spec and of shapes.
"""

from collections.abc import Sequence

from mbq.artifacts.checkpoint import Linear, router_bits, router_shape
from mbq.artifacts.spec import RunSpec
from mbq.kernels.widths import widths_up_to
from mbq.workers.variants import FULL, PACKED, ROUNDED, ROUTED, parse

# Average widths that are evaluated unless the spec names others, and those of all rivals and of
# the sample text.
AVERAGE_BITS = (2.25, 2.5, 2.75, 3.5)
# What `auto` chooses from, the cheapest at run time first.
_CANDIDATES = ("linear", "norm", "token")


def variants(spec: RunSpec) -> list[str]:
    """What the table of a run compares; nothing without an evaluation text."""
    if spec.evaluation is None:
        return []
    widths = widths_up_to(spec.max_bits)
    averages = average_bits(spec)
    # Rounding has whole widths only; a fair row beside each average that is one.
    rounded = sorted({*widths, *(int(bits) for bits in averages if bits == int(bits))})
    return [
        FULL,
        *(f"{ROUNDED}-{bits}" for bits in rounded),
        *(f"{PACKED}-{bits}" for bits in widths),
        *(f"{ROUTED}-{bits:g}" for bits in averages),
        *(f"{rival}-{b:g}" for rival in spec.evaluation.rivals for b in default_averages(spec)),
    ]


def average_bits(spec: RunSpec) -> tuple[float, ...]:
    """Average widths that a run evaluates."""
    if spec.evaluation is None:
        return ()
    if spec.evaluation.average_bits is not None:
        return spec.evaluation.average_bits
    return default_averages(spec)


def default_averages(spec: RunSpec) -> tuple[float, ...]:
    """Average widths that a spec need not name; a single slice has nothing to share."""
    if spec.slices == 1:
        return ()
    return tuple(bits for bits in AVERAGE_BITS if bits <= spec.max_bits)


def candidates(spec: RunSpec) -> tuple[str, ...]:
    """Methods of sharing bits that the checkpoint may get, the cheapest at run time first."""
    if spec.slices == 1:
        return ()
    return _CANDIDATES if spec.routing.method == "auto" else (spec.routing.method,)


def settled_methods(spec: RunSpec) -> tuple[str, ...]:
    """Methods whose thresholds a run needs: the candidates, and what its rivals are made of."""
    learned = spec.routing.learned
    made_of = {
        "linear": "linear",
        "norm": "norm",
        "learned": learned,
        "shuffled": learned,
        "oracle": "linear",
    }
    rivals = spec.evaluation.rivals if spec.evaluation and spec.slices > 1 else ()
    wanted = {*candidates(spec), *(made_of[rival] for rival in rivals if rival in made_of)}
    return tuple(m for m in (*_CANDIDATES, "gates", "target") if m in wanted)


def other_bits(linears: Sequence[Linear], spec: RunSpec, variant: str, method: str | None) -> float:
    """Bits per quantized weight that a variant reads for a token beside its codes.

    Scale and zero are 32 bits a group for every variant; elastic ones add a gain and a bias, 32
    bits an output channel, an exponent, 8 bits an input, and what their routers read.

    Args:
        method: how the packed checkpoint shares bits.
    """
    kind, _ = parse(variant)
    if kind == ROUNDED:
        return 32 / spec.group_size
    weights = sum(linear.weights for linear in linears)
    beside = sum(32 * linear.out_features + 8 * linear.in_features for linear in linears)
    learned = spec.routing.learned
    routers = {ROUTED: method, "norm": "norm", "learned": learned, "shuffled": learned}.get(kind)
    shape = router_shape(routers or "linear", spec.routing.width)
    read = router_bits(linears, spec.max_bits, shape)
    return 32 / spec.group_size + beside / weights + read
