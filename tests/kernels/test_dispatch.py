"""Which kernel, and how it is cut."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbq.kernels import dispatch
from mbq.kernels.digits import ROW_MULTIPLE

FOLDER = Path(dispatch.__file__).parent


@pytest.mark.parametrize(("rows", "blocks"), [(128, 1), (4096, 16), (11008, 43), (128256, 16)])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_the_rule_of_thumb_leaves_work_for_every_program(
    rows: int, blocks: int, width: int
) -> None:
    tile = dispatch.default_tile(rows, blocks, width)
    assert rows % tile.rows == 0
    assert 1 <= tile.split <= blocks


def test_shipped_tiles_fit_their_shapes() -> None:
    files = list(FOLDER.glob("tiles_sm*.json"))
    assert files
    for file in files:
        for shape, by_width in json.loads(file.read_text(encoding="utf-8")).items():
            rows, inputs = map(int, shape.split(" x "))
            assert rows % ROW_MULTIPLE == 0
            for tile, split, warps, stages in by_width.values():
                assert rows % tile == 0
                assert split * 256 <= inputs
                assert warps in (1, 2, 4, 8)
                assert stages >= 1


def test_on_a_cpu_weights_are_dequantized() -> None:
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    assert not dispatch.decodes(x, 1, 128, 2)


@pytest.mark.parametrize(
    ("bits", "most"), [(2, 48), (3, 24), (4, 24), (6, 16), (8, 12), (None, 64)]
)
def test_few_enough_tokens_on_a_gpu_are_decoded(bits: int | None, most: int) -> None:
    with FakeTensorMode():
        x = torch.empty(1, 256, dtype=torch.bfloat16, device="cuda")
    assert dispatch.decodes(x, most, 128, bits)
    assert not dispatch.decodes(x, most + 1, 128, bits)
