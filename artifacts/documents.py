"""The documents of a run, as pydantic models.

Written in this order, so that whatever exists is true: blobs, then the records that name them,
then the checkpoint's files, and the manifest last. The manifest holds nothing that may differ
between two runs of the same id: no times, attempts, stores or paths. Each is sealed (`sealed.py`).
"""

import reprlib
from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mbq.artifacts import keys
from mbq.artifacts.config import StoredCurve
from mbq.artifacts.digests import Digest
from mbq.artifacts.source import Source
from mbq.artifacts.spec import FORMAT_VERSION, Document, RunSpec
from mbq.artifacts.store import is_name
from mbq.kernels.widths import SLICE_BITS


class RunDocument(Document):
    """A resolved run: the spec, and what its names stood for when it was submitted.

    Attributes:
        model_files: what the files of the source were; None for a commit, which says it all.
    """

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    run: str
    name: str
    spec: RunSpec
    model_location: str
    model_commit: str | None
    model_digest: str
    model_files: dict[str, Digest] | None
    calibration_tokens: Digest
    evaluation_tokens: Digest | None
    sample_tokens: Digest | None
    code_version: str

    @cached_property
    def source(self) -> Source:
        return Source(self.model_location, self.model_commit, self.model_files)


class BlockRecord(Document):
    """A finished block. Attempt and seconds are the run's history, not the block's identity.

    Attributes:
        loss_before, loss_after: mean squared output error by width.
        outlier_overlap: of the tenth of tokens with the largest error at one width, the share
            that is among those of another.
    """

    block: int
    blob: Digest
    hardware: str
    loss_before: dict[int, float]
    loss_after: dict[int, float]
    outlier_overlap: dict[int, dict[int, float]]
    attempt: int
    seconds: float


class ShardRecord(Document):
    """A finished file of the checkpoint, and the blobs it was made from.

    Attributes:
        method: how bits are shared, for the routers' file.
    """

    file: Digest
    blobs: tuple[str, ...]
    method: str | None = None


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
    max_bits: Annotated[int, Field(ge=2, le=8, multiple_of=2)]
    group_size: Annotated[int, Field(ge=32, le=4096)]
    files: dict[str, Digest]
    slice_files: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    hardware: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        # A manifest may come from anywhere, and its names become files and folders.
        foreign = [name for name in self.files if not is_name(name) or name == keys.MANIFEST_FILE]
        foreign += [] if is_name(self.run) else [self.run]
        named = [name for names in self.slice_files for name in names]
        if foreign or not set(named) <= set(self.files) or len(set(named)) < len(named):
            shown = reprlib.repr(foreign or named)
            raise ValueError(f"run and files are not plain names, each in one place: {shown}")
        if len(self.slice_files) * SLICE_BITS != self.max_bits:
            raise ValueError(f"{len(self.slice_files)} slices are not {self.max_bits} bits")
        return self


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


class SensitivityRecord(Document):
    """Sensitivity of every linear by its name in the model (`workers/sensitivity.py`).

    Attributes:
        sensitivity: means over output channels.
        blob: of every channel.
    """

    sensitivity: dict[str, float]
    blob: Digest


class SettledWidth(Document):
    """An average width as it came out on calibration text.

    Attributes:
        divergence: mean divergence (nats) from the full-precision model's next token.
    """

    average_bits: float
    realised_bits: float
    divergence: float


class RoutingRecord(Document):
    """One method of sharing bits, settled.

    Attributes:
        blobs: sha256 of every block's codes, in order.
        sensitivity: sha256 of the sensitivities that bits were shared by.
        router_bits: what it reads beside the codes, per weight.
        curves: of the steps between widths, by the upper one.
    """

    method: str
    blobs: tuple[str, ...]
    sensitivity: str
    router_bits: float
    curves: dict[int, StoredCurve]
    settled: tuple[SettledWidth, ...]


class VariantLosses(Document):
    """Mean negative log likelihood per predicted token (nats) of every sequence, in order.

    Attributes:
        manifest_sha256: of the checkpoint whose codes were evaluated; None for variants of the
            source.
        linear_bits: code bits that each linear read on average, by its name in the model; empty for
            variants that are not elastic.
    """

    variant: str
    manifest_sha256: str | None
    losses: tuple[float, ...]
    linear_bits: dict[str, float]


class TokenBits(Document):
    """Average code bits that each token of the sample text got, by the average asked for."""

    manifest_sha256: str
    ids: tuple[int, ...]
    bits: dict[str, tuple[float, ...]]


class KernelTiming(Document):
    """Median time of one call of a linear, and its interquartile range.

    Attributes:
        bits: width of every token; None for a product with a bf16 weight of that shape.
    """

    bits: int | None
    tokens: int
    seconds: float
    spread_seconds: float


class ValidationRecord(Document):
    """A packed linear that computes what it should.

    Attributes:
        checks: how many products were held against float64.
        largest_error: of an element, over what is usual for its channel (`workers/validate.py`).
        timings: empty where there was no GPU.
    """

    linear: str
    out_features: int
    in_features: int
    manifest_sha256: str
    hardware: str
    checks: int
    largest_error: float
    timings: tuple[KernelTiming, ...]


class Row(Document):
    """One line of the result table.

    Attributes:
        bits: code bits per weight that were asked for; None for full precision.
        realised_bits: those that were read, averaged over tokens and weights.
        total_bits: these with scales, zeros, exponents, gains, biases and routers.
        gap: mean difference of log perplexity to full precision; `gap_error` its paired standard
            error over sequences.
    """

    variant: str
    bits: float | None
    realised_bits: float | None
    total_bits: float | None
    perplexity: float
    perplexity_error: float
    gap: float
    gap_error: float


class Results(Document):
    """What validation measured. Outside the manifest: evaluating differently changes no bytes.

    Attributes:
        method: how the checkpoint shares bits; None if it has one width only.
    """

    run: str
    method: str | None
    tokens_sha256: str
    tokens: int
    sequence_length: int
    rows: tuple[Row, ...]
    slice_bytes: tuple[int, ...]
    base_bytes: int
