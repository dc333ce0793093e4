"""Load a packed checkpoint as an ordinary transformers model.

    model = load_model("./llama2-13b-mbq", bits=4)
    model.set_bits(2)                        # from the next forward pass on, nothing is reloaded

Importing this module registers the quantization method `mbq`, so that
`AutoModelForCausalLM.from_pretrained` also works. Transformers discovers no plug-ins: without this
import it would load such a checkpoint with random linears, which is why `load_model` exists.
"""

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mbq.artifacts.checkpoint import PACKING, QUANT_METHOD
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError
from mbq.artifacts.spec import FORMAT_VERSION, SLICE_BITS
from mbq.kernels.linear import ElasticLinear, Precision


def load_model(path: str | Path, bits: int | None = None, **kwargs: Any) -> PreTrainedModel:
    """Load a packed checkpoint from a local folder.

    Args:
        bits: width to start at; default: the highest stored. `model.set_bits(bits)` changes it.
        kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        NotFoundError: the folder is not a packed checkpoint.
        CorruptError: a tensor is missing or the format is unknown.
        InputError: `bits` is not a stored width.
    """
    if not (Path(path) / "config.json").is_file():
        raise NotFoundError(f"{path} holds no config.json; give the folder of a packed checkpoint")
    config = AutoConfig.from_pretrained(path)
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != QUANT_METHOD:
        raise NotFoundError(f"{path} is not a checkpoint packed by mbq-cluster")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    if bits is not None:
        set_bits(model, bits)
    return model


class MbqConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; fields as `config_document` writes them."""

    def __init__(
        self,
        max_bits: int,
        group_size: int,
        linears: list[str],
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
        if (format_version, packing) != (FORMAT_VERSION, PACKING):
            raise CorruptError(
                f"the checkpoint has format {format_version} with packing {packing}, this program "
                f"reads {FORMAT_VERSION} with {PACKING}; install the version that wrote it"
            )


class MbqQuantizer(HfQuantizer):
    """Swaps the block's linears for elastic ones before transformers fills in the weights."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, MbqConfig)
        precision = Precision(config.max_bits // SLICE_BITS)
        names = replace_linears(model, config.linears, config.group_size, precision)
        _require_tensors(model, names, checkpoint_files or [])

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        model.set_bits = MethodType(set_bits, model)  # type: ignore[assignment]
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_linears(
    model: nn.Module, endings: list[str], group_size: int, precision: Precision
) -> list[str]:
    """Put elastic linears, still without codes, where a linear's name ends in one of `endings`.

    Returns the names of the linears that were replaced.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(name == ending or name.endswith(f".{ending}") for ending in endings)
    ]
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        with torch.device(old.weight.device):
            new = ElasticLinear(old.in_features, old.out_features, group_size, precision, old.bias)
        model.set_submodule(name, new)
    return names


def set_bits(model: PreTrainedModel, bits: int) -> None:
    """Run at `bits` bits per weight from the next forward pass on; also `model.set_bits(bits)`.

    Raises:
        InputError: `bits` is not a stored width.
    """
    elastic = next(module for module in model.modules() if isinstance(module, ElasticLinear))
    try:
        elastic.precision.set_bits(bits)
    except ValueError as error:
        raise InputError(str(error)) from error


def _require_tensors(model: nn.Module, names: list[str], files: list[str]) -> None:
    """Transformers only warns about missing tensors and runs on uninitialised memory."""
    present: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                present.update(opened.keys())
        except SafetensorError as error:
            raise CorruptError(f"{file} is damaged ({error}); fetch it again") from error
    for name in names:
        for key in model.get_submodule(name).state_dict():
            if f"{name}.{key}" not in present:
                raise CorruptError(
                    f"the checkpoint has no {name}.{key}: a file is missing or belongs to another "
                    "checkpoint; fetch it again"
                )


def _register() -> None:
    # Registering a name twice is an error, and modules are imported anew in some workers.
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(MbqConfig)
        register_quantizer(QUANT_METHOD)(MbqQuantizer)


_register()
