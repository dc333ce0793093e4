"""What tests of kernels share."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.emulated import Compiler


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` allocates and nobody writes is NaN, or the largest integer."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made: Tensor = new_empty(self, *args, **kwargs)  # type: ignore[arg-type]
        worst = math.nan if made.is_floating_point() else torch.iinfo(made.dtype).max
        return made.fill_(worst)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(scope="session")
def compiler() -> Iterator[Compiler]:
    """Of kernels that are run as compiled."""
    with Compiler() as compiler:
        yield compiler
