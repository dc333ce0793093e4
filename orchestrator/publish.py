"""The end of a run: the checkpoint's small files, its manifest, and the table of results."""

import collections

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import (
    INDEX_FILE,
    index_document,
    router_shape,
    routing_shard,
    slice_files,
)
from mbq.artifacts.config import CONFIG_FILE, describe_routing, write_config
from mbq.artifacts.digests import digest_of
from mbq.artifacts.documents import Manifest, Results, VariantLosses
from mbq.artifacts.sealed import document_sha256, put_document
from mbq.artifacts.source import TOKENIZER_FILES
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.orchestrator.comparison import other_bits
from mbq.orchestrator.driver import Driver, adopt_measurements
from mbq.orchestrator.plan import Plan
from mbq.workers.evaluate import table
from mbq.workers.variants import FULL, parse


def publish(driver: Driver) -> None:
    """Write index, config and tokenizer and, last, the manifest."""
    store, document, plan = driver.store, driver.document, driver.plan
    source, spec = document.source, document.spec
    shards, routing = list(plan.shards), None
    if driver.routing is not None:
        method = driver.routing.method
        shape = router_shape(method, spec.routing.width)
        shards.append(routing_shard(plan.linears, spec.max_bits, shape))
        curves = driver.routing.curves
        routing = describe_routing(method, spec.max_bits, shape, plan.linears, curves)
    small = {
        INDEX_FILE: index_document(shards),
        CONFIG_FILE: write_config(
            source.config, spec.max_bits, spec.group_size, plan.linears, routing
        ),
    }
    for name in TOKENIZER_FILES:
        data = source.read(name)
        if data is not None:
            small[name] = data
    files = {name: record.file for name, record in driver.shards.items()}
    for name, data in small.items():
        store.put(keys.checkpoint_key(document.run, name), [data])
        files[name] = digest_of([data])
    blocks = [driver.records[block] for block in range(len(plan.calibrations))]
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        run=document.run,
        model_digest=document.model_digest,
        max_bits=spec.max_bits,
        group_size=spec.group_size,
        files=dict(sorted(files.items())),
        slice_files=slice_files(plan.shards, spec.slices),
        blocks=tuple(record.blob.sha256 for record in blocks),
        hardware=tuple(record.hardware for record in blocks),
    )
    key = keys.manifest_key(document.run)
    put_document(store, key, manifest)
    driver.manifest_sha256 = document_sha256(store, key)
    adopt_measurements(driver)


def write_results(driver: Driver) -> None:
    """Write the table of a run whose evaluations are all done; nothing without any."""
    document, plan = driver.document, driver.plan
    if document.evaluation_tokens is None or document.spec.evaluation is None:
        return
    sizes: dict[int | None, int] = collections.Counter()
    for shard in plan.shards:
        sizes[shard.slice] += driver.shards[shard.file].file.size_bytes
    sizes[None] += sum(driver.shards[t.target].file.size_bytes for t in plan.routes)
    method = driver.routing.method if driver.routing else None
    measured = [driver.losses[task.target] for task in plan.evaluations]
    losses = {found.variant: found.losses for found in measured}
    elastic = [found for found in measured if found.variant != FULL]
    realised = {found.variant: _realised_bits(plan, found) for found in elastic}
    others = {v: other_bits(plan.linears, document.spec, v, method) for v in realised}
    length = document.spec.evaluation.sequence_length
    results = Results(
        run=document.run,
        method=method,
        tokens_sha256=document.evaluation_tokens.sha256,
        tokens=len(next(iter(losses.values()))) * length,
        sequence_length=length,
        rows=tuple(table(losses, realised, others)),
        slice_bytes=tuple(sizes[e] for e in range(document.spec.slices)),
        base_bytes=sizes[None],
    )
    put_document(driver.store, keys.results_key(document.run), results)


def _realised_bits(plan: Plan, measured: VariantLosses) -> float:
    """Code bits per weight that a variant read; a static width reads what it says."""
    if not measured.linear_bits:
        return parse(measured.variant)[1] or 0.0
    weights = {linear.name: linear.weights for linear in plan.linears}
    read = sum(bits * weights[name] for name, bits in measured.linear_bits.items())
    return read / sum(weights.values())
