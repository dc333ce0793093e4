"""Refuse what cannot be quantized, from config.json and tensor shapes alone."""

from collections.abc import Mapping
from typing import Any

from mbq.artifacts.checkpoint import block_prefix, find_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.spec import RunSpec

# Dense decoders whose block is attention and an MLP of linears, with rotary positions.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# As safetensors names them.
DTYPES = ("F16", "BF16", "F32")
# What configs that do not say mean, by architecture; LLaMA and what is null mean all heads.
_KEY_VALUE_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_HEAD_DIMENSIONS = {"qwen3": 128}


def check_source(source: Source, spec: RunSpec) -> None:
    """Refuse what cannot be quantized, from config.json and tensor shapes alone.

    Raises:
        InputError: an unsupported architecture, a mixture of experts, weights that are no floating
            point numbers of 16 or 32 bits, or a group size that does not divide a layer.
    """
    if "quantization_config" in source.config:
        raise InputError(
            f"model.source: {source.location} is quantized already; give the original weights"
        )
    kind = source.config["model_type"]
    experts = [key for key in source.config if "expert" in key]
    if experts or "moe" in kind or kind == "mixtral":
        raise InputError(
            f"model.source: {source.location} is a mixture of experts ({kind}); only dense models "
            "are supported, because experts are not linears and would stay unquantized"
        )
    if kind not in ARCHITECTURES:
        raise InputError(
            f"model.source: model_type {kind} is not supported; use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    for name, entry in source.tensors.items():
        if entry.dtype not in DTYPES:
            raise InputError(
                f"model.source: {source.location} stores {name} as {entry.dtype}; only "
                f"{', '.join(DTYPES)} are read: convert the model"
            )
    linears = find_linears(source.tensors)
    blocks = {linear.block for linear in linears}
    if blocks != set(range(len(blocks))) or len(blocks) != source.config["num_hidden_layers"]:
        raise InputError(
            f"model.source: config.json promises {source.config['num_hidden_layers']} blocks, the "
            f"weights hold {len(blocks)}; fetch the model again"
        )
    _check_shapes(source)
    for linear in linears:
        if linear.in_features % spec.group_size:
            fitting = [g for g in (256, 128, 64, 32) if not linear.in_features % g]
            raise InputError(
                f"group_size: {spec.group_size} does not divide the {linear.in_features} inputs of "
                f"{linear.name}; use {fitting[0] if fitting else 'another model: none does'}"
            )
    longest = source.config.get("max_position_embeddings")
    for field in ("calibration", "evaluation"):
        text = getattr(spec, field)
        if isinstance(longest, int) and text is not None and text.sequence_length > longest:
            raise InputError(
                f"{field}.sequence_length: {text.sequence_length} is more than the model's "
                f"{longest} positions; use at most {longest}"
            )


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that a model's config.json promises, but for a head of its own.

    Raises:
        InputError: a size is no positive number.
    """
    kind = config["model_type"]
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    head = _size(config, "head_dim", _HEAD_DIMENSIONS.get(kind, hidden // heads))
    key_value = heads
    if config.get("num_key_value_heads", 0) is not None:
        key_value = _size(config, "num_key_value_heads", _KEY_VALUE_HEADS.get(kind, heads))
    inner = _size(config, "intermediate_size")
    attention = {
        "q_proj": (heads * head, hidden),
        "k_proj": (key_value * head, hidden),
        "v_proj": (key_value * head, hidden),
        "o_proj": (hidden, heads * head),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    biased = set()
    if kind == "qwen2":
        biased = {"q_proj", "k_proj", "v_proj"}
    if config.get("attention_bias") and kind in ("llama", "qwen3"):
        biased |= set(attention)
    if config.get("mlp_bias") and kind == "llama":
        biased |= set(mlp)
    for part, linears in (("self_attn", attention), ("mlp", mlp)):
        for name, shape in linears.items():
            block[f"{part}.{name}.weight"] = shape
            if name in biased:
                block[f"{part}.{name}.bias"] = shape[:1]
    if kind == "qwen3":
        block |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    whole = {
        "model.embed_tokens.weight": (_size(config, "vocab_size"), hidden),
        "model.norm.weight": (hidden,),
    }
    blocks = range(_size(config, "num_hidden_layers"))
    return whole | {block_prefix(i) + name: shape for i in blocks for name, shape in block.items()}


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    size = config.get(name)
    size = default if size is None else size
    if not isinstance(size, int) or size < 1:
        raise InputError(f"model.source: {name} is {size!r}; fetch config.json again")
    return size


def _check_shapes(source: Source) -> None:
    """Hold config.json against the weights, where a mistake would surface only in a task."""
    promised = expected_shapes(source.config)
    found = {name: entry.shape for name, entry in source.tensors.items()}
    for name, shape in promised.items():
        if found.get(name) != shape:
            raise InputError(
                f"model.source: config.json promises {list(shape)} for {name}, the weights hold "
                f"{list(found[name]) if name in found else 'none'}; fetch the model again"
            )
    head = found.get("lm_head.weight", promised["model.embed_tokens.weight"])
    if head != promised["model.embed_tokens.weight"]:
        raise InputError(
            f"model.source: lm_head.weight is {list(head)}, other than the embeddings; fetch the "
            "model again"
        )
    for name in found:
        if name.startswith("model.layers.") and name not in promised:
            raise InputError(
                f"model.source: the weights hold {name}, which config.json does not promise; fetch "
                "the model again"
            )
