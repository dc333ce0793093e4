"""Hidden states between tasks: exact, without copies where none is needed."""

import numpy as np
import pytest
import torch

from mbq.workers.capture import from_array, to_array


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arrays_round_trip_bit_for_bit(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 7).to(dtype)
    array = to_array(hidden)
    assert array.dtype == (np.uint16 if dtype == torch.bfloat16 else np.float32)
    back = from_array(array, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, hidden)


def test_shares_read_only_memory_without_a_copy_or_a_warning(
    recwarn: pytest.WarningsRecorder,
) -> None:
    array = to_array(torch.randn(4, 4))
    array.setflags(write=False)
    assert from_array(array, torch.float32).data_ptr() == array.ctypes.data
    assert not recwarn.list
