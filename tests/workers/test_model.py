"""Block by block must be exactly the full model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from mbq.artifacts.errors import InputError
from mbq.artifacts.source import open_source
from mbq.workers.model import linears, open_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True}),
        (MistralConfig, {"sliding_window": 7}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 32}),
    ],
    ids=["llama", "llama-tied-biased", "mistral-sliding", "qwen2", "qwen3-wide-heads"],
)
@torch.no_grad()
def test_equals_the_full_model(
    make_model: Callable[..., Path], kind: type, changes: dict[str, Any]
) -> None:
    folder = make_model(kind, **changes)
    ids = torch.arange(3 * 19).view(3, 19) * 11 % 320
    full = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    model = open_model(open_source(str(folder), "main"), torch.float32, CPU)
    hidden = model.embed(ids)
    for index in range(model.block_count):
        hidden = model.run(model.block(index), index, hidden)
    assert torch.equal(model.head()(hidden), full(ids).logits)


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
