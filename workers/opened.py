"""A run as its tasks see it: the documents read, the model open, and blocks in every form.

    source       the block as it is
    elastic      with the calibrated codes, from the block's blob
    packed       of the packed checkpoint, read back from the store; so are embeddings and head

Elastic and packed blocks may have routers; then one `Precision` holds the threshold of the model.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import (
    Linear,
    RouterShape,
    Shard,
    block_prefix,
    find_linears,
    find_routers,
    plan_shards,
    router_shape,
    routing_shard,
)
from mbq.artifacts.digests import Digest
from mbq.artifacts.documents import (
    BlockRecord,
    Manifest,
    RoutingRecord,
    RunDocument,
    SensitivityRecord,
)
from mbq.artifacts.precision import as_curves
from mbq.artifacts.runs import find_run
from mbq.artifacts.sealed import get_document
from mbq.artifacts.store import WORKING_SECONDS, Store, open_store
from mbq.artifacts.tensors import TensorFile, open_tensors
from mbq.kernels.precision import Curve, Precision
from mbq.kernels.widths import slices_of
from mbq.workers.allocate import log_worth
from mbq.workers.determinism import pin
from mbq.workers.model import Model, open_model
from mbq.workers.pack import (
    BlockRouting,
    elastic_block,
    elastic_tensors,
    read_linear,
    router_buffers,
)
from mbq.workers.sensitivity import importance
from mbq.workers.tensors import read_tensor


@dataclass(frozen=True)
class RunRef:
    """Which run, and where: what every task is given."""

    store_uri: str
    run: str
    device: Literal["cpu", "cuda"]


@dataclass(frozen=True)
class _Packed:
    """Tensors of the packed checkpoint as those of a model (`model.Weights`)."""

    weight_map: Mapping[str, str]
    open: Callable[[str], TensorFile]


class Opened:
    """A run with its documents read; opened once per task."""

    def __init__(self, ref: RunRef) -> None:
        self.store: Store = open_store(ref.store_uri, WORKING_SECONDS)
        self.document: RunDocument = find_run(self.store, ref.run)
        self.spec = self.document.spec
        self.device = torch.device(ref.device)
        pin(self.spec.threads)

    @cached_property
    def model(self) -> Model:
        return open_model(self.document.source, getattr(torch, self.spec.dtype), self.device)

    @cached_property
    def packed_model(self) -> Model:
        """The model with all that is not quantized from the packed checkpoint."""
        stored = self.document.source.weight_map
        files = {e.name: s.file for s in self.shards for e in s.entries if e.name in stored}
        return dataclasses.replace(self.model, weights=_Packed(files, self.packed_file))

    @cached_property
    def linears(self) -> dict[str, Linear]:
        return {linear.name: linear for linear in find_linears(self.document.source.tensors)}

    @cached_property
    def routers(self) -> dict[str, tuple[str, ...]]:
        """The linears that each router of a block serves, by names inside the block."""
        return find_routers(self.linears.values())

    @cached_property
    def shards(self) -> list[Shard]:
        return plan_shards(self.document.source.tensors, self.spec.slices, self.spec.group_size)

    @cached_property
    def sensitivity(self) -> SensitivityRecord:
        return get_document(self.store, keys.sensitivity_key(self.document.run), SensitivityRecord)

    @cached_property
    def manifest(self) -> Manifest:
        return get_document(self.store, keys.manifest_key(self.document.run), Manifest)

    def tokens(self, blob: Digest) -> Tensor:
        return read_tensor(self._open_blob(blob), "tokens")

    def blob(self, block: int) -> TensorFile:
        return self._open_blob(self.record(block).blob)

    def packed_file(self, file: str) -> TensorFile:
        """A file of the published checkpoint; opened once, since every block reads from it."""
        if file not in self._packed_files:
            key = keys.checkpoint_key(self.document.run, file)
            self._packed_files[file] = open_tensors(self.store, key, self.manifest.files[file])
        return self._packed_files[file]

    @cached_property
    def _packed_files(self) -> dict[str, TensorFile]:
        return {}

    def _open_blob(self, blob: Digest) -> TensorFile:
        return open_tensors(self.store, keys.blob_key(blob.sha256), blob)

    def record(self, block: int) -> BlockRecord:
        return get_document(self.store, keys.block_key(self.document.run, block), BlockRecord)

    def curves(self, method: str) -> dict[int, Curve]:
        """The settled thresholds of a method, by the upper of two widths."""
        key = keys.routing_key(self.document.run, method)
        return as_curves(get_document(self.store, key, RoutingRecord).curves)

    def shape(self, method: str) -> RouterShape:
        return router_shape(method, self.spec.routing.width)

    def router_tensors(self, block: int, method: str) -> dict[str, Tensor]:
        """Buffers of a block's routers under a method, by name inside the block."""
        file = self.blob(block)
        tensors: dict[str, Tensor] = {}
        for router, served in self.routers.items():
            worths = self.log_worths(block, served)
            for name, tensor in router_buffers(file, router, method, worths).items():
                tensors[f"{router}.{name}"] = tensor
        return tensors

    def linear(self, block: int, local_name: str) -> Linear:
        return self.linears[block_prefix(block) + local_name]

    def log_worths(self, block: int, served: Sequence[str]) -> list[float]:
        """What turns log benefits of some linears of a block into log earnings."""
        linears = [self.linear(block, name) for name in served]
        found = self.sensitivity.sensitivity
        return [log_worth(found[linear.name], linear.weights) for linear in linears]

    def importance(self, block: int, served: Sequence[str]) -> dict[str, Tensor]:
        """Of the output channels [N] of some linears of a block (`sensitivity.importance`)."""
        found = {n: read_tensor(self._sensitivity_file, self.linear(block, n).name) for n in served}
        return {n: importance(sensitivity_N).to(self.device) for n, sensitivity_N in found.items()}

    @cached_property
    def _sensitivity_file(self) -> TensorFile:
        return self._open_blob(self.sensitivity.blob)

    @cached_property
    def router_weights(self) -> dict[str, tuple[int, ...]]:
        """Weights of the linears that each router of a block serves; blocks are alike."""
        return {
            router: tuple(self.linear(0, name).weights for name in served)
            for router, served in self.routers.items()
        }

    def elastic_block(
        self, block: int, precision: Precision, method: str | None = None
    ) -> nn.Module:
        """A calibrated block, with the routers of a method if one is given."""
        file = self.blob(block)
        tensors: dict[str, Tensor] = {}
        for linear in self.linears.values():
            if linear.block == block:
                name = linear.local_name
                tensors |= elastic_tensors(name, read_linear(file, name), self.device)
        routing = None
        if method is not None:
            tensors |= self.router_tensors(block, method)
            routing = BlockRouting(self.routers, self.spec.max_bits, self.shape(method))
        return elastic_block(self.model, block, tensors, self.spec.group_size, precision, routing)

    def packed_block(
        self, block: int, precision: Precision, method: str | None = None
    ) -> nn.Module:
        """A block from the files of the packed checkpoint that the loaded slices need."""
        shards = [
            s for s in self.shards if s.slice is None or s.slice < slices_of(precision.max_bits)
        ]
        routing = None
        if method is not None:
            shape = self.shape(method)
            routing = BlockRouting(self.routers, self.spec.max_bits, shape)
            shards.append(routing_shard([*self.linears.values()], self.spec.max_bits, shape))
        elastic = list(self.routers) if routing else []
        elastic += [linear.local_name for linear in self.linears.values() if linear.block == block]
        tensors = self._packed_tensors(
            block, shards, {block_prefix(block) + name for name in elastic}
        )
        model, group_size = self.packed_model, self.spec.group_size
        return elastic_block(model, block, tensors, group_size, precision, routing)

    def _packed_tensors(
        self, block: int, shards: list[Shard], modules: set[str]
    ) -> Mapping[str, Tensor]:
        tensors = {}
        for shard in shards:
            if block not in shard.blocks:
                continue
            file = self.packed_file(shard.file)
            for entry in shard.entries:
                module, _, buffer = entry.name.rpartition(".")
                if module in modules and buffer != "bias":
                    name = entry.name.removeprefix(block_prefix(block))
                    tensors[name] = read_tensor(file, entry.name)
        return tensors
