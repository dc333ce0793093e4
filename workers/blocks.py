"""The blocks of a variant, made one at a time, and the bits that their linears read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import block_prefix
from mbq.artifacts.config import CONFIG_FILE, read_config
from mbq.artifacts.digests import CheckedObject
from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.precision import as_curves
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Curve, Precision
from mbq.kernels.router import Router
from mbq.kernels.shared_input import share_input
from mbq.kernels.widths import SLICE_BITS, around, slices_of
from mbq.workers.allocate import thresholds
from mbq.workers.determinism import seed_of
from mbq.workers.evaluate import rounded_block
from mbq.workers.model import Model
from mbq.workers.opened import Opened
from mbq.workers.rivals import OracleRouter, RandomRouter, ShuffledRouter
from mbq.workers.settle import RoutedModel, Setting, run_settings
from mbq.workers.variants import FULL, PACKED, ROUNDED, ROUTED, parse

# The oracle has no settled thresholds: it finds one on this many sequences of the text itself.
_ORACLE_SEQUENCES = 16


@dataclass(frozen=True)
class VariantBlocks:
    """Blocks in order, each to be used once.

    Attributes:
        model: whose embeddings and head belong to them.
        linear_bits: filled while they are used: code bits that each elastic linear read on average,
            by its name in the model.
    """

    model: Model
    blocks: Iterator[nn.Module]
    linear_bits: dict[str, float] = field(default_factory=dict)


def variant_blocks(opened: Opened, variant: str, ids_BT: Tensor) -> VariantBlocks:
    """The blocks of a variant.

    Args:
        ids_BT: the text it will run on; only the oracle looks at it.
    """
    kind, bits = parse(variant)
    if kind == FULL:
        return _counted(opened.model, opened.model.block)
    assert bits is not None
    if kind == ROUNDED:
        group_size = opened.spec.group_size
        return _counted(
            opened.model, lambda b: rounded_block(opened.model.block(b), int(bits), group_size)
        )
    if kind == PACKED:
        uniform = Precision(SLICE_BITS * slices_of(int(bits)))
        uniform.set_bits(int(bits))
        return _counted(opened.packed_model, lambda b: opened.packed_block(b, uniform))
    precision = Precision(opened.spec.max_bits)
    if kind == ROUTED:
        method, curves = _stored_routing(opened)
        precision.set_average_bits(bits, curves)
        return _counted(opened.packed_model, lambda b: opened.packed_block(b, precision, method))
    return _counted(opened.model, _rival(opened, kind, bits, precision, ids_BT))


def _rival(
    opened: Opened, kind: str, bits: float, precision: Precision, ids_BT: Tensor
) -> Callable[[int], nn.Module]:
    learned = opened.spec.routing.learned
    method = learned if kind in ("learned", "shuffled") else kind
    if kind in ("linear", "norm", "learned", "shuffled"):
        precision.set_average_bits(bits, opened.curves(method))
    if kind == "shuffled":
        return lambda b: _shuffled_block(opened, b, precision, method)
    if kind == "random":
        precision.bits = None
        return lambda b: _random_block(opened, b, precision, bits)
    if kind == "oracle":
        precision.set_average_bits(bits, opened.curves("linear"))
        if precision.bits is None:
            precision.log_threshold = _oracle_threshold(opened, precision, bits, ids_BT)
        return lambda b: _oracle_block(opened, b, precision)
    return lambda b: opened.elastic_block(b, precision, method)


def _counted(model: Model, make: Callable[[int], nn.Module]) -> VariantBlocks:
    linear_bits: dict[str, float] = {}

    def blocks() -> Iterator[nn.Module]:
        for index in range(model.block_count):
            block = make(index)
            yield block
            names = {module: name for name, module in block.named_modules()}
            for linear in elastic_linears(block):
                tokens, bits_read = linear.tally
                linear_bits[block_prefix(index) + names[linear]] = bits_read / tokens

    return VariantBlocks(model, blocks(), linear_bits)


def _stored_routing(opened: Opened) -> tuple[str, dict[int, Curve]]:
    """Method and thresholds as the packed checkpoint's config.json has them."""
    key = keys.checkpoint_key(opened.document.run, CONFIG_FILE)
    stored = CheckedObject(opened.store, key, opened.manifest.files[CONFIG_FILE])
    quantization = read_config(stored.read())
    assert quantization is not None and quantization.routing is not None
    return quantization.routing.method, as_curves(quantization.routing.curves)


def _shuffled_block(opened: Opened, index: int, precision: Precision, method: str) -> nn.Module:
    block = opened.elastic_block(index, precision, method)
    generator = _generator(opened, index)
    for name, router in _routers(block).items():
        _replace(opened, block, name, ShuffledRouter(router, generator))
    return block


def _random_block(opened: Opened, index: int, precision: Precision, bits: float) -> nn.Module:
    block = opened.elastic_block(index, precision)
    generator = _generator(opened, index)
    for name in opened.routers:
        _replace(opened, block, name, RandomRouter(bits, generator))
    return block


def _oracle_block(opened: Opened, index: int, precision: Precision) -> nn.Module:
    block = opened.elastic_block(index, precision)
    source = opened.model.block(index)
    for name, served in opened.routers.items():
        worths = opened.log_worths(index, served)
        by_name = {n: m for n, m in block.named_modules() if isinstance(m, ElasticLinear)}
        weights = [source.get_parameter(f"{n}.weight") for n in served]
        oracle = OracleRouter(
            [by_name[n] for n in served],
            weights,
            [*opened.importance(index, served).values()],
            worths,
            precision,
        )
        _replace(opened, block, name, oracle)
    return block


def _oracle_threshold(opened: Opened, precision: Precision, bits: float, ids_BT: Tensor) -> float:
    blocks = range(opened.model.block_count)
    routed = RoutedModel(
        opened.model,
        lambda: (_oracle_block(opened, b, precision) for b in blocks),
        precision,
        opened.router_weights,
    )
    earned, _ = run_settings(
        routed,
        ids_BT[:_ORACLE_SEQUENCES],
        opened.spec.microbatch,
        [Setting(bits, precision.log_threshold)],
    )
    return thresholds(earned[0], [bits], around(bits)[1])[0]


def _routers(block: nn.Module) -> dict[str, Router]:
    return {name: m for name, m in block.named_modules() if isinstance(m, Router)}


def _replace(opened: Opened, block: nn.Module, name: str, rival: nn.Module) -> None:
    """Put a rival where a router is, or would be."""
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, rival)
    by_name = {n: m for n, m in block.named_modules() if isinstance(m, ElasticLinear)}
    share_input([by_name[served] for served in opened.routers[name]], rival)


def _generator(opened: Opened, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(opened.spec.calibration.seed, index))
