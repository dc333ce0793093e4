"""Refuse what cannot be quantized, from config.json and tensor shapes alone."""

from mbq.artifacts.checkpoint import find_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.spec import RunSpec

# Dense decoders whose block is attention and an MLP of linears, with rotary positions.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# As safetensors names them.
DTYPES = ("F16", "BF16", "F32")


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


def _check_shapes(source: Source) -> None:
    """Hold config.json against the weights, where a mistake would surface only in a task."""
    config = source.config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"model.source: num_attention_heads is {heads!r}; fetch config.json again")
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.layers.0.self_attn.q_proj.weight": (width, config["hidden_size"]),
    }
    for name, shape in expected.items():
        entry = source.tensors.get(name)
        if entry is None or entry.shape != shape:
            raise InputError(
                f"model.source: config.json promises {list(shape)} for {name}, the weights hold "
                f"{list(entry.shape) if entry else 'none'}; fetch the model again"
            )
