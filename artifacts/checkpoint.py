"""The packed checkpoint: which tensor lies in which file, and the JSON documents around them.

    model-base-0000i-of-0000n.safetensors     what every width needs: embeddings, norms, head,
                                              biases (as the source stores them), and per linear
        <linear>.scale_zero     I32 [N, G]    float16 pair: scale in the low half, zero in the high
    model-slice<e>-0000i-of-0000n.safetensors one set per slice e, most significant first; per
                                              linear
        <linear>.plane_<p>      I32 [N, K/32] p = 2e and 2e + 1 (layout: kernels/bitplanes.py)
        <linear>.gain_bias_<k>  I32 [N]       k = e + 1: float16 pair of gain and bias at k slices

So the base and the first k slice sets are a complete model of 2k bits. Around them:
`model.safetensors.index.json` (every tensor and its file), `config.json` (the source's, with
`quantization_config`), the tokenizer's files, and `manifest.json`, written last.

Everything here follows from names and shapes alone.

Legend: N out_features, K in_features, G groups.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mbq.artifacts.source import Source
from mbq.artifacts.spec import FORMAT_VERSION, SLICE_BITS, WORD_INPUTS
from mbq.artifacts.tensors import Entry

QUANT_METHOD = "mbq"
PACKING = "plane-row32-lsb"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 1024**3

_BLOCK_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


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
        return self.name.removeprefix(f"model.layers.{self.block}.")


@dataclass(frozen=True)
class Shard:
    """One file of the checkpoint: its tensors in order and the blocks it takes codes from."""

    file: str
    slice: int | None
    entries: tuple[Entry, ...]
    blocks: tuple[int, ...]


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
    base += [
        (linear.block, [Entry(f"{linear.name}.scale_zero", "I32", _groups(linear, group_size))])
        for linear in linears
    ]
    shards = _split("model-base", None, base, max_shard_bytes)
    for e in range(slices):
        planes = [(linear.block, _slice_entries(linear, e)) for linear in linears]
        shards += _split(f"model-slice{e}", e, planes, max_shard_bytes)
    return shards


def index_document(shards: Iterable[Shard]) -> bytes:
    """The index that transformers reads: every tensor and its file."""
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    total = sum(entry.size_bytes for shard in shards for entry in shard.entries)
    return _json({"metadata": {"total_size": total}, "weight_map": weight_map})


def config_document(
    source: Source, slices: int, group_size: int, linears: Sequence[Linear]
) -> bytes:
    """The source's config.json with `quantization_config` added."""
    config = dict(source.config)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "max_bits": SLICE_BITS * slices,
        "group_size": group_size,
        "packing": PACKING,
        "linears": sorted({linear.local_name for linear in linears}),
    }
    return _json(config)


def slice_files(shards: Iterable[Shard], slices: int) -> tuple[tuple[str, ...], ...]:
    """Per slice, the files that hold it."""
    return tuple(tuple(shard.file for shard in shards if shard.slice == e) for e in range(slices))


def plane_name(linear: str, plane: int) -> str:
    return f"{linear}.plane_{plane}"


def gain_bias_name(linear: str, slices: int) -> str:
    return f"{linear}.gain_bias_{slices}"


def _slice_entries(linear: Linear, e: int) -> list[Entry]:
    words = (linear.out_features, linear.in_features // WORD_INPUTS)
    planes = range(SLICE_BITS * e, SLICE_BITS * (e + 1))
    entries = [Entry(plane_name(linear.name, p), "I32", words) for p in planes]
    return [*entries, Entry(gain_bias_name(linear.name, e + 1), "I32", (linear.out_features,))]


def _groups(linear: Linear, group_size: int) -> tuple[int, int]:
    return linear.out_features, linear.in_features // group_size


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


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
