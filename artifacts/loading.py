"""Load a packed checkpoint as an ordinary transformers model.

    model = load_model("./llama2-13b-mbq", average_bits=3.2)
    model.set_average_bits(2.5)              # from the next forward pass on, nothing is reloaded
    model.set_bits(4)                        # every token alike
    model.realised_bits()                    # what was read since the width was last set
    model.set_policy(lambda: bits_now())     # asked before every `generate`

Importing this module registers the quantization method `mbq`, so that
`AutoModelForCausalLM.from_pretrained` also works. Transformers discovers no plug-ins: without this
import it would load such a checkpoint with random linears, which is why `load_model` exists.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
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

from mbq.artifacts.checkpoint import PACKING, QUANT_METHOD, RouterShape
from mbq.artifacts.config import check_quantization, stored_quantization
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError
from mbq.artifacts.spec import FORMAT_VERSION
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.router import Curve, Precision, Router
from mbq.kernels.shared_input import share_input
from mbq.kernels.widths import SLICE_BITS


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

    Raises:
        NotFoundError: the folder is not a packed checkpoint.
        CorruptError: a tensor is missing or of another kind, or the format is unknown.
        InputError: the width is not stored, two were given, or the path is a URI.
    """
    if bits is not None and average_bits is not None:
        raise InputError(f"bits {bits} and average_bits {average_bits}: give one of them")
    if "://" in str(path):
        raise InputError(f"{path} is no folder here; `mbq-cluster pull {path} DIR`, then load DIR")
    path = Path(path).expanduser()
    if not (Path(path) / "config.json").is_file():
        raise NotFoundError(f"{path} holds no config.json; give the folder of a packed checkpoint")
    stored = stored_quantization((Path(path) / "config.json").read_bytes())
    if stored is None:
        raise NotFoundError(f"{path} is not a checkpoint packed by mbq-cluster")
    check_quantization(stored)
    config = AutoConfig.from_pretrained(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, output_loading_info=True, **kwargs
        )
    except RuntimeError as error:
        raise CorruptError(f"{path} holds tensors of other shapes ({error})"[:500]) from error
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
    """`quantization_config` of a packed checkpoint; fields as `config_document` writes them."""

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
        for method in (set_bits, set_average_bits, set_policy, realised_bits):
            # Not a bound method: that could not be unpickled, being looked up before it is there.
            setattr(model, method.__name__, partial(method, model))
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


def add_routers(
    model: nn.Module,
    linears: Sequence[str],
    routers: Mapping[str, Sequence[str]],
    max_bits: int,
    shape: RouterShape,
    precision: Precision,
) -> list[str]:
    """Give every elastic linear a router, still without values.

    Args:
        linears: names of the elastic linears.
        routers: the linears that each router of a block serves, by names inside the block.
        max_bits: what the routers know; the linears may hold fewer.

    Returns the names of the routers.
    """
    names = []
    for router_name, served in routers.items():
        for leader in linears:
            if leader != served[0] and not leader.endswith(f".{served[0]}"):
                continue
            prefix = leader.removesuffix(served[0])
            group = [_elastic(model, prefix + name) for name in served]
            first = group[0]
            with torch.device(first.get_buffer("scale_zero").device):
                router = Router(
                    first.in_features, len(group), max_bits, shape.width, shape.knots, precision
                )
            parent, _, child = (prefix + router_name).rpartition(".")
            model.get_submodule(parent).add_module(child, router)
            share_input(group, router)
            names.append(prefix + router_name)
    return names


def set_bits(model: PreTrainedModel, bits: int) -> None:
    """Run every token at `bits` bits per weight from the next forward pass on.

    A step of up to 64 tokens that was captured in a CUDA graph follows.
    Also `model.set_bits(bits)`.

    Raises:
        InputError: `bits` is not a stored width.
    """
    try:
        elastic_linears(model)[0].precision.set_bits(bits)
    except ValueError as error:
        raise InputError(str(error)) from error
    _start_over(model)


def set_average_bits(model: PreTrainedModel, average_bits: float) -> None:
    """Share `average_bits` bits per weight over tokens and linears from the next forward pass on.

    Code bits, averaged over tokens and weights; text unlike the calibration text may get more or
    less (`realised_bits` tells). Nothing is loaded or allocated. A step of up to 64 tokens that was
    captured in a CUDA graph follows. Also `model.set_average_bits(average_bits)`.

    Raises:
        InputError: the width is not between 2 bits and the highest one stored.
    """
    precision = elastic_linears(model)[0].precision
    try:
        precision.set_average_bits(average_bits, _curve(model, precision))
    except ValueError as error:
        raise InputError(str(error)) from error
    except TypeError as error:
        raise InputError(f"average bits {average_bits!r} must be a number") from error
    _start_over(model)


def realised_bits(model: PreTrainedModel) -> float:
    """Code bits per weight that were read since the width was last set.

    Averaged over weights and over all tokens that passed, padding included. Also
    `model.realised_bits()`.

    Raises:
        InputError: none has passed.
    """
    linears = elastic_linears(model)
    passed = sum(linear.tokens * linear.weights for linear in linears)
    if not passed:
        raise InputError("no token has been processed since the width was last set")
    read = sum(linear.bits_read * linear.weights for linear in linears)
    return read / passed


def set_policy(model: PreTrainedModel, policy: Callable[[], float] | None) -> None:
    """Ask `policy` for the average bits before every `generate`, that is, between requests.

    Also `model.set_policy(policy)`. With None the width stays as it is. What the policy raises, and
    InputError where its answer is no width of the model, comes out of `generate`.
    """
    model.__dict__.pop("generate", None)
    if policy is None:
        return

    # Of the model, so that a copy asks for itself.
    model.__dict__["generate"] = partial(_generate_as_told, model, policy)


def elastic_linears(model: nn.Module) -> list[ElasticLinear]:
    """The elastic linears of a model or block, in order."""
    return [module for module in model.modules() if isinstance(module, ElasticLinear)]


def _start_over(model: nn.Module) -> None:
    """A new width: captured graphs are told, and counting begins again."""
    for module in model.modules():
        if isinstance(module, Router):
            module.refresh()
        elif isinstance(module, ElasticLinear):
            module.reset_tally()
            module.shared.release()


def _generate_as_told(model: Any, policy: Callable[[], float], *args: Any, **kwargs: Any) -> Any:
    set_average_bits(model, policy())
    return type(model).generate(model, *args, **kwargs)


def _elastic(model: nn.Module, name: str) -> ElasticLinear:
    linear = model.get_submodule(name)
    assert isinstance(linear, ElasticLinear)
    return linear


def _curve(model: PreTrainedModel, precision: Precision) -> Curve:
    """The budget curve of the loaded ceiling."""
    config = model.config.quantization_config
    routing = config["routing"] if isinstance(config, dict) else config.routing
    ceiling = precision.max_bits
    if ceiling == SLICE_BITS:
        return Curve((float(SLICE_BITS),), (0.0,))
    try:
        stored = routing["curves"][str(ceiling)]
        return Curve(tuple(stored["average_bits"]), tuple(stored["log_thresholds"]))
    except (KeyError, TypeError) as error:
        raise CorruptError(
            f"the checkpoint has no thresholds for {ceiling} bits: its config.json is incomplete; "
            "fetch it again"
        ) from error


def _require_tensors(model: nn.Module, names: list[str], files: list[str]) -> None:
    """Transformers only warns about missing tensors and runs on uninitialised memory."""
    # A Hub's cache links to files elsewhere; an index must not.
    folders = {Path(file).resolve().parent for file in files if not Path(file).is_symlink()}
    if len(folders) > 1:
        raise CorruptError("the index names files outside of its folder; fetch it again")
    wanted = {
        f"{name}.{key}": buffer
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
