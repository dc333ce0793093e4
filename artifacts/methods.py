"""Functions of a loaded model as attributes of it, that do not keep it in memory."""

import weakref
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from mbq.artifacts.errors import InputError


class Method:
    """A function that is called with its model, which it does not keep.

    So a model goes with its last user, and does not wait for cycles to be collected. A bound method
    would keep it, and could not be unpickled, being looked up before it is there. Called after its
    model is gone, as in `load_model(path).set_bits(4)`, it raises InputError.
    """

    def __init__(self, function: Callable[..., Any], model: PreTrainedModel, *given: Any) -> None:
        self._function = function
        self._model = weakref.ref(model)
        self.given = given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if model is None:
            raise InputError("the model is gone: keep it in a variable while its methods are used")
        return self._function(model, *self.given, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Method, (self._function, self._model(), *self.given)
