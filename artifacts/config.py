"""`config.json` of a packed checkpoint: the source's, with `quantization_config`.

`quantization_config` says how many bits are there, which linears are elastic, and how routers
share bits. Nothing that is read is believed unseen. A config that is cut to fewer bits differs in
`max_bits` only, so the original can be made from it.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from mbq.artifacts.checkpoint import PACKING, QUANT_METHOD, Linear, RouterShape, find_routers
from mbq.artifacts.errors import CorruptError, NotFoundError
from mbq.artifacts.spec import FORMAT_VERSION, Document, explain
from mbq.artifacts.store import LocalStore
from mbq.kernels.widths import SLICE_BITS, widths_up_to

CONFIG_FILE = "config.json"
# The largest known has some hundred kilobytes.
MAX_CONFIG_BYTES = 4 * 1024 * 1024

_MaxBits = Annotated[int, Field(strict=True, ge=2, le=8, multiple_of=2)]
_Names = Annotated[list[str], Field(min_length=1)]


class StoredCurve(Document):
    """Thresholds between two widths: average widths ascending, log thresholds descending."""

    average_bits: Annotated[tuple[float, ...], Field(min_length=1)]
    log_thresholds: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        bits, thresholds = self.average_bits, self.log_thresholds
        if len(bits) != len(thresholds):
            raise ValueError(f"{len(bits)} widths have {len(thresholds)} thresholds")
        if sorted(set(bits)) != list(bits) or sorted(thresholds, reverse=True) != list(thresholds):
            raise ValueError("widths must ascend and thresholds descend")
        return self


class StoredRouting(Document):
    """How bits are shared.

    Attributes:
        max_bits: those that the routers are made for, however many are there.
        width: rows of a router's trunk; None without scores.
        knots: points of a router's map from score to earnings.
        routers: the linears that each router of a block serves, by names inside the block.
        curves: of the steps between widths, by the upper one.
    """

    method: str
    max_bits: _MaxBits
    width: Annotated[int, Field(strict=True, ge=0, le=1024)] | None
    knots: Annotated[int, Field(strict=True, ge=1, le=4096)]
    routers: Annotated[dict[str, _Names], Field(min_length=1)]
    curves: dict[int, StoredCurve]

    @model_validator(mode="after")
    def _check(self) -> Self:
        steps = [*pairwise(widths_up_to(self.max_bits))]
        if sorted(self.curves) != [high for _, high in steps]:
            raise ValueError(f"curves lead to {sorted(self.curves)}, widths go to {self.max_bits}")
        for low, high in steps:
            bits = self.curves[high].average_bits
            if (bits[0], bits[-1]) != (low, high):
                raise ValueError(f"the curve to {high} goes from {bits[0]:g} to {bits[-1]:g}")
        return self


class Quantization(Document):
    """`quantization_config`; linears by names inside a block, without routing only 2 bits."""

    quant_method: str = QUANT_METHOD
    format_version: int = FORMAT_VERSION
    max_bits: _MaxBits
    group_size: Annotated[int, Field(strict=True, ge=32, le=4096, multiple_of=32)]
    packing: str = PACKING
    linears: _Names
    routing: StoredRouting | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        routed = self.routing.max_bits if self.routing else SLICE_BITS
        if routed < self.max_bits:
            raise ValueError(f"of {self.max_bits} bits {routed} have routing")
        return self


def describe_routing(
    method: str,
    max_bits: int,
    shape: RouterShape,
    linears: Sequence[Linear],
    curves: Mapping[int, StoredCurve],
) -> StoredRouting:
    """How the linears of a model share bits, by the curves of all steps."""
    return StoredRouting(
        method=method,
        max_bits=max_bits,
        width=shape.width,
        knots=shape.knots,
        routers={name: list(served) for name, served in find_routers(linears).items()},
        curves=dict(curves),
    )


def write_config(
    source: Mapping[str, Any],
    max_bits: int,
    group_size: int,
    linears: Sequence[Linear],
    routing: StoredRouting | None,
) -> bytes:
    """The config.json of a packed checkpoint, from that of its source."""
    quantization = Quantization(
        max_bits=max_bits,
        group_size=group_size,
        linears=sorted({linear.local_name for linear in linears}),
        routing=routing,
    )
    document = {**source, "quantization_config": quantization.model_dump(mode="json")}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def read_config(config: bytes) -> Quantization | None:
    """`quantization_config` of a config.json; None if it is not of our method.

    Raises:
        CorruptError: it is no config.json, of another format, or nonsense.
    """
    stored = _stored(config)
    return None if stored is None else check_quantization(stored)


def check_quantization(stored: Mapping[str, Any]) -> Quantization:
    """Read a parsed `quantization_config`.

    Raises:
        CorruptError: it is of another format, or nonsense.
    """
    found = stored.get("format_version"), stored.get("packing")
    if found != (FORMAT_VERSION, PACKING):
        raise CorruptError(
            f"the checkpoint has format {found[0]!s:.50} with packing {found[1]!s:.50}, this "
            f"program reads {FORMAT_VERSION} with {PACKING}; install the version that wrote it"
        )
    try:
        return Quantization.model_validate(stored)
    except ValidationError as error:
        raise CorruptError(f"config.json: {explain(error)}; fetch it again") from error


def folder_quantization(folder: Path) -> Quantization:
    """Read `quantization_config` of the packed checkpoint in a folder here.

    Raises:
        NotFoundError: the folder holds no packed checkpoint.
        CorruptError: its config.json is of another format, or nonsense.
        StoreError: it cannot be read.
    """
    try:
        config = LocalStore(folder).read(CONFIG_FILE, 0, MAX_CONFIG_BYTES + 1)
    except NotFoundError as error:
        raise NotFoundError(
            f"{folder} holds no {CONFIG_FILE}; give the folder of a packed checkpoint"
        ) from error
    stored = read_config(config)
    if stored is None:
        raise NotFoundError(f"{folder} is not a checkpoint packed by mbq-cluster")
    return stored


def config_bits(config: bytes) -> int:
    """The bits that a packed checkpoint's config.json says are there. Raises CorruptError."""
    bits = _quantized(config).get("max_bits")
    if type(bits) is not int:
        raise CorruptError(f"config.json says max_bits {bits!r:.50}, not a number; fetch it again")
    return bits


def cut_config(config: bytes, max_bits: int) -> bytes:
    """The config.json of the same checkpoint with fewer slices, or again with all of them.

    Raises:
        CorruptError: it is not one of a packed checkpoint.
    """
    quantized = _quantized(config) | {"max_bits": max_bits}
    document = _parse(config) | {"quantization_config": quantized}
    pieces: list[str] = []
    room = 2 * len(config) + 4096
    # Indenting what is nested a thousand deep would fill the memory.
    for piece in json.JSONEncoder(indent=2, sort_keys=True).iterencode(document):
        pieces.append(piece)
        room -= len(piece)
        if room < 0:
            raise CorruptError("config.json is not as a checkpoint's is written; fetch it again")
    return "".join(pieces).encode() + b"\n"


def _parse(config: bytes) -> dict[str, Any]:
    if len(config) > MAX_CONFIG_BYTES:
        raise CorruptError(f"config.json has {len(config):,} bytes; no config has")
    try:
        document = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"config.json is not JSON ({error!s:.200}); fetch it again") from error
    if not isinstance(document, dict):
        raise CorruptError("config.json holds no JSON object; fetch it again")
    return document


def _stored(config: bytes) -> dict[str, Any] | None:
    """`quantization_config`, unchecked; None if it is not of our method."""
    quantized = _parse(config).get("quantization_config")
    ours = isinstance(quantized, dict) and quantized.get("quant_method") == QUANT_METHOD
    return quantized if ours else None


def _quantized(config: bytes) -> dict[str, Any]:
    quantized = _stored(config)
    if quantized is None:
        raise CorruptError("config.json is not that of a packed checkpoint; fetch it again")
    return quantized
