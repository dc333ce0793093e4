"""Refuse what cannot be quantized, from config.json and tensor shapes alone."""

from mbq.artifacts.checkpoint import BLOCKS_PREFIX, find_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.spec import RunSpec

# Dense decoders of blocks that a test holds to be exactly transformers' model when run one by one.
ARCHITECTURES = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
# As safetensors names them.
DTYPES = ("F16", "BF16", "F32")


def check_source(source: Source, spec: RunSpec) -> None:
    """Refuse what cannot be quantized, from config.json and tensor shapes alone.

    Raises:
        InputError: an unsupported architecture, a mixture of experts, weights that are no floating
            point numbers of 16 or 32 bits or of another model than config.json describes, or a
            group size that does not divide a layer.
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
    longest = source.config.get("max_position_embeddings")
    for field in ("calibration", "evaluation"):
        text = getattr(spec, field)
        if isinstance(longest, int) and text is not None and text.sequence_length > longest:
            raise InputError(
                f"{field}.sequence_length: {text.sequence_length} is more than the model's "
                f"{longest} positions; use at most {longest}"
            )
    _check_promise(source, {linear.name for linear in linears})
    for linear in linears:
        if linear.in_features % spec.group_size:
            fitting = [g for g in (256, 128, 64, 32) if not linear.in_features % g]
            raise InputError(
                f"group_size: {spec.group_size} does not divide the {linear.in_features} inputs of "
                f"{linear.name}; use {fitting[0] if fitting else 'another model: none does'}"
            )


def _check_promise(source: Source, matrices: set[str]) -> None:
    """Hold config.json against the weights, where a mistake would surface only in a task."""
    # Imports transformers, which takes seconds.
    from mbq.workers.model import promise_of

    promise = promise_of(source)
    promised = dict(promise.shapes)
    found = {name: entry.shape for name, entry in source.tensors.items()}
    if promise.tied and "lm_head.weight" not in found:
        del promised["lm_head.weight"]
    for name, shape in promised.items():
        if found.get(name) != shape:
            raise InputError(
                f"model.source: config.json promises {list(shape)} for {name}, the weights hold "
                f"{list(found[name]) if name in found else 'none'}; fetch the model again"
            )
    for name in found:
        if name.startswith(BLOCKS_PREFIX) and name not in promised:
            raise InputError(
                f"model.source: the weights hold {name}, which config.json does not promise; fetch "
                "the model again"
            )
    if others := sorted(matrices - promise.linears):
        raise InputError(
            f"model.source: {others[0]} is a matrix but no linear; only linears can be quantized: "
            "use another model"
        )
