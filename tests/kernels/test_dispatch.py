"""Which kernel, and how it is cut."""

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mbq.kernels import dispatch
from mbq.kernels.digits import ROW_MULTIPLE, join_digits, pack_digits
from mbq.kernels.quantize import dequantize, pack_pair, unpack_pair
from mbq.kernels.widths import WIDTHS

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
    assert not dispatch.decodes(x, 1, 128)


def test_few_enough_tokens_on_a_gpu_are_decoded() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 256, dtype=torch.bfloat16, device="cuda")
    assert dispatch.decodes(x, 64, 128)
    assert not dispatch.decodes(x, 65, 128)
    assert not dispatch.decodes(x, 64, 96)


@pytest.mark.parametrize(("tokens", "bits"), [(49, 2), (24, 4), (25, 4), (17, 6), (13, 8), (64, 3)])
def test_both_kernels_give_the_product(tokens: int, bits: int) -> None:
    torch.manual_seed(tokens)
    code = torch.randint(0, 256, (70, 256), dtype=torch.uint8)
    scale_zero = pack_pair(0.5 + torch.rand(70, 2), 1.5 + torch.rand(70, 2))
    gain_bias = pack_pair(1 + torch.rand(5, 70) / 10, torch.randn(5, 70))
    weight = join_digits([pack_digits(code, scale_zero, gain_bias, 4)] * 2)
    x = torch.randn(tokens, 256).half()
    gain_WN, bias_WN = unpack_pair(gain_bias)
    row = WIDTHS.index(bits)
    weight_NK = dequantize(code, *unpack_pair(scale_zero), bits) * gain_WN[row][:, None]
    expected = x.float() @ weight_NK.T + bias_WN[row]
    for out in dispatch.decode(x, bits, 8, weight):
        torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=2e-2)
