"""In which order the widths of a block are trained: stages, each with bits that it keeps.

Low widths weigh more in the loss than high ones, because high ones can be mended afterwards at no
cost to them. After all widths together, for every further trained width, the bits of the width
before it and all ranges are kept, the bits below are chosen anew, compensating for what the kept
ones cost (`gptq.py`), and that width is trained together with the next one, or alone if it is the
last. The bits below the last trained width are only chosen.

Whenever bits are chosen, biases of those widths are set to what they lose of the mean input, and
those of other widths at the end: where inputs have a large constant part, training alone does not
get that far.

Method `joint` is that. Method `clip` is MoBiQuant's recipe (arXiv 2602.20191, algorithm 1): weights
frozen, no gains, ranges trained first for 2 bits alone, then for all widths together.
"""

from dataclasses import dataclass

from mbq.artifacts.spec import Optimisation
from mbq.kernels.widths import CODE_BITS, SLICE_BITS, WIDTHS


@dataclass(frozen=True)
class Stage:
    """A part of training.

    Attributes:
        kept_bits: bits that do not change any more, and with them the ranges; 0 for none.
        chosen: widths for which the bits below those are chosen anew before training.
        corrected: widths whose biases then are set to what they lose of the mean input.
        trained: widths drawn.
        passes: over the sequences.
    """

    kept_bits: int
    chosen: tuple[int, ...]
    corrected: tuple[int, ...]
    trained: tuple[int, ...]
    passes: int


def stages_of(settings: Optimisation) -> list[Stage]:
    """The stages of a method, in order."""
    widths, passes = tuple(sorted(settings.widths)), settings.passes
    if settings.method == "clip":
        first = passes // 2
        return [Stage(0, (), (), (SLICE_BITS,), first), Stage(0, (), (), widths, passes - first)]
    # All bits need no refining: the last ones are chosen, not trained.
    low = tuple(bits for bits in widths if bits < CODE_BITS) or widths
    refined = [
        Stage(low[i - 1], low[i:], low[i:], low[i : i + 2], passes) for i in range(1, len(low))
    ]
    above = tuple(bits for bits in WIDTHS if bits > low[-1])
    untrained = tuple(bits for bits in WIDTHS if bits not in low)
    return [Stage(0, low, low, widths, passes), *refined, Stage(low[-1], above, untrained, (), 0)]
