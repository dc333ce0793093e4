"""Names of the model variants that a run compares. Imports nothing.

full          the weights as they are
rtn-<bits>    asymmetric round-to-nearest at one static width
mbq-<bits>    the packed checkpoint at that width, read back from the store
"""

FULL = "full"
ROUNDED = "rtn"
PACKED = "mbq"
