"""The documents of a run, as pydantic models: what they hold and how they are read and written.

Written in this order, so that whatever exists is true: blobs, then the records that name them,
then the checkpoint's files, and the manifest last. The manifest holds nothing that may differ
between two runs of the same id: no times, attempts, stores or paths.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal, TypeVar

from pydantic import ValidationError

from mbq.artifacts import keys
from mbq.artifacts.errors import CorruptError, NotFoundError
from mbq.artifacts.source import Source
from mbq.artifacts.spec import FORMAT_VERSION, Document, RunSpec, explain
from mbq.artifacts.store import Store
from mbq.artifacts.tensors import Digest, Digester

DocumentT = TypeVar("DocumentT", bound=Document)


class BlobRef(Document):
    """Bytes in the store by their content."""

    sha256: str
    size_bytes: int


class RunDocument(Document):
    """A resolved run: the spec, and what its names stood for when it was submitted."""

    format_version: int = FORMAT_VERSION
    run: str
    name: str
    spec: RunSpec
    model_location: str
    model_commit: str | None
    model_digest: str
    calibration_tokens: BlobRef
    evaluation_tokens: BlobRef | None
    code_version: str

    @cached_property
    def source(self) -> Source:
        return Source(self.model_location, self.model_commit)


class BlockRecord(Document):
    """A finished block. Attempt and seconds are the run's history, not the block's identity."""

    block: int
    blob: BlobRef
    hardware: str
    loss_before: dict[int, float]
    loss_after: dict[int, float]
    attempt: int
    seconds: float


class FileRecord(Document):
    """A file of the checkpoint."""

    size_bytes: int
    sha256: str
    part_sha256: tuple[str, ...]

    @classmethod
    def of(cls, digest: Digest) -> "FileRecord":
        return cls(
            size_bytes=digest.size_bytes, sha256=digest.sha256, part_sha256=digest.part_sha256
        )


class ShardRecord(Document):
    """A finished file of the checkpoint, and the blobs it was made from."""

    file: FileRecord
    blobs: tuple[str, ...]


class Manifest(Document):
    """Everything a checkpoint consists of; it exists only when all of it does.

    Attributes:
        slice_files: per slice, most significant first, the files that hold it; what no slice
            names is needed at every width.
        blocks: sha256 of every block's codes, in order.
        hardware: the kind of machine that calibrated each block.
    """

    format_version: int
    run: str
    model_digest: str
    max_bits: int
    group_size: int
    files: dict[str, FileRecord]
    slice_files: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    hardware: tuple[str, ...]


class Failure(Document):
    task: str
    attempt: int
    error: str
    final: bool


class Running(Document):
    task: str
    fraction: float


class Status(Document):
    """What the driver last said. Times are seconds since the epoch."""

    run: str
    attempt: int
    state: Literal["running", "stopped", "failed", "done"]
    blocks_done: int
    blocks_total: int
    fraction: float
    seconds_left: float | None
    running: tuple[Running, ...]
    failures: tuple[Failure, ...]
    started_at: float
    updated_at: float


class VariantLosses(Document):
    """Mean negative log likelihood per predicted token (nats) of every sequence, in order.

    Attributes:
        manifest_sha256: of the checkpoint that was evaluated; None for variants of the source.
    """

    variant: str
    manifest_sha256: str | None
    losses: tuple[float, ...]


class Row(Document):
    """One line of the result table.

    Attributes:
        bits: code bits per weight; None for full precision.
        total_bits: with scales, zeros, gains and biases, per quantized weight.
        gap: mean difference of log perplexity to full precision; `gap_error` its paired standard
            error over sequences.
    """

    variant: str
    bits: int | None
    total_bits: float | None
    perplexity: float
    perplexity_error: float
    gap: float
    gap_error: float


class Results(Document):
    """What validation measured. Outside the manifest: evaluating differently changes no bytes."""

    run: str
    tokens_sha256: str
    tokens: int
    sequence_length: int
    rows: tuple[Row, ...]
    slice_bytes: tuple[int, ...]
    base_bytes: int


def put_document(store: Store, key: str, document: Document) -> None:
    store.put(key, [document.model_dump_json(indent=1).encode() + b"\n"])


def get_document(store: Store, key: str, kind: type[DocumentT]) -> DocumentT:
    """Read and validate a document.

    Raises:
        NotFoundError: there is none.
        CorruptError: it is not a document of that kind.
    """
    data = store.read(key)
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise CorruptError(f"{key} is not a valid {kind.__name__}: {explain(error)}") from error


def find_document(store: Store, key: str, kind: type[DocumentT]) -> DocumentT | None:
    try:
        return get_document(store, key, kind)
    except NotFoundError:
        return None


def put_blob(store: Store, chunks: Iterable[bytes]) -> BlobRef:
    """Store bytes under their digest; bytes that are already there are not written again."""
    digester = Digester()
    data = list(digester.through(chunks))
    digest = digester.digest()
    blob = BlobRef(sha256=digest.sha256, size_bytes=digest.size_bytes)
    if not is_stored(store, blob):
        store.put(keys.blob_key(blob.sha256), data)
    return blob


def find_run(store: Store, run: str) -> RunDocument:
    """Raises NotFoundError or CorruptError; refuses a run of another format."""
    document = get_document(store, keys.spec_key(run), RunDocument)
    if document.format_version != FORMAT_VERSION:
        raise CorruptError(
            f"run {run} has format {document.format_version}, this program reads "
            f"{FORMAT_VERSION}; use the version that wrote it ({document.code_version})"
        )
    return document


def block_records(store: Store, run: str, blocks: int) -> dict[int, BlockRecord]:
    """Records of the finished blocks whose blob is there in full."""
    found = {}
    for block in range(blocks):
        record = find_document(store, keys.block_key(run, block), BlockRecord)
        if record is not None and is_stored(store, record.blob):
            found[block] = record
    return found


def is_stored(store: Store, blob: BlobRef) -> bool:
    """Whether a blob is there in full."""
    return store.size(keys.blob_key(blob.sha256)) == blob.size_bytes
