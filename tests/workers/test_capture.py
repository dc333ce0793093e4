"""Hidden states between tasks: exact, without copies where none is needed."""

from typing import Any

import numpy as np
import pytest
import torch

from mbq.kernels.precision import Precision
from mbq.workers.capture import first_hidden, from_array, run_block, to_array
from mbq.workers.opened import Opened, RunRef


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


def test_every_stream_runs_at_its_own_width(finished_run: Any) -> None:
    opened = Opened(RunRef(finished_run.store.uri, finished_run.document.run, "cpu"))
    model, precision = opened.model, Precision(8)
    ids = opened.tokens(opened.document.calibration_tokens)[:3]
    hidden = first_hidden(model, ids, (2, 3, 4))
    assert set(hidden) == {"full", "2", "3", "4"}
    block = opened.elastic_block(1, precision)
    out = run_block(model, 1, hidden, 2, (block, precision))
    embedded = model.embed(ids)
    with torch.no_grad():
        expected = {"full": model.run(model.block(1), 1, embedded)}
        for bits in (2, 3, 4):
            precision.set_bits(bits)
            expected[str(bits)] = model.run(block, 1, embedded)
    assert set(out) == set(expected)
    for name, value in expected.items():
        found = from_array(out[name], torch.float32)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert not np.allclose(out["3"], out["2"], atol=1e-3)
    assert not np.allclose(out["3"], out["4"], atol=1e-3)
