"""Between calibrated tensors and the bytes of the store.

A block's blob holds, per linear, `<name>.code` U8 [N, K], `.exponent` I8 [K], `.scale_zero` I32
[N, G] and `.gain_bias` I32 [W, N], and per router `<name>.trunk` I32 [H, K/2] (float16 pairs),
`.offset` F32 [H], `.head` F32 [E, L, F] and, for every method, `.knots_<method>` F32 [E, L, 2, Q].
The blob of sensitivities holds F32 [N] of every linear. A shard of the checkpoint is written tensor
by tensor from blobs of blocks and from the source; nothing but the tensor at hand is in memory.

Legend: N out_features, K in_features, G groups, W widths; those of routers are in
`kernels/router.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mbq.artifacts.checkpoint import Linear, RouterShape, Shard
from mbq.artifacts.elastic import add_routers, replace_linears
from mbq.artifacts.tensors import TensorFile, encode
from mbq.kernels.bitplanes import pack_planes
from mbq.kernels.precision import Precision
from mbq.kernels.router import pack_halves
from mbq.kernels.widths import SLICE_BITS, WIDTHS
from mbq.workers.model import Model, linears
from mbq.workers.route import FittedInput, norm_head
from mbq.workers.tensors import entry_of, read_tensor, tensor_bytes
from mbq.workers.trainable import CalibratedLinear


@dataclass(frozen=True)
class BlockRouting:
    """The routers of a block: what each serves, up to how many bits, and their shape."""

    routers: Mapping[str, Sequence[str]]
    max_bits: int
    shape: RouterShape


def encode_block(
    block: Mapping[str, CalibratedLinear], routers: Mapping[str, FittedInput]
) -> Iterator[bytes]:
    """A block's blob in chunks; the same block always gives the same bytes."""
    tensors = {}
    for name in sorted(block):
        tensors[f"{name}.code"] = block[name].code_NK
        tensors[f"{name}.exponent"] = block[name].exponent_K
        tensors[f"{name}.scale_zero"] = block[name].scale_zero_NG
        tensors[f"{name}.gain_bias"] = block[name].gain_bias_WN
    for name in sorted(routers):
        fitted = routers[name]
        tensors[f"{name}.trunk"] = pack_halves(fitted.learned.trunk_HK)
        tensors[f"{name}.offset"] = fitted.learned.offset_H
        tensors[f"{name}.head"] = fitted.learned.head_ELF
        for method in sorted(fitted.knots):
            tensors[f"{name}.knots_{method}"] = fitted.knots[method]
    return _encode(tensors)


def encode_sensitivity(sensitivity: Mapping[str, Tensor]) -> Iterator[bytes]:
    """Sensitivities of a model's linears in chunks, by name."""
    return _encode(sensitivity)


def _encode(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    entries = [entry_of(name, tensor) for name, tensor in tensors.items()]
    return encode(entries, map(tensor_bytes, tensors.values()))


def read_linear(file: TensorFile, name: str) -> CalibratedLinear:
    """One linear of a block's blob."""
    return CalibratedLinear(
        read_tensor(file, f"{name}.code"),
        read_tensor(file, f"{name}.exponent"),
        read_tensor(file, f"{name}.scale_zero"),
        read_tensor(file, f"{name}.gain_bias"),
    )


def router_buffers(
    file: TensorFile, name: str, method: str, log_worths: Sequence[float]
) -> dict[str, Tensor]:
    """Buffers of one router under a method, from its block's blob.

    Args:
        log_worths: of the linears it serves: benefits become earnings (`allocate.log_worth`).
    """
    knots = read_tensor(file, f"{name}.knots_{method}")
    if method != "target":
        knots[:, :, 1] += torch.tensor(log_worths)[:, None]
    buffers = {"knots": knots.contiguous().view(torch.int32)}
    if method == "norm":
        buffers["head"] = norm_head(*knots.shape[:2]).contiguous().view(torch.int32)
    elif method != "linear":
        buffers["trunk"] = read_tensor(file, f"{name}.trunk")
        for part in ("offset", "head"):
            buffers[part] = read_tensor(file, f"{name}.{part}").view(torch.int32)
    return buffers


def encode_routing(shard: Shard, buffers: Callable[[int], Mapping[str, Tensor]]) -> Iterator[bytes]:
    """The routers' file in chunks.

    Args:
        buffers: the buffers of one block's routers, by name inside the block.
    """
    return encode(shard.entries, _routing_data(shard, buffers))


def _routing_data(shard: Shard, buffers: Callable[[int], Mapping[str, Tensor]]) -> Iterator[bytes]:
    at: tuple[int, Mapping[str, Tensor]] = (-1, {})
    for entry in shard.entries:
        _, _, number, name = entry.name.split(".", 3)
        if int(number) != at[0]:
            at = int(number), buffers(int(number))
        yield tensor_bytes(at[1][name])


def encode_shard(
    shard: Shard, linears: Mapping[str, Linear], blobs: Mapping[int, TensorFile], model: Model
) -> Iterator[bytes]:
    """A file of the checkpoint in chunks.

    Args:
        linears: every quantized linear by its module name.
        blobs: the blobs of the shard's blocks.
    """
    return encode(shard.entries, _shard_data(shard, linears, blobs, model))


def elastic_block(
    model: Model,
    index: int,
    tensors: Mapping[str, Tensor],
    group_size: int,
    precision: Precision,
    routing: BlockRouting | None = None,
) -> nn.Module:
    """The block with elastic linears, and with routers if there is a routing.

    Args:
        tensors: the buffers of elastic linears and routers by their name inside the block.
    """
    block = model.empty_block(index)
    names = replace_linears(block, list(linears(block)), group_size, precision)
    replaced = {f"{name}.weight" for name in names}
    if routing is not None:
        names += add_routers(
            block, names, routing.routers, routing.max_bits, routing.shape, precision
        )
    state = {
        f"{name}.{buffer}": tensors[f"{name}.{buffer}"].to(model.device)
        for name in names
        for buffer, _ in block.get_submodule(name).named_buffers()
    }
    state |= model.block_tensors(index, replaced)
    block.load_state_dict(state, strict=True, assign=True)
    return block.requires_grad_(False)


def elastic_tensors(name: str, linear: CalibratedLinear, device: torch.device) -> dict[str, Tensor]:
    """A calibrated linear as the buffers of an elastic one, by name inside the block.

    Args:
        device: where planes are packed.
    """
    tensors = {f"{name}.exponent": linear.exponent_K, f"{name}.scale_zero": linear.scale_zero_NG}
    for p, plane in enumerate(pack_planes(linear.code_NK.to(device))):
        tensors[f"{name}.plane_{p}"] = plane
    for bits, row in zip(WIDTHS, linear.gain_bias_WN, strict=True):
        tensors[f"{name}.gain_bias_{bits}"] = row
    return tensors


def _shard_data(
    shard: Shard, linears: Mapping[str, Linear], blobs: Mapping[int, TensorFile], model: Model
) -> Iterator[bytes]:
    planes: dict[int, Tensor] = {}
    for entry in shard.entries:
        module, _, kind = entry.name.rpartition(".")
        if module not in linears or kind == "bias":
            yield tensor_bytes(model.read([entry.name])[entry.name])
            continue
        linear = linears[module]
        blob, name = blobs[linear.block], linear.local_name
        if kind in ("exponent", "scale_zero"):
            yield blob.read(f"{name}.{kind}")
        elif kind.startswith("gain_bias_"):
            row = WIDTHS.index(int(kind.removeprefix("gain_bias_")))
            yield tensor_bytes(read_tensor(blob, f"{name}.gain_bias")[row])
        else:
            plane = int(kind.removeprefix("plane_"))
            if plane % SLICE_BITS == 0:
                wanted = range(plane, plane + SLICE_BITS)
                code = read_tensor(blob, f"{name}.code")
                planes = dict(zip(wanted, pack_planes(code, wanted), strict=True))
            yield tensor_bytes(planes[plane])
