"""How many bits a loaded model reads: set, shared, asked before every `generate`, read back.

The functions are also methods of the models that `loading.load_model` returns. The width belongs to
the model, not to a request: linears look it up whenever they are called, in whatever thread.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mbq.artifacts.config import StoredCurve, check_quantization
from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.errors import InputError
from mbq.artifacts.methods import Method
from mbq.kernels.precision import Curve
from mbq.kernels.router import Router, refresh

# Where a model keeps its policy.
_POLICY = "_average_bits_policy"


def set_bits(model: PreTrainedModel, bits: int) -> None:
    """Run every token at `bits` bits per weight from the next forward pass on.

    A step that was captured in a CUDA graph follows. Also `model.set_bits(bits)`.

    Raises:
        InputError: `bits` is not a stored width.
    """
    try:
        elastic_linears(model)[0].precision.set_bits(bits)
    except ValueError as error:
        raise InputError(str(error)) from error
    start_over(model)


def set_average_bits(model: PreTrainedModel, average_bits: float) -> None:
    """Share `average_bits` bits per weight over tokens and linears from the next forward pass on.

    Code bits, averaged over tokens and weights. A whole width, 2, 3, 4, 6 or 8, all of them get; an
    average between two is a mix of these, and text unlike the calibration text may get more or
    less (`realised_bits` tells). Nothing is loaded or allocated. A step that was captured in a CUDA
    graph follows. Also `model.set_average_bits(average_bits)`.

    Raises:
        InputError: the width is not between 2 bits and the highest one stored.
    """
    precision = elastic_linears(model)[0].precision
    try:
        precision.set_average_bits(average_bits, _curves(model))
    except ValueError as error:
        raise InputError(str(error)) from error
    except TypeError as error:
        raise InputError(f"average bits {average_bits!r} must be a number") from error
    start_over(model)


def realised_bits(model: PreTrainedModel) -> float:
    """Code bits per weight that were read since the width was last set.

    Averaged over weights and over all tokens that passed, padding included. Also
    `model.realised_bits()`.

    Raises:
        InputError: none has passed.
    """
    passed = read = 0
    for linear in elastic_linears(model):
        tokens, bits_read = linear.tally
        passed += tokens * linear.weights
        read += bits_read * linear.weights
    if not passed:
        raise InputError("no token has been processed since the width was last set")
    return read / passed


def set_policy(model: PreTrainedModel, policy: Callable[[], float] | None) -> None:
    """Ask `policy` for the average bits before every `generate`, that is, between requests.

    Also `model.set_policy(policy)`. With None the width stays as it is. What the policy raises, and
    InputError where its answer is no width of the model, comes out of `generate`. Other ways to
    generate, as `generate_batch`, do not ask.

    Raises:
        InputError: `policy` cannot be called.
    """
    if policy is not None and not callable(policy):
        raise InputError(f"policy {policy!r} must be a function that returns average bits, or None")
    held = model.__dict__
    outer = held.get("generate")
    if isinstance(outer, Method):
        asker = outer.given[0]
    else:
        # Around what a user put there, which may be around one of these: only the last one asks.
        asker = held.get(_POLICY, (0, None))[0] + 1
        # Of the model, so that a copy asks for itself.
        held["generate"] = Method(_generate_as_told, model, asker, outer)
    held[_POLICY] = asker, policy


def as_curves(stored: Mapping[int, StoredCurve]) -> dict[int, Curve]:
    """Stored curves as a model's precision takes them."""
    return {upper: Curve(one.average_bits, one.log_thresholds) for upper, one in stored.items()}


def start_over(model: nn.Module) -> None:
    """A new width: captured graphs are told, and counting begins again."""
    refresh(module for module in model.modules() if isinstance(module, Router))
    for linear in elastic_linears(model):
        linear.reset_tally()
        linear.shared.release()


def _generate_as_told(
    model: Any, asker: int, generate: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    last, policy = model.__dict__[_POLICY]
    if policy is not None and asker == last:
        set_average_bits(model, policy())
    if generate is None:
        return type(model).generate(model, *args, **kwargs)
    return generate(*args, **kwargs)


def _curves(model: PreTrainedModel) -> dict[int, Curve]:
    """Thresholds as the model's config has them."""
    config = model.config.quantization_config
    routing = check_quantization(config if isinstance(config, dict) else vars(config)).routing
    return as_curves(routing.curves) if routing else {}
