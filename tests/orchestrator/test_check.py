"""Models that cannot be quantized are refused from their config.json and the shapes of tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

from mbq.artifacts.errors import InputError
from mbq.artifacts.source import open_source
from mbq.artifacts.spec_file import parse_spec
from mbq.orchestrator.check import check_source

Make = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    ("kind", "model_changes", "spec_changes", "message"),
    [
        (MixtralConfig, {"num_local_experts": 2}, {}, "mixture of experts"),
        (GPTNeoXConfig, {}, {}, "model_type gpt_neox is not supported; use one of apertus, arcee"),
        (
            CohereConfig,
            {"use_qk_norm": True, "num_attention_heads": 2, "pad_token_id": 0},
            {},
            r"model\.layers\.0\.self_attn\.k_norm is a matrix but no linear",
        ),
        (
            LlamaConfig,
            {},
            {"group_size": 64},
            r"64 does not divide the 96 inputs of model\.layers\.0\.mlp\.down_proj; use 32",
        ),
    ],
    ids=["experts", "gpt-neox", "norms", "group"],
)
def test_models_that_cannot_be_quantized(
    make_model: Callable[..., Path],
    tiny_document: Make,
    kind: type,
    model_changes: dict[str, Any],
    spec_changes: dict[str, Any],
    message: str,
) -> None:
    source = open_source(str(make_model(kind, **model_changes)), "main")
    with pytest.raises(InputError, match=message):
        check_source(source, parse_spec(tiny_document(**spec_changes)))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        (MistralConfig, {"head_dim": 32}),
        (Qwen2Config, {}),
        (Qwen3Config, {"head_dim": 32}),
    ],
    ids=["llama-tied-biased", "mistral", "qwen2", "qwen3-wide-heads"],
)
def test_models_that_can_be_quantized(
    make_model: Callable[..., Path], tiny_document: Make, kind: type, changes: dict[str, Any]
) -> None:
    source = open_source(str(make_model(kind, **changes)), "main")
    check_source(source, parse_spec(tiny_document()))


def test_sequences_longer_than_the_model(tiny_model: Path, tiny_document: Make) -> None:
    text = tiny_document()["calibration"] | {"sequence_length": 129}
    spec = parse_spec(tiny_document(calibration=text))
    with pytest.raises(InputError, match=r"calibration\.sequence_length: 129 .* use at most 128"):
        check_source(open_source(str(tiny_model), "main"), spec)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already"),
        ({"num_hidden_layers": 4}, r"promises 4 blocks, the weights hold 3"),
        ({"num_hidden_layers": 2}, r"promises 2 blocks, the weights hold 3"),
        (
            {"vocab_size": 321},
            r"promises \[321, 64\] for model\.embed_tokens\.weight, the weights hold \[320, 64\]",
        ),
        (
            {"head_dim": 32},
            r"promises \[128, 64\] for model\.layers\.0\.self_attn\.q_proj\.weight, .* \[64, 64\]",
        ),
        ({"num_attention_heads": 0}, "transformers cannot build"),
        ({"num_key_value_heads": 4}, r"promises \[64, 64\] for .*k_proj.weight, .* \[32, 64\]"),
        ({"intermediate_size": 64}, r"for model\.layers\.0\.mlp\.gate_proj\.weight"),
        ({"attention_bias": True}, r"0\.self_attn\.q_proj\.bias, the weights hold none"),
        ({"model_type": "qwen3", "head_dim": 16}, r"q_norm\.weight, the weights hold none"),
        ({"hidden_act": "foo"}, "transformers cannot build .*KeyError: 'foo'"),
    ],
    ids=[
        "quantized",
        "more blocks",
        "fewer blocks",
        "vocabulary",
        "heads",
        "no heads",
        "key heads",
        "inner",
        "biases",
        "other model",
        "activation",
    ],
)
def test_configs_that_belong_to_other_weights(
    copy: Path, tiny_document: Make, changes: dict[str, Any], message: str
) -> None:
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        check_source(open_source(str(copy), "main"), parse_spec(tiny_document()))


def test_weights_of_types_that_are_not_read(copy: Path, tiny_document: Make) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].double()}, path, {"format": "pt"})
    with pytest.raises(InputError, match=rf"stores {name} as F64; only F16, BF16, F32 are read"):
        check_source(open_source(str(copy), "main"), parse_spec(tiny_document()))


def test_pickled_weights_are_not_read(copy: Path, tiny_document: Make) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has no model\.safetensors; .* are not read"):
        check_source(open_source(str(copy), "main"), parse_spec(tiny_document()))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
@pytest.mark.parametrize("cut", [True, False])
def test_weights_that_lack_something(copy: Path, tiny_document: Make, name: str, cut: bool) -> None:
    path = copy / "model.safetensors"
    tensors = load_file(path)
    whole = tensors.pop(name)
    shape = str(list(whole[1:].shape)) if cut else "none"
    save_file(tensors | ({name: whole[1:].clone()} if cut else {}), path, {"format": "pt"})
    with pytest.raises(InputError) as raised:
        check_source(open_source(str(copy), "main"), parse_spec(tiny_document()))
    assert name in str(raised.value)
    assert shape in str(raised.value)


def test_weights_that_hold_more(
    make_model: Callable[..., Path], tmp_path: Path, tiny_document: Make
) -> None:
    folder = Path(shutil.copytree(make_model(Qwen2Config), tmp_path / "qwen"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama"}))
    with pytest.raises(InputError, match=r"bias, which config\.json does not promise"):
        check_source(open_source(str(folder), "main"), parse_spec(tiny_document()))


def test_a_head_that_is_missing_is_not_the_embeddings(
    make_model: Callable[..., Path], tiny_document: Make
) -> None:
    folder = make_model(tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"for lm_head\.weight, the weights hold none"):
        check_source(open_source(str(folder), "main"), parse_spec(tiny_document()))
