"""Block by block must be exactly the full model."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
)

from mbq.artifacts.errors import InputError
from mbq.artifacts.source import open_source
from mbq.orchestrator.check import ARCHITECTURES
from mbq.workers.model import linears, open_model

CPU = torch.device("cpu")


@torch.no_grad()
def _hold_against_the_full_model(folder: Path, dtype: torch.dtype) -> None:
    ids = torch.arange(3 * 19).view(3, 19) * 11 % 320
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model = open_model(open_source(str(folder), "main"), dtype, CPU)
    hidden = model.embed(ids)
    for index in range(model.block_count):
        hidden = model.run(model.block(index), index, hidden)
    assert torch.equal(model.head()(hidden), full(ids).logits)


# So that three blocks are of two kinds.
LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1}
TWO_KINDS: dict[str, dict[str, Any]] = {
    "cohere2": LAYERS,
    "exaone4": LAYERS,
    "gemma3_text": LAYERS,
    "olmo3": LAYERS,
    "qwen2": WINDOWS,
    "qwen3": WINDOWS,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_full_model(
    make_model: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    # A window shorter than the text, where a model has one.
    changes = {"pad_token_id": 0, "sliding_window": 7} | TWO_KINDS.get(architecture, {})
    folder = make_model(CONFIG_MAPPING[architecture], **changes)
    _hold_against_the_full_model(folder, dtype)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
        (Qwen3Config, {"head_dim": 32}),
        (GraniteConfig, {"embedding_multiplier": 12.0, "logits_scaling": 8.0}),
        (Gemma2Config, {"final_logit_softcapping": 0.1, "attn_logit_softcapping": 0.5}),
    ],
    ids=["llama-tied-biased", "qwen3-wide-heads", "granite-scaled", "gemma2-capped"],
)
def test_equals_the_full_model_whatever_it_does_around_blocks(
    make_model: Callable[..., Path], kind: type, changes: dict[str, Any]
) -> None:
    _hold_against_the_full_model(make_model(kind, **changes), torch.float32)


def test_a_pass_keeps_nothing(tiny_model: Path) -> None:
    """Blocks and hidden states are the largest things there are: gone without a collection."""
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, CPU)
    block, head = model.block(1), model.head()
    hidden = model.run(block, 1, model.embed(torch.arange(6).view(2, 3)))
    head(hidden)
    left = [weakref.ref(block), weakref.ref(hidden)]
    gc.disable()
    try:
        del block, hidden
        assert [reference() for reference in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["eager", "flash_attention_2"])
def test_attention_is_what_is_pinned_whatever_config_json_asks_for(
    tiny_model: Path, tmp_path: Path, kind: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    path = folder / "config.json"
    changes = {"attn_implementation": kind, "return_dict": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = open_model(open_source(str(folder), "main"), torch.float32, CPU)
    assert model.config._attn_implementation == "sdpa"
    model.head()(model.embed(torch.arange(6).view(2, 3)))


def test_opening_reads_no_weights_and_a_block_reads_its_own(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.bfloat16, CPU)
    assert all(p.is_meta for p in model.skeleton.parameters())
    block = model.block(1)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in block.parameters())
    assert all(p.is_meta for p in model.skeleton.parameters())


def test_lists_the_linears_of_a_block(tiny_model: Path) -> None:
    model = open_model(open_source(str(tiny_model), "main"), torch.float32, CPU)
    assert list(linears(model.block(0))) == [
        *(f"self_attn.{n}_proj" for n in "qkvo"),
        *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "foo"}, "KeyError: 'foo'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "foo"),
    ],
    ids=["activation", "epsilon", "positions"],
)
def test_a_config_that_describes_no_model(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=f"config.json of .*copy describes .*{message}"):
        open_model(open_source(str(folder), "main"), torch.float32, CPU)
