"""Models whose blocks differ from LLaMA's, from weights to a checkpoint that transformers loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from mbq.artifacts.loading import load_model

IDS = torch.arange(2 * 20).view(2, 20) * 7 % 320


TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("cohere2", TWO_KINDS),  # attention and MLP side by side
        ("gemma2", TWO_KINDS),  # capped scores and logits, scaled embeddings
        ("gemma3_text", TWO_KINDS),  # positions of two kinds
        ("glm4", {}),  # gate and up in one linear
        ("nemotron", {}),  # no gate
        ("olmo", {"clip_qkv": 8.0}),  # changes in place what linears return
        ("phi", {}),  # other names, biases everywhere
        ("phi3", {}),  # q, k and v in one linear
        ("starcoder2", {}),  # biases, a tied head
    ],
)
def test_a_checkpoint_computes_what_its_source_does(
    finish_run: Callable[..., Any],
    make_model: Callable[..., Path],
    tiny_document: Any,
    architecture: str,
    changes: dict[str, Any],
) -> None:
    # Embeddings of padding are zero: as the first token, it would have what norms blow up.
    padding = {"vocab_size": 321, "pad_token_id": 320}
    changes = {"num_hidden_layers": 2, "head_dim": 16, **padding} | changes
    folder = make_model(CONFIG_MAPPING[architecture], **changes)
    routing = {"method": "token", "steps": 2, "width": 2, "settle_tokens": 64}
    document = tiny_document(model={"source": str(folder)}, evaluation=None, routing=routing)
    run = finish_run(document)
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    model: Any = load_model(run.checkpoint)
    assert len(model.config.quantization_config.routing["routers"]) == 4

    @torch.no_grad()
    def error() -> float:
        return float((model(IDS).logits - expected).norm() / expected.norm())

    errors = {}
    for bits in (2, 4, 8):
        model.set_bits(bits)
        errors[bits] = error()
    assert errors[8] < 0.15
    assert errors[8] < errors[4] < errors[2]
    model.set_average_bits(3.5)
    assert errors[8] < error() < errors[2]
    assert model.realised_bits() == pytest.approx(3.5, abs=0.4)
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 22)
