"""Where everything lies in a store.

runs/<run>/spec.json                            what was asked and what it resolved to
runs/<run>/status.json                          the driver's last word on its progress
runs/<run>/blocks/<00007>/record.json           a finished block; written after its blob
runs/<run>/shards/<file>/record.json            a finished file of the checkpoint
runs/<run>/sensitivity.json                     of the loss to errors; written after its blob
runs/<run>/routing/<method>.json                thresholds of one way to share bits, settled
runs/<run>/evaluations/<tokens>/<variant>.json  losses of one model variant
runs/<run>/validations/<N>x<K>.json             a packed linear of that shape, right and timed
runs/<run>/sample.json                          bits of each token of the sample text
runs/<run>/results.json                         the table of the run
runs/<run>/checkpoint/...                       the packed checkpoint; manifest.json comes last
blobs/sha256/<aa>/<sha256>                      immutable bytes, named by their digest
"""

import re

RUNS = "runs"
BLOBS = "blobs"
MANIFEST_FILE = "manifest.json"
SPEC_FILE = "spec.json"
_NAMES_BLOBS = re.compile(rf"{RUNS}/[^/]+/(spec\.json|sensitivity\.json|blocks/[^/]+/record\.json)")


def spec_key(run: str) -> str:
    return f"{RUNS}/{run}/{SPEC_FILE}"


def status_key(run: str) -> str:
    return f"{RUNS}/{run}/status.json"


def block_key(run: str, block: int) -> str:
    return f"{RUNS}/{run}/blocks/{block:05d}/record.json"


def shard_key(run: str, file: str) -> str:
    return f"{RUNS}/{run}/shards/{file}/record.json"


def sensitivity_key(run: str) -> str:
    return f"{RUNS}/{run}/sensitivity.json"


def routing_key(run: str, method: str) -> str:
    return f"{RUNS}/{run}/routing/{method}.json"


def validations(run: str) -> str:
    return f"{RUNS}/{run}/validations"


def validation_key(run: str, shape: str) -> str:
    return f"{validations(run)}/{shape}.json"


def sample_key(run: str) -> str:
    return f"{RUNS}/{run}/sample.json"


def evaluation_key(run: str, tokens_sha256: str, variant: str) -> str:
    return f"{RUNS}/{run}/evaluations/{tokens_sha256[:16]}/{variant}.json"


def results_key(run: str) -> str:
    return f"{RUNS}/{run}/results.json"


def checkpoint_prefix(run: str) -> str:
    return f"{RUNS}/{run}/checkpoint"


def checkpoint_key(run: str, file: str) -> str:
    return f"{checkpoint_prefix(run)}/{file}"


def manifest_key(run: str) -> str:
    return checkpoint_key(run, MANIFEST_FILE)


def blob_key(sha256: str) -> str:
    return f"{BLOBS}/sha256/{sha256[:2]}/{sha256}"


def names_blobs(key: str) -> bool:
    """Whether the document of that key names blobs that are read by it."""
    return _NAMES_BLOBS.fullmatch(key) is not None
