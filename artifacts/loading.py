"""Load a packed checkpoint as an ordinary transformers model.

    model = load_model("./llama2-13b-mbq", average_bits=3.2)
    model.set_average_bits(2.5)              # from the next forward pass on, nothing is reloaded
    model.set_bits(4)                        # every token alike
    model.realised_bits()                    # what was read since the width was last set
    model.set_policy(lambda: bits_now())     # asked before every `generate`
    model.warm_up()                          # on a GPU, before the first request or a capture

Importing this module registers the quantization method `mbq`, so that
`AutoModelForCausalLM.from_pretrained` also works. Transformers discovers no plug-ins: without this
import it would load such a checkpoint with random linears, which is why `load_model` exists.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mbq.artifacts.checkpoint import PACKING, QUANT_METHOD, RouterShape
from mbq.artifacts.config import check_quantization, folder_quantization
from mbq.artifacts.elastic import add_routers, replace_linears
from mbq.artifacts.errors import CorruptError, InputError, first_line
from mbq.artifacts.methods import Method
from mbq.artifacts.precision import realised_bits, set_average_bits, set_bits, set_policy
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.artifacts.warming import warm_up
from mbq.kernels.precision import Precision


def load_model(
    path: str | Path,
    bits: int | None = None,
    average_bits: float | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a packed checkpoint from a local folder.

    Args:
        bits: width of every token to start at; default: the highest stored.
        average_bits: average width to start at, instead; see `set_average_bits`.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    What torch raises, as where memory is short, is raised as it is.

    Raises:
        NotFoundError: the folder is not a packed checkpoint.
        CorruptError: a file or a tensor is missing or of another kind, or the format is unknown.
        StoreError: config.json cannot be read.
        InputError: the width is not stored, two were given, or the path is a URI.
    """
    if bits is not None and average_bits is not None:
        raise InputError(f"bits {bits} and average_bits {average_bits}: give one of them")
    if "://" in str(path):
        raise InputError(f"{path} is no folder here; `mbq-cluster pull {path} DIR`, then load DIR")
    path = Path(path).expanduser()
    folder_quantization(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        # How transformers says it; others are no fault of the files, as memory that is short.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise CorruptError(f"{path} holds tensors of other shapes ({error})"[:500]) from error
    except OSError as error:
        raise CorruptError(
            f"{path} cannot be read ({first_line(error)}); if a file is missing or damaged, fetch "
            "it again"
        ) from error
    model: PreTrainedModel = loaded[0]
    if loaded[1]["missing_keys"]:
        missing = ", ".join(sorted(loaded[1]["missing_keys"]))
        raise CorruptError(f"{path} lacks {missing:.500}; fetch it again")
    if bits is not None:
        set_bits(model, bits)
    if average_bits is not None:
        set_average_bits(model, average_bits)
    return model


class MbqConfig(QuantizationConfigMixin):
    """`quantization_config` as transformers holds it; fields are those of `config.Quantization`."""

    def __init__(
        self,
        max_bits: int,
        group_size: int,
        linears: list[str],
        routing: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        packing: str = PACKING,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        # Transformers' own methods are members of an enum; others are plain names.
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.max_bits = max_bits
        self.group_size = group_size
        self.packing = packing
        self.linears = linears
        self.routing = routing
        check_quantization(dict(vars(self)))


class MbqQuantizer(HfQuantizer):
    """Swaps the block's linears for elastic ones before transformers fills in the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, MbqConfig)
        precision = Precision(config.max_bits)
        names = replace_linears(model, config.linears, config.group_size, precision)
        if config.routing is not None:
            routing = config.routing
            shape = RouterShape(routing["width"], routing["knots"])
            names += add_routers(
                model, names, routing["routers"], routing["max_bits"], shape, precision
            )
        _require_tensors(model, names, checkpoint_files or [])

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        for method in (set_bits, set_average_bits, set_policy, realised_bits, warm_up):
            setattr(model, method.__name__, Method(method, model))
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _require_tensors(model: PreTrainedModel, names: list[str], files: list[str]) -> None:
    """Transformers only warns about missing tensors and runs on uninitialised memory."""
    # A Hub's cache links to files elsewhere; an index must not.
    folders = {Path(file).resolve().parent for file in files if not Path(file).is_symlink()}
    if len(folders) > 1:
        raise CorruptError("the index names files outside of its folder; fetch it again")
    # A model without its head has names without their first part.
    part = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    wanted = {
        f"{part}{name}.{key}": buffer
        for name in names
        for key, buffer in model.get_submodule(name).state_dict().items()
    }
    present: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    _require_kind(file, name, opened.get_slice(name), wanted.get(name))
                    present.add(name)
        except SafetensorError as error:
            raise CorruptError(f"{file} is damaged ({error}); fetch it again") from error
    for name in wanted:
        if name not in present:
            raise CorruptError(
                f"the checkpoint has no {name}: a file is missing or belongs to another "
                "checkpoint; fetch it again"
            )


def _require_kind(file: str, name: str, found: Any, buffer: torch.Tensor | None) -> None:
    """Planes are integers, and what the source stores are not: transformers would cast silently."""
    whole = found.get_dtype().startswith(("I", "U"))
    if whole != (buffer is not None and not buffer.is_floating_point()):
        raise CorruptError(f"{file} holds {name:.200} as {found.get_dtype()}; fetch it again")


def _register() -> None:
    # Registering a name twice is an error, and modules are imported anew in some workers.
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MbqConfig)
        register_quantizer(QUANT_METHOD)(MbqQuantizer)


_register()
