"""What tests of kernels share."""

import math

import pytest
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `new_empty` allocates and nobody writes is NaN."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        made: Tensor = new_empty(self, *args, **kwargs)  # type: ignore[arg-type]
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
