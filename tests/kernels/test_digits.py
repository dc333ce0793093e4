"""The run-time layout: known words, round trips of odd shapes, and what is padded."""

from dataclasses import replace

import pytest
import torch

from mbq.kernels.digits import Digits, join_digits, pack_digits, part_of, unpack_digits
from mbq.kernels.quantize import pack_pair, unpack_pair
from mbq.kernels.widths import SLICE_BITS, widths_up_to
from tests.support.weights import exponents


def _pack(code_NK: torch.Tensor, group_size: int, slices: int = 4) -> Digits:
    rows, inputs = code_NK.shape
    pair_NG = pack_pair(*torch.rand(2, rows, inputs // group_size))
    widths = len(widths_up_to(slices * SLICE_BITS))
    gain_bias_WN = pack_pair(*torch.rand(2, widths, rows))
    return pack_digits(code_NK, exponents(inputs), pair_NG, gain_bias_WN, slices)


def test_words_of_known_codes() -> None:
    code = torch.zeros(2, 256, dtype=torch.uint8)
    code[0, 0] = 0b11_00_00_00  # input 0: position 0 of word 0
    code[1, 37] = 0b00_00_00_01  # input 32 + 5: position 4 of word 5
    code[1, 70] = 0b01_00_00_00  # input 64 + 6: position 1 of word 6
    code[1, 255] = 0b10_00_00_00  # input 224 + 16 + 15: position 7 of word 15, in the sign
    digits = _pack(code, 128).digits_SHBN16
    assert digits.shape == (4, 2, 1, 128, 16)
    assert digits[0, 0, 0, 0, 0] == 3
    assert digits[3, 0, 0, 1, 5] == 1 << 8
    assert digits[0, 0, 0, 1, 6] == 1 << 2
    assert digits[0, 1, 0, 1, 15] == -(2**15)
    assert digits.count_nonzero() == 4


def test_the_second_slice_has_its_high_and_its_low_bits_apart() -> None:
    code = torch.zeros(2, 256, dtype=torch.uint8)
    code[0, 0] = 0b00_11_00_00  # input 0: position 0 of word 0
    code[0, 16] = 0b00_10_00_00  # 16 on, the other bits of the same word
    code[1, 255] = 0b00_01_00_00  # input 224 + 16 + 15: position 7 of word 15
    high, low = _pack(code, 128).digits_SHBN16[1, :, 0]
    assert high[0, 0] == 0b11
    assert low[0, 0] == 0b01
    assert high[1, 15] == 0
    assert low[1, 15] == -(2**15)
    assert high.count_nonzero() + low.count_nonzero() == 3


@pytest.mark.parametrize(
    ("rows", "inputs", "group_size"), [(1, 128, 128), (70, 384, 32), (200, 768, 64), (3, 512, 256)]
)
def test_codes_come_back(rows: int, inputs: int, group_size: int) -> None:
    code = torch.randint(0, 256, (rows, inputs), dtype=torch.uint8)
    packed = _pack(code, group_size)
    assert torch.equal(unpack_digits(packed), code)


@pytest.mark.parametrize(("slices", "widths"), [(1, 1), (2, 3), (3, 4)])
def test_fewer_slices_are_a_prefix(slices: int, widths: int) -> None:
    code = torch.randint(0, 256, (5, 256), dtype=torch.uint8)
    few, all_ = _pack(code, 128, slices), _pack(code, 128)
    assert torch.equal(few.digits_SHBN16, all_.digits_SHBN16[:slices])
    assert few.gain_bias_WN.shape == (widths, 128)
    kept = 0xFF << (8 - 2 * slices) & 0xFF
    assert torch.equal(unpack_digits(few), code & kept)


def test_gains_of_all_widths_lie_in_padded_rows() -> None:
    gain_bias = pack_pair(*torch.rand(2, 5, 130))
    codes, pairs = torch.zeros(130, 256, dtype=torch.uint8), pack_pair(*torch.rand(2, 130, 2))
    packed = pack_digits(codes, exponents(256), pairs, gain_bias, 4)
    assert packed.gain_bias_WN.shape == (5, 256)
    assert torch.equal(packed.gain_bias_WN[:, :130], gain_bias)


def test_padding_has_scale_zero() -> None:
    packed = _pack(torch.full((3, 128), 255, dtype=torch.uint8), 128)
    scale, _ = unpack_pair(packed.scale_zero_GN)
    assert scale.shape == (2, 128)
    assert (scale[0, :3] > 0).all()
    assert not scale[1].any()
    assert not scale[:, 3:].any()


def test_joined_linears_come_back_one_by_one() -> None:
    codes = [torch.randint(0, 256, (rows, 384), dtype=torch.uint8) for rows in (70, 256, 1)]
    alone = [_pack(code, 128) for code in codes]
    joined = join_digits(alone)
    assert joined.starts == (0, 128, 384, 512)
    for number, code in enumerate(codes):
        part = part_of(joined, number)
        assert part.digits_SHBN16.untyped_storage().data_ptr() == joined.digits_SHBN16.data_ptr()
        assert torch.equal(unpack_digits(part), code)
        assert torch.equal(part.scale_zero_GN, alone[number].scale_zero_GN)
        assert torch.equal(part.gain_bias_WN, alone[number].gain_bias_WN)


def test_linears_of_one_input_scale_its_columns_alike() -> None:
    one = _pack(torch.zeros(4, 256, dtype=torch.uint8), 128)
    other = replace(one, power_K=2 * one.power_K)
    assert torch.equal(join_digits([one, one]).power_K, one.power_K)
    with pytest.raises(ValueError, match="must have the same exponents"):
        join_digits([one, other])


def test_a_group_that_straddles_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="group size 96 must be one of"):
        _pack(torch.zeros(4, 192, dtype=torch.uint8), 96)
