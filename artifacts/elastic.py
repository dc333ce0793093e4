"""Elastic linears and routers in the place of a model's own linears, still without values."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mbq.artifacts.checkpoint import RouterShape
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.router import Router
from mbq.kernels.shared_input import share_input


def replace_linears(
    model: nn.Module, endings: list[str], group_size: int, precision: Precision
) -> list[str]:
    """Put elastic linears, still without codes, where a linear's name ends in one of `endings`.

    Returns the names of the linears that were replaced.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        with torch.device(old.weight.device):
            new = ElasticLinear(old.in_features, old.out_features, group_size, precision, old.bias)
        model.set_submodule(name, new)
    return names


def add_routers(
    model: nn.Module,
    linears: Sequence[str],
    routers: Mapping[str, Sequence[str]],
    max_bits: int,
    shape: RouterShape,
    precision: Precision,
) -> list[str]:
    """Give every elastic linear a router, still without values.

    Args:
        linears: names of the elastic linears.
        routers: the linears that each router of a block serves, by names inside the block.
        max_bits: what the routers know; the linears may hold fewer.

    Returns the names of the routers.
    """
    names = []
    for router_name, served in routers.items():
        for leader in linears:
            if leader != served[0] and not leader.endswith(f".{served[0]}"):
                continue
            prefix = leader.removesuffix(served[0])
            group = [_elastic(model, prefix + name) for name in served]
            first = group[0]
            with torch.device(first.get_buffer("scale_zero").device):
                router = Router(
                    first.in_features, len(group), max_bits, shape.width, shape.knots, precision
                )
            parent, _, child = (prefix + router_name).rpartition(".")
            model.get_submodule(parent).add_module(child, router)
            share_input(group, router)
            names.append(prefix + router_name)
    return names


def elastic_linears(model: nn.Module) -> list[ElasticLinear]:
    """The elastic linears of a model or block, in order."""
    return [module for module in model.modules() if isinstance(module, ElasticLinear)]


def _elastic(model: nn.Module, name: str) -> ElasticLinear:
    linear = model.get_submodule(name)
    assert isinstance(linear, ElasticLinear)
    return linear
