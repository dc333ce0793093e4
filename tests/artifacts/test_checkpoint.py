"""Which tensor lies in which file, from shapes alone."""

import json

from mbq.artifacts.checkpoint import find_linears, index_document, plan_shards, slice_files
from mbq.artifacts.tensors import Entry


def _source(blocks: int) -> dict[str, Entry]:
    shapes = {"model.embed_tokens.weight": (100, 64), "model.norm.weight": (64,)}
    for b in range(blocks):
        shapes[f"model.layers.{b}.self_attn.q_proj.weight"] = (64, 64)
        shapes[f"model.layers.{b}.self_attn.q_proj.bias"] = (64,)
        shapes[f"model.layers.{b}.mlp.down_proj.weight"] = (64, 96)
        shapes[f"model.layers.{b}.input_layernorm.weight"] = (64,)
    return {name: Entry(name, "BF16", shape) for name, shape in shapes.items()}


def test_linears_are_the_matrices_inside_blocks_in_numeric_order() -> None:
    linears = find_linears(_source(11))
    assert [linear.block for linear in linears] == [b for b in range(11) for _ in range(2)]
    assert linears[0].name == "model.layers.0.mlp.down_proj"
    assert linears[0].local_name == "mlp.down_proj"
    assert (linears[0].out_features, linears[0].in_features) == (64, 96)


def test_base_and_slices_share_nothing_and_miss_nothing() -> None:
    source = _source(2)
    shards = plan_shards(source, slices=3, group_size=32)
    names = [entry.name for shard in shards for entry in shard.entries]
    assert len(names) == len(set(names))
    kept = {name for name in source if "proj.weight" not in name}
    linear = "model.layers.1.mlp.down_proj"
    assert kept <= {e.name for s in shards if s.slice is None for e in s.entries}
    by_slice = {
        e: {x.name: x for s in shards if s.slice == e for x in s.entries} for e in (None, 0, 1, 2)
    }
    assert by_slice[None][f"{linear}.scale_zero"].shape == (64, 3)
    for e in range(3):
        ours = {name.rpartition(".")[2]: x for name, x in by_slice[e].items() if linear in name}
        assert set(ours) == {f"plane_{2 * e}", f"plane_{2 * e + 1}", f"gain_bias_{e + 1}"}
        assert ours[f"plane_{2 * e}"].shape == (64, 3)
    assert not any("plane_6" in name for name in names)


def test_cuts_files_at_the_cap_and_says_which_blocks_they_need() -> None:
    one_block = 2 * 64 * (64 + 96) // 8 + 2 * 64 * 4
    shards = plan_shards(_source(3), slices=1, group_size=32, max_shard_bytes=one_block)
    slices = [shard for shard in shards if shard.slice == 0]
    assert [shard.blocks for shard in slices] == [(0,), (1,), (2,)]
    assert slices[1].file == "model-slice0-00002-of-00003.safetensors"
    assert slice_files(shards, 1) == (tuple(shard.file for shard in slices),)


def test_a_linear_larger_than_the_cap_still_gets_a_file() -> None:
    shards = plan_shards(_source(1), slices=1, group_size=32, max_shard_bytes=1)
    assert all(shard.entries for shard in shards)


def test_index_names_every_tensor_once() -> None:
    shards = plan_shards(_source(2), slices=4, group_size=32)
    index = json.loads(index_document(shards))
    expected = {entry.name: shard.file for shard in shards for entry in shard.entries}
    assert index["weight_map"] == expected
    total = sum(entry.size_bytes for shard in shards for entry in shard.entries)
    assert index["metadata"]["total_size"] == total
