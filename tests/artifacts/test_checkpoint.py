"""Which tensor lies in which file, from shapes alone."""

import json

import pytest

from mbq.artifacts.checkpoint import (
    Linear,
    find_linears,
    find_routers,
    index_document,
    plan_shards,
    router_bits,
    router_shape,
    routing_shard,
    slice_files,
)
from mbq.artifacts.spec import Routing
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
    assert by_slice[None][f"{linear}.exponent"].shape == (96,)
    # The second slice completes two widths: 3 bits are half of it.
    for e, widths in enumerate([(2,), (3, 4), (6,)]):
        ours = {name.rpartition(".")[2]: x for name, x in by_slice[e].items() if linear in name}
        gains = {f"gain_bias_{bits}" for bits in widths}
        assert set(ours) == {f"plane_{2 * e}", f"plane_{2 * e + 1}"} | gains
        assert ours[f"plane_{2 * e}"].shape == (64, 3)
        assert all(ours[name].shape == (64,) for name in gains)
    assert not any(name.endswith(("plane_6", "gain_bias_8")) for name in names)


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


def _llama_2_7b() -> list[Linear]:
    hidden, wide = 4096, 11008
    shapes = {f"self_attn.{n}_proj": (hidden, hidden) for n in ("q", "k", "v", "o")}
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden)}
    shapes["mlp.down_proj"] = (hidden, wide)
    return [
        Linear(f"model.layers.{b}.{name}", b, *shape)
        for b in range(32)
        for name, shape in shapes.items()
    ]


def test_routers_and_gains_cost_little_at_the_size_of_llama_2_7b() -> None:
    linears = _llama_2_7b()
    routing = Routing()
    shape = router_shape("token", routing.width)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    # Stored: a gain and a bias of every output at five widths; read: those of one.
    gains = 5 * 32 * sum(linear.out_features for linear in linears) / weights
    stored = 8 * sum(e.size_bytes for e in routing_shard(linears, 8, shape).entries) / weights
    assert gains == pytest.approx(0.0336, abs=1e-4)
    assert router_bits(linears, 8, shape) == pytest.approx(0.0148, abs=2e-4)
    assert gains + stored <= 0.05
    assert router_bits(linears, 8, router_shape("norm", routing.width)) < 1e-5
    assert router_bits(linears, 8, router_shape("linear", routing.width)) == 0


def test_linears_that_read_the_same_input_share_a_router() -> None:
    assert find_routers(_llama_2_7b()) == {
        "self_attn.qkv_router": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_router": ("self_attn.o_proj",),
        "mlp.gate_up_router": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_router": ("mlp.down_proj",),
    }
    # What we do not know reads an input of its own.
    odd = [Linear("model.layers.0.mlp.gate_up_proj", 0, 64, 32)]
    assert find_routers(odd) == {"mlp.gate_up_proj_router": ("mlp.gate_up_proj",)}


@pytest.mark.parametrize(
    ("method", "buffers"),
    [
        ("linear", {"knots": (4, 2, 2, 1)}),
        ("norm", {"head": (4, 2, 2), "knots": (4, 2, 2, 16)}),
        (
            "token",
            {
                "trunk": (8, 2048),
                "offset": (8,),
                "head": (4, 2, 10),
                "knots": (4, 2, 2, 16),
            },
        ),
    ],
)
def test_a_router_holds_what_its_method_needs(
    method: str, buffers: dict[str, tuple[int, ...]]
) -> None:
    shard = routing_shard(_llama_2_7b(), 8, router_shape(method, 8))
    prefix = "model.layers.31.mlp.gate_up_router."
    found = {e.name.removeprefix(prefix): e.shape for e in shard.entries if prefix in e.name}
    assert found == buffers
    assert shard.blocks == tuple(range(32))
