"""Names of the model variants that a run compares. Imports nothing.

full             the weights as they are
rtn-<bits>       asymmetric round-to-nearest at one static width
mbq-<bits>       the packed checkpoint, every token at that width, read back from the store
routed-<bits>    the packed checkpoint at an average width, shared as the run decided
<rival>-<bits>   the calibrated blocks at an average width, shared otherwise: linear, norm,
                 learned (`route.py`), shuffled, random, oracle (`rivals.py`)
"""

FULL = "full"
ROUNDED = "rtn"
PACKED = "mbq"
ROUTED = "routed"


def of_source(variant: str) -> bool:
    """Whether a variant is made of the source's weights; others change with the checkpoint."""
    return parse(variant)[0] in (FULL, ROUNDED)


def parse(variant: str) -> tuple[str, float | None]:
    """Kind and bits of a variant; `full` has none."""
    kind, _, bits = variant.partition("-")
    return kind, float(bits) if bits else None
