"""The tasks of a run: what goes in and out are keys, numbers and hidden states.

Each is a plain, picklable function that opens what it needs, calls one pure function, writes what
came out and returns a small document. All of them may run twice: the same task writes the same
bytes under the same keys. The last argument of each is `report`, called with the finished fraction.

    capture     hidden states that enter a block       -> hidden states
    calibrate   one block                              -> its record, after its blob
    pack        one file of the checkpoint             -> its record, after the file is read back
    evaluate    one variant over one text              -> its losses
    inspect     what a node is                         -> its version, can it see the store
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Literal

import torch
from torch import Tensor, nn

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import Linear, Shard, find_linears, plan_shards
from mbq.artifacts.errors import CorruptError
from mbq.artifacts.manifest import (
    BlobRef,
    BlockRecord,
    FileRecord,
    RunDocument,
    ShardRecord,
    VariantLosses,
    find_document,
    find_run,
    get_document,
    is_stored,
    put_blob,
    put_document,
)
from mbq.artifacts.store import Store, open_store
from mbq.artifacts.tensors import Digester, TensorFile, digest_of, open_tensors, read_chunks
from mbq.kernels.linear import Precision
from mbq.kernels.quantize import SLICE_BITS
from mbq.workers import capture as capturing
from mbq.workers.calibrate import calibrate_block
from mbq.workers.capture import Hidden
from mbq.workers.determinism import attention, hardware_kind, pin, seed_of
from mbq.workers.evaluate import rounded_block, sequence_losses
from mbq.workers.model import Model, open_model
from mbq.workers.pack import (
    elastic_block,
    elastic_tensors,
    encode_block,
    encode_shard,
    read_linear,
    read_tensor,
)
from mbq.workers.variants import FULL, PACKED

Report = Callable[[float], None]


@dataclass(frozen=True)
class Job:
    """What every task of a run is given."""

    store_uri: str
    run: str
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Host:
    """What a node says of itself."""

    code_version: str
    sees_store: bool


class _Opened:
    """A job with its documents read; opened once per task."""

    def __init__(self, job: Job) -> None:
        self.store: Store = open_store(job.store_uri)
        self.document: RunDocument = find_run(self.store, job.run)
        self.spec = self.document.spec
        self.device = torch.device(job.device)
        pin(self.spec.threads)

    @cached_property
    def model(self) -> Model:
        return open_model(self.document.source, getattr(torch, self.spec.dtype), self.device)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in find_linears(self.document.source.tensors)}

    @cached_property
    def shards(self) -> list[Shard]:
        return plan_shards(self.document.source.tensors, self.spec.slices, self.spec.group_size)

    @property
    def streams(self) -> tuple[int, ...]:
        """Slice counts with hidden states of their own."""
        return self.spec.optimisation.slice_counts if self.spec.propagation == "sequential" else ()

    def tokens(self, blob: BlobRef) -> Tensor:
        return read_tensor(open_tensors(self.store, keys.blob_key(blob.sha256)), "tokens")

    def blob(self, block: int) -> TensorFile:
        return open_tensors(self.store, keys.blob_key(self.record(block).blob.sha256))

    def record(self, block: int) -> BlockRecord:
        return get_document(self.store, keys.block_key(self.document.run, block), BlockRecord)

    def calibrated_block(self, block: int) -> tuple[nn.Module, Precision]:
        """A finished block as it will run."""
        file = self.blob(block)
        tensors: dict[str, Tensor] = {}
        for linear in self.linears.values():
            if linear.block == block:
                name = linear.local_name
                tensors |= elastic_tensors(name, read_linear(file, name))
        precision = Precision(self.spec.slices)
        return elastic_block(self.model, block, tensors, self.spec.group_size, precision), precision


def capture(job: Job, block: int, before: Hidden | None, report: Report) -> Hidden:
    """Hidden states that enter `block`, given those that enter the block before it."""
    opened = _Opened(job)
    with attention():
        if before is None:
            ids = opened.tokens(opened.document.calibration_tokens)
            hidden = capturing.first_hidden(opened.model, ids, opened.streams)
        else:
            quantized = opened.calibrated_block(block - 1) if opened.streams else None
            hidden = capturing.run_block(
                opened.model, block - 1, before, opened.spec.microbatch, quantized
            )
    report(1.0)
    return hidden


def calibrate(job: Job, block: int, attempt: int, hidden: Hidden, report: Report) -> BlockRecord:
    """Calibrate one block, unless its record is there already."""
    opened = _Opened(job)
    key = keys.block_key(job.run, block)
    done = find_document(opened.store, key, BlockRecord)
    if done is not None and is_stored(opened.store, done.blob):
        return done
    started = time.monotonic()
    spec, model = opened.spec, opened.model
    full = capturing.from_array(hidden[capturing.FULL], model.dtype).to(model.device)
    counts = opened.streams or range(1, spec.slices + 1)
    inputs = {
        k: capturing.from_array(hidden[str(k)], model.dtype).to(model.device)
        if str(k) in hidden
        else full
        for k in counts
    }
    with attention():
        calibration = calibrate_block(
            model.block(block),
            lambda module, x: model.run(module, block, x),
            inputs,
            full,
            spec.optimisation,
            spec.group_size,
            spec.microbatch,
            seed_of(spec.calibration.seed, block),
            report,
        )
    record = BlockRecord(
        block=block,
        blob=put_blob(opened.store, encode_block(calibration.linears)),
        hardware=hardware_kind(opened.device),
        loss_before=calibration.loss_before,
        loss_after=calibration.loss_after,
        attempt=attempt,
        seconds=time.monotonic() - started,
    )
    put_document(opened.store, key, record)
    return record


def pack(job: Job, file: str, report: Report) -> ShardRecord:
    """Write one file of the checkpoint and read it back.

    Raises:
        CorruptError: the store returns other bytes than were written.
    """
    opened = _Opened(job)
    shard = next(shard for shard in opened.shards if shard.file == file)
    blobs = {block: opened.blob(block) for block in shard.blocks}
    digester = Digester()
    key = keys.checkpoint_key(job.run, file)
    chunks = encode_shard(shard, opened.linears, blobs, opened.model)
    opened.store.put(key, digester.through(chunks))
    report(0.5)
    digest = digester.digest()
    if digest_of(read_chunks(opened.store, key)) != digest:
        raise CorruptError(f"{key} reads back differently than it was written; check the store")
    record = ShardRecord(
        file=FileRecord.of(digest),
        blobs=tuple(opened.record(block).blob.sha256 for block in shard.blocks),
    )
    put_document(opened.store, keys.shard_key(job.run, file), record)
    report(1.0)
    return record


def evaluate(job: Job, variant: str, text: BlobRef, report: Report) -> VariantLosses:
    """Losses of one variant over a token file; packed variants are read back from the store."""
    opened = _Opened(job)
    with attention():
        losses = sequence_losses(
            opened.model,
            _variant_blocks(opened, variant),
            opened.tokens(text),
            opened.spec.microbatch,
            report,
        )
    manifest = None
    if variant.startswith(PACKED):
        manifest = digest_of(read_chunks(opened.store, keys.manifest_key(job.run))).sha256
    document = VariantLosses(variant=variant, manifest_sha256=manifest, losses=tuple(losses))
    put_document(opened.store, keys.evaluation_key(job.run, text.sha256, variant), document)
    return document


def inspect(job: Job, probe_key: str, report: Report) -> Host:
    """What this node runs, and whether it sees an object that the driver wrote."""
    report(1.0)
    return Host(
        code_version=version("mbq-cluster"),
        sees_store=open_store(job.store_uri).size(probe_key) is not None,
    )


def _variant_blocks(opened: _Opened, variant: str) -> Iterator[nn.Module]:
    kind, _, bits = variant.partition("-")
    for index in range(opened.model.block_count):
        if kind == PACKED:
            yield _packed_block(opened, index, int(bits) // SLICE_BITS)
        elif variant == FULL:
            yield opened.model.block(index)
        else:
            block = opened.model.block(index)
            yield rounded_block(block, int(bits), opened.spec.group_size)


def _packed_block(opened: _Opened, index: int, slices: int) -> nn.Module:
    """A block at a width, from the files of the packed checkpoint that this width needs."""
    tensors: dict[str, Tensor] = {}
    wanted = {linear.name for linear in opened.linears.values() if linear.block == index}
    for shard in opened.shards:
        if index not in shard.blocks or (shard.slice is not None and shard.slice >= slices):
            continue
        file = open_tensors(opened.store, keys.checkpoint_key(opened.document.run, shard.file))
        for entry in shard.entries:
            module, _, buffer = entry.name.rpartition(".")
            if module in wanted and buffer != "bias":
                tensors[f"{opened.linears[module].local_name}.{buffer}"] = read_tensor(
                    file, entry.name
                )
    precision = Precision(slices)
    return elastic_block(opened.model, index, tensors, opened.spec.group_size, precision)
