"""Check and time the linears of a packed checkpoint on this machine."""

from collections.abc import Callable

from mbq.artifacts.documents import ValidationRecord
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.sealed import document_sha256
from mbq.orchestrator.checkpoints import find_checkpoint


def bench(target: str, store_uri: str, say: Callable[[str], None]) -> list[ValidationRecord]:
    """One record for every shape of linear; only those linears are read.

    Args:
        target: a folder with a packed checkpoint, whole or cut, its URI, or a run.

    Raises:
        NotFoundError: there is no such checkpoint, or a file of it is missing.
        CorruptError: a file is not what the manifest says.
        KernelError: an output is wrong.
    """
    store = find_checkpoint(target, store_uri)
    checkpoint = open_checkpoint(store)
    import torch

    from mbq.workers.validate import open_linear, shapes, tensor_files, validate_linear

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _, max_bits = checkpoint.config()
    files = tensor_files(checkpoint, max_bits)
    sha256 = document_sha256(store, MANIFEST_FILE)
    records = []
    for shape, name in shapes(files).items():
        linear = open_linear(files, name, checkpoint.manifest.group_size, device)
        records.append(validate_linear(linear, name, sha256, lambda _: None))
        say(f"{shape}: {records[-1].checks} products are right")
    return records
