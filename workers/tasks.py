"""The tasks of a run: what goes in and out are keys, numbers and hidden states.

Each is a plain, picklable function that opens what it needs, calls one pure function, writes what
came out and returns a small document. All of them may run twice: blobs and files get the same
bytes, records differ at most in times and attempts. The last argument of each is `report`, called
with the finished fraction.

    capture      hidden states that enter a block      -> hidden states
    sensitivity  of the loss to errors of each linear  -> its record, after its blob
    calibrate    one block and its routers             -> its record, after its blob
    pack         one file of the checkpoint            -> its record, after the file is read back
    settle       thresholds of one way to share bits   -> its record
    route        the routers' file of the checkpoint   -> its record, after the file is read back
    evaluate     one variant over one text             -> its losses
    validate     a packed linear of one shape          -> its errors and times
    sample       the sample text at several widths     -> bits of each token
    inspect      what a node is                        -> its version, can it see the store
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import ROUTING_FILE, router_bits, routing_shard
from mbq.artifacts.digests import Digest, Digester, digest_of, read_chunks
from mbq.artifacts.documents import (
    BlockRecord,
    RoutingRecord,
    SensitivityRecord,
    ShardRecord,
    TokenBits,
    ValidationRecord,
    VariantLosses,
)
from mbq.artifacts.errors import CorruptError, MbqError
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.runs import is_stored, put_blob
from mbq.artifacts.sealed import document_sha256, find_document, put_document
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.store import WORKING_SECONDS, open_store, probe
from mbq.kernels.precision import Precision
from mbq.kernels.widths import widths_up_to
from mbq.workers import capture as capturing
from mbq.workers.blocks import variant_blocks
from mbq.workers.calibrate import calibrate_block
from mbq.workers.capture import Hidden
from mbq.workers.determinism import attention, hardware_kind, seed_of
from mbq.workers.evaluate import sequence_losses, token_bits
from mbq.workers.opened import Opened, RunRef
from mbq.workers.pack import encode_block, encode_routing, encode_sensitivity, encode_shard
from mbq.workers.route import first_sequences, fit_routers
from mbq.workers.sensitivity import measure_sensitivity
from mbq.workers.settle import RoutedModel
from mbq.workers.settle import settle as settle_thresholds
from mbq.workers.validate import open_linear, shapes, tensor_files, validate_linear
from mbq.workers.variants import ROUTED, of_source

Report = Callable[[float], None]

# Of the time of a calibrate task; the rest fits routers.
_TRAINING_SHARE = 0.9


@dataclass(frozen=True)
class Host:
    """What a node says of itself; `fault` says why it cannot use the store."""

    code_version: str
    fault: str | None
    # Of a package that does not say: older than any format it could be taken for.
    format_version: int = 0


def capture(ref: RunRef, block: int, before: Hidden | None, report: Report) -> Hidden:
    """Hidden states that enter `block`, given those that enter the block before it."""
    opened = Opened(ref)
    with attention():
        if before is None:
            ids = opened.tokens(opened.document.calibration_tokens)
            hidden = capturing.first_hidden(opened.model, ids, opened.spec.streams)
        else:
            quantized = None
            if opened.spec.streams:
                precision = Precision(opened.spec.max_bits)
                quantized = opened.elastic_block(block - 1, precision), precision
            hidden = capturing.run_block(
                opened.model, block - 1, before, opened.spec.microbatch, quantized
            )
    report(1.0)
    return hidden


def sensitivity(ref: RunRef, report: Report) -> SensitivityRecord:
    """Measure the sensitivity of every linear, by output channel."""
    opened = Opened(ref)
    samples = opened.spec.routing.sensitivity_samples
    ids = opened.tokens(opened.document.calibration_tokens)[:samples]
    with attention():
        found = measure_sensitivity(opened.model, ids, opened.spec.microbatch, report)
    record = SensitivityRecord(
        sensitivity={name: found_N.mean().item() for name, found_N in found.items()},
        blob=put_blob(opened.store, encode_sensitivity(found)),
    )
    put_document(opened.store, keys.sensitivity_key(ref.run), record)
    return record


def calibrate(ref: RunRef, block: int, attempt: int, hidden: Hidden, report: Report) -> BlockRecord:
    """Calibrate one block and fit its routers, unless its record is there already."""
    opened = Opened(ref)
    record_key = keys.block_key(ref.run, block)
    done = find_document(opened.store, record_key, BlockRecord)
    if done is not None and is_stored(opened.store, done.blob):
        return done
    started = time.monotonic()
    spec, model = opened.spec, opened.model
    full, inputs = capturing.place(hidden, model, spec.streams or widths_up_to(spec.max_bits))
    seed = seed_of(spec.calibration.seed, block)
    importance = {}
    if spec.slices > 1:
        # Before anything is trained: what is lost is lost now.
        names = [one.local_name for one in opened.linears.values() if one.block == block]
        importance = opened.importance(block, names)
    with attention():
        calibration = calibrate_block(
            model.runner(block, spec.microbatch),
            inputs,
            full,
            spec.optimisation,
            spec.group_size,
            opened.routers.values(),
            seed,
            lambda fraction: report(_TRAINING_SHARE * fraction),
        )
        routers = {}
        if spec.slices > 1:
            routers = fit_routers(
                model.runner(block, spec.microbatch),
                opened.routers,
                calibration.linears,
                importance,
                first_sequences(full, spec.routing.tokens),
                spec.routing,
                spec.max_bits,
                seed,
            )
    record = BlockRecord(
        block=block,
        blob=put_blob(opened.store, encode_block(calibration.linears, routers)),
        hardware=hardware_kind(opened.device),
        loss_before=calibration.loss_before,
        loss_after=calibration.loss_after,
        outlier_overlap=calibration.outlier_overlap,
        attempt=attempt,
        seconds=time.monotonic() - started,
    )
    put_document(opened.store, record_key, record)
    return record


def pack(ref: RunRef, file: str, report: Report) -> ShardRecord:
    """Write one file of the checkpoint and read it back.

    Raises:
        CorruptError: the store returns other bytes than were written.
    """
    opened = Opened(ref)
    shard = next(shard for shard in opened.shards if shard.file == file)
    blobs = {block: opened.blob(block) for block in shard.blocks}
    chunks = encode_shard(shard, opened.linears, blobs, opened.model)
    return _write_file(opened, file, shard.blocks, chunks, None, report)


def settle(ref: RunRef, method: str, report: Report) -> RoutingRecord:
    """Find the thresholds of one method on calibration text."""
    opened = Opened(ref)
    spec = opened.spec
    precision = Precision(spec.max_bits)
    blocks = range(opened.model.block_count)
    ids = opened.tokens(opened.document.calibration_tokens)
    # The last sequences: routers were fitted on the first ones.
    sequences = max(1, spec.routing.settle_tokens // ids.shape[1])
    routed = RoutedModel(
        opened.model,
        lambda: (opened.elastic_block(b, precision, method) for b in blocks),
        precision,
        opened.router_weights,
    )
    with attention():
        curves, settled = settle_thresholds(routed, ids[-sequences:], spec.microbatch, report)
    record = RoutingRecord(
        method=method,
        blobs=tuple(opened.record(block).blob.sha256 for block in blocks),
        sensitivity=opened.sensitivity.blob.sha256,
        router_bits=router_bits([*opened.linears.values()], spec.max_bits, opened.shape(method)),
        curves=curves,
        settled=settled,
    )
    put_document(opened.store, keys.routing_key(ref.run, method), record)
    return record


def route(ref: RunRef, method: str, report: Report) -> ShardRecord:
    """Write the routers' file of the checkpoint and read it back. Raises CorruptError like pack."""
    opened = Opened(ref)
    shape = opened.shape(method)
    shard = routing_shard([*opened.linears.values()], opened.spec.max_bits, shape)
    chunks = encode_routing(shard, lambda block: opened.router_tensors(block, method))
    return _write_file(opened, ROUTING_FILE, shard.blocks, chunks, method, report)


def evaluate(ref: RunRef, variant: str, text: Digest, report: Report) -> VariantLosses:
    """Losses of one variant over a token file; packed variants are read back from the store."""
    opened = Opened(ref)
    ids = opened.tokens(text)
    with attention():
        made = variant_blocks(opened, variant, ids)
        losses = sequence_losses(made.model, made.blocks, ids, opened.spec.microbatch, report)
    document = VariantLosses(
        variant=variant,
        manifest_sha256=None if of_source(variant) else _manifest(opened),
        losses=tuple(losses),
        linear_bits=made.linear_bits,
    )
    put_document(opened.store, keys.evaluation_key(ref.run, text.sha256, variant), document)
    return document


def validate(ref: RunRef, shape: str, report: Report) -> ValidationRecord:
    """Check and time a linear of the packed checkpoint, read back from the store.

    Raises:
        KernelError: an output is wrong.
    """
    opened = Opened(ref)
    root = f"{ref.store_uri}/{keys.checkpoint_prefix(ref.run)}"
    checkpoint = open_checkpoint(open_store(root, WORKING_SECONDS))
    files = tensor_files(checkpoint, opened.spec.max_bits)
    name = shapes(files)[shape]
    linear = open_linear(files, name, opened.spec.group_size, opened.device)
    record = validate_linear(linear, name, _manifest(opened), report)
    put_document(opened.store, keys.validation_key(ref.run, shape), record)
    report(1.0)
    return record


def sample(ref: RunRef, text: Digest, average_bits: Iterable[float], report: Report) -> TokenBits:
    """Average bits of every token of the sample text in the packed checkpoint."""
    opened = Opened(ref)
    ids = opened.tokens(text)
    bits = {}
    with attention():
        for average in average_bits:
            made = variant_blocks(opened, f"{ROUTED}-{average:g}", ids)
            bits[f"{average:g}"] = tuple(token_bits(made.model, made.blocks, ids))
    document = TokenBits(manifest_sha256=_manifest(opened), ids=tuple(ids[0].tolist()), bits=bits)
    put_document(opened.store, keys.sample_key(ref.run), document)
    report(1.0)
    return document


def inspect(ref: RunRef, probe_key: str, report: Report) -> Host:
    """What this node runs, and whether it can use the store that the driver writes to."""
    fault = None
    try:
        store = open_store(ref.store_uri)
        if store.stat(probe_key) is None:
            fault = "it does not hold what the driver wrote there"
        probe(store)
    except MbqError as error:
        fault = str(error)
    report(1.0)
    return Host(version("mbq-cluster"), fault, FORMAT_VERSION)


def _write_file(
    opened: Opened,
    file: str,
    blocks: tuple[int, ...],
    chunks: Iterable[bytes],
    method: str | None,
    report: Report,
) -> ShardRecord:
    run = opened.document.run
    key = keys.checkpoint_key(run, file)
    digester = Digester()
    opened.store.put(key, digester.through(chunks))
    report(0.5)
    digest = digester.digest()
    if digest_of(read_chunks(opened.store, key)) != digest:
        raise CorruptError(f"{key} reads back differently than it was written; check the store")
    record = ShardRecord(
        file=digest,
        blobs=tuple(opened.record(block).blob.sha256 for block in blocks),
        method=method,
    )
    put_document(opened.store, keys.shard_key(run, file), record)
    report(1.0)
    return record


def _manifest(opened: Opened) -> str:
    return document_sha256(opened.store, keys.manifest_key(opened.document.run))
