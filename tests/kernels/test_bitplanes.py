"""The published layout: a worked example, round trips, and what is refused."""

import pytest
import torch

from mbq.kernels.bitplanes import pack_planes, unpack_planes


def test_example_of_the_header() -> None:
    code = torch.zeros(1, 32, dtype=torch.uint8)
    code[0, 1], code[0, 2] = 128, 64
    planes = pack_planes(code)
    assert planes.dtype == torch.int32
    assert planes[:, 0, 0].tolist() == [0b010, 0b100, 0, 0, 0, 0, 0, 0]


def test_last_input_of_a_word_is_its_sign_bit() -> None:
    code = torch.zeros(1, 64, dtype=torch.uint8)
    code[0, 63] = 1
    planes = pack_planes(code)
    assert planes[7, 0].tolist() == [0, -(2**31)]
    assert not planes[:7].any()


@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (17, 1056)])
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_first_planes_are_the_top_bits(shape: tuple[int, int], count: int) -> None:
    code = torch.randint(0, 256, shape, dtype=torch.uint8)
    back = unpack_planes(list(pack_planes(code)[:count]))
    assert torch.equal(back, code & (0xFF << (8 - count) & 0xFF))


def test_unpacks_planes_that_are_not_contiguous() -> None:
    code = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    planes = [plane.T.contiguous().T for plane in pack_planes(code)]
    assert torch.equal(unpack_planes(planes), code)


def test_refuses_inputs_that_fill_no_word() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not a multiple of 32"):
        pack_planes(torch.zeros(2, 40, dtype=torch.uint8))
