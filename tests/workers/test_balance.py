"""Exponents of columns: known ones, those of several linears at once, and none where it is even."""

import torch

from mbq.workers.balance import column_exponents


def _weight(factor_K: list[float], rows: int = 64) -> torch.Tensor:
    """Columns of the same size, times factors."""
    generator = torch.Generator().manual_seed(1)
    sign_NK = torch.randint(0, 2, (rows, len(factor_K)), generator=generator) * 2.0 - 1.0
    return 0.05 * sign_NK * torch.tensor(factor_K)


def test_the_nearest_power_of_two_beside_the_median() -> None:
    factors = [1.0, 1.0, 30.0, 1.3, 1.5, 1 / 9, 1.0]
    assert column_exponents([_weight(factors)]).tolist() == [0, 0, 5, 0, 1, -3, 0]
    assert column_exponents([1000 * _weight(factors)]).tolist() == [0, 0, 5, 0, 1, -3, 0]


def test_columns_within_a_factor_of_two_stay_as_they_are() -> None:
    assert not column_exponents([_weight([1.0, 1.9, 0.55, 1.0, 1.0])]).any()


def test_linears_of_one_input_count_alike() -> None:
    small, large = _weight([1.0, 1.0, 16.0]), 100 * _weight([1.0, 1.0, 1.0])
    assert column_exponents([small]).tolist() == [0, 0, 4]
    assert column_exponents([small, large]).tolist() == [0, 0, 2]
    # One of zeros says nothing.
    assert column_exponents([small, torch.zeros(3, 3)]).tolist() == [0, 0, 4]


def test_zeros_are_read_as_next_to_nothing() -> None:
    assert column_exponents([_weight([1.0, 0.0, 0.0, 0.0])]).tolist() == [0, -12, -12, -12]
    assert not column_exponents([torch.zeros(4, 6)]).any()


def test_weights_too_small_for_their_scales_are_brought_up() -> None:
    # 0.05 times 2^-10 is 2^-14.3: 2^6 below what float16 scales resolve.
    tiny = _weight([1.0] * 4) * 2.0**-10
    assert column_exponents([tiny]).tolist() == [-6] * 4
    # Not so far that another linear's scales overflow: 0.05 is 2^8 below 16.
    assert column_exponents([_weight([1.0] * 4), tiny * 2.0**-16]).tolist() == [-8] * 4
