"""The packed checkpoint: which tensor lies in which file, and the JSON documents around them.

    model-base-0000i-of-0000n.safetensors     what every width needs: embeddings, norms, head,
                                              biases (as the source stores them), and per linear
        <linear>.exponent       I8  [K]       columns of the weight are times 2 to these
        <linear>.scale_zero     I32 [N, G]    float16 pair: scale in the low half, zero in the high
    model-slice<e>-0000i-of-0000n.safetensors one set per slice e, most significant first; per
                                              linear
        <linear>.plane_<p>      I32 [N, K/32] p = 2e and 2e + 1 (layout: kernels/bitplanes.py)
        <linear>.gain_bias_<b>  I32 [N]       float16 pair of gain and bias at each width b that
                                              this slice completes: 2; 3 and 4; 6; 8
    model-routing.safetensors                 the routers, per linear input of a block: `trunk`,
                                              `offset`, `head`, `knots` (kernels/router.py), as
                                              many of them as the routing method has

So the base, the routers and the first k slice sets are a complete model of 2k bits; the routers'
thresholds, a curve for every step between widths, are in `config.json`. Around them:
`model.safetensors.index.json` (every tensor and its file), `config.json` (the source's, with
`quantization_config`), the tokenizer's files, and `manifest.json`, written last.

Everything here follows from names and shapes alone.

Legend: N out_features, K in_features, G groups.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mbq.artifacts.tensors import Entry
from mbq.kernels.widths import SLICE_BITS, WIDTHS, WORD_BITS, slices_of, steps_up_to

QUANT_METHOD = "mbq"
PACKING = "plane-row32-lsb"
INDEX_FILE = "model.safetensors.index.json"
ROUTING_FILE = "model-routing.safetensors"
MAX_SHARD_BYTES = 4 * 1024**3
# What the names of all that is in blocks begin with.
BLOCKS_PREFIX = "model.layers."
# Points of a router's map from score to earnings.
KNOTS = 16

# Linears of one block that read the same input, by the name of their router.
_ROUTERS = {
    "self_attn.qkv_router": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_router": ("self_attn.o_proj",),
    "mlp.gate_up_router": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_router": ("mlp.down_proj",),
}
_BLOCK_WEIGHT = re.compile(r"model\.layers\.(\d{1,6})\.(.+)\.weight")


@dataclass(frozen=True)
class Linear:
    """A quantized linear: its module name in the model, its block, and its shape."""

    name: str
    block: int
    out_features: int
    in_features: int

    @property
    def local_name(self) -> str:
        """Name inside the block."""
        return self.name.removeprefix(block_prefix(self.block))

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class RouterShape:
    """Rows of a router's trunk, and points of its map; without scores the width is None."""

    width: int | None
    knots: int


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint: its tensors in order and the blocks it takes codes from."""

    file: str
    slice: int | None
    entries: tuple[Entry, ...]
    blocks: tuple[int, ...]


def block_prefix(block: int) -> str:
    """What the names of all that is in a block begin with."""
    return f"{BLOCKS_PREFIX}{block}."


def find_linears(tensors: Mapping[str, Entry]) -> list[Linear]:
    """Every matrix inside a block, in block order: these are quantized, the rest is kept."""
    found = []
    for name, entry in tensors.items():
        match = _BLOCK_WEIGHT.fullmatch(name)
        if match and len(entry.shape) == 2:
            linear = name.removesuffix(".weight")
            found.append(Linear(linear, int(match[1]), entry.shape[0], entry.shape[1]))
    return sorted(found, key=lambda linear: (linear.block, linear.name))


def plan_shards(
    tensors: Mapping[str, Entry],
    slices: int,
    group_size: int,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Shard]:
    """Assign every tensor of the checkpoint to a file.

    Args:
        tensors: the source's tensors by name.
        slices: how many slices the checkpoint stores.
    """
    linears = find_linears(tensors)
    quantized = {f"{linear.name}.weight" for linear in linears}
    kept = [entry for name, entry in tensors.items() if name not in quantized]
    base: list[tuple[int | None, list[Entry]]] = [
        (None, sorted(kept, key=lambda entry: entry.name))
    ]
    base += [(linear.block, _base_entries(linear, group_size)) for linear in linears]
    shards = _split("model-base", None, base, max_shard_bytes)
    for e in range(slices):
        planes = [(linear.block, _slice_entries(linear, e)) for linear in linears]
        shards += _split(f"model-slice{e}", e, planes, max_shard_bytes)
    return shards


def find_routers(linears: Iterable[Linear]) -> dict[str, tuple[str, ...]]:
    """The linears that each router of a block serves; names are those inside the block."""
    names = {linear.local_name for linear in linears}
    routers = {router: served for router, served in _ROUTERS.items() if names >= set(served)}
    alone = names - {name for served in routers.values() for name in served}
    return routers | {f"{name}_router": (name,) for name in sorted(alone)}


def router_shape(method: str, width: int) -> RouterShape:
    """Shape of every router of a method; `width` is that of learned ones."""
    shapes = {"linear": RouterShape(None, 1), "norm": RouterShape(0, KNOTS)}
    return shapes.get(method, RouterShape(width, KNOTS))


def routing_shard(linears: Sequence[Linear], max_bits: int, shape: RouterShape) -> Shard:
    """The file of the routers."""
    routers = find_routers(linears)
    inputs = {(linear.block, linear.local_name): linear.in_features for linear in linears}
    blocks = sorted({linear.block for linear in linears})
    entries = [
        Entry(f"{block_prefix(block)}{router}.{name}", "I32", size)
        for block in blocks
        for router, served in routers.items()
        for name, size in _router_shapes(
            inputs[block, served[0]], len(served), len(steps_up_to(max_bits)), shape
        ).items()
    ]
    return Shard(ROUTING_FILE, None, tuple(entries), tuple(blocks))


def router_bits(linears: Sequence[Linear], max_bits: int, shape: RouterShape) -> float:
    """What routers read for each token, per weight; the maps are read when the width changes."""
    entries = routing_shard(linears, max_bits, shape).entries if max_bits > SLICE_BITS else ()
    read_bytes = sum(e.size_bytes for e in entries if not e.name.endswith(".knots"))
    return 8 * read_bytes / sum(linear.weights for linear in linears)


def index_document(shards: Iterable[Shard]) -> bytes:
    """The index that transformers reads: every tensor and its file."""
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(entry.size_bytes for shard in shards for entry in shard.entries)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def slice_files(shards: Iterable[Shard], slices: int) -> tuple[tuple[str, ...], ...]:
    """Per slice, the files that hold it."""
    return tuple(tuple(shard.file for shard in shards if shard.slice == e) for e in range(slices))


def _base_entries(linear: Linear, group_size: int) -> list[Entry]:
    groups = linear.out_features, linear.in_features // group_size
    return [
        Entry(f"{linear.name}.exponent", "I8", (linear.in_features,)),
        Entry(f"{linear.name}.scale_zero", "I32", groups),
    ]


def _slice_entries(linear: Linear, e: int) -> list[Entry]:
    words = (linear.out_features, linear.in_features // WORD_BITS)
    planes = range(SLICE_BITS * e, SLICE_BITS * (e + 1))
    entries = [Entry(f"{linear.name}.plane_{p}", "I32", words) for p in planes]
    completed = [bits for bits in WIDTHS if slices_of(bits) == e + 1]
    names = [f"{linear.name}.gain_bias_{bits}" for bits in completed]
    return [*entries, *(Entry(name, "I32", (linear.out_features,)) for name in names)]


def _router_shapes(
    in_features: int, served: int, extra: int, shape: RouterShape
) -> dict[str, tuple[int, ...]]:
    """Buffers of one router, as `kernels/router.py` names them."""
    shapes: dict[str, tuple[int, ...]] = {}
    if shape.width:
        shapes |= {"trunk": (shape.width, in_features // 2), "offset": (shape.width,)}
    if shape.width is not None:
        shapes["head"] = (extra, served, shape.width + 2)
    return shapes | {"knots": (extra, served, 2, shape.knots)}


def _split(
    stem: str, e: int | None, items: Sequence[tuple[int | None, list[Entry]]], max_bytes: int
) -> list[Shard]:
    """Cut a sequence of tensors into files, never splitting one linear's tensors."""
    files: list[list[tuple[int | None, list[Entry]]]] = []
    room = 0
    for block, entries in items:
        size = sum(entry.size_bytes for entry in entries)
        if not files or size > room:
            files.append([])
            room = max_bytes
        files[-1].append((block, entries))
        room -= size
    return [
        Shard(
            file=f"{stem}-{number:05d}-of-{len(files):05d}.safetensors",
            slice=e,
            entries=tuple(entry for _, entries in file for entry in entries),
            blocks=tuple(sorted({block for block, _ in file if block is not None})),
        )
        for number, file in enumerate(files, start=1)
    ]
