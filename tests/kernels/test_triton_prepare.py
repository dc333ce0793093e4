"""Preparing tokens in Triton's interpreter: the router against its definition, and the tally."""

import pytest
import torch

from mbq.kernels.precision import Precision
from mbq.kernels.quantize import powers_of_two
from mbq.kernels.reference import route
from mbq.kernels.router import Gates
from mbq.kernels.triton_prepare import PreparedHalves, prepare
from mbq.kernels.widths import WIDTHS
from tests.support.routers import random_router
from tests.support.weights import exponents

pytestmark = pytest.mark.usefixtures("poisoned")

POWERS = {inputs: powers_of_two(exponents(inputs)) for inputs in (64, 256)}


def _gates(width: int, inputs: int, linears: int, max_bits: int, log_threshold: float) -> Gates:
    precision = Precision(max_bits)
    precision.bits, precision.log_threshold = None, log_threshold
    gates = random_router(precision, inputs, linears, width, seed=linears).on_device()
    assert isinstance(gates, Gates)
    return gates


@pytest.mark.parametrize("log_threshold", [-8.0, -1.0, 0.3, 2.0, 8.0])
@pytest.mark.parametrize(
    ("width", "linears", "max_bits", "inputs", "tokens"),
    [
        (8, 3, 8, 256, 5),
        (5, 2, 8, 96, 17),
        (0, 1, 8, 384, 3),
        (8, 1, 4, 768, 1),
        (3, 3, 6, 32, 64),
        (11, 2, 8, 128, 2),
        (3, 1, 8, 8256, 1),
    ],
)
def test_the_router_equals_its_definition(
    width: int, linears: int, max_bits: int, inputs: int, tokens: int, log_threshold: float
) -> None:
    torch.manual_seed(tokens)
    gates = _gates(width, inputs, linears, max_bits, log_threshold)
    x = (torch.randn(tokens, inputs) * torch.rand(tokens, 1).exp()).half()
    prepared = prepare(x, powers_of_two(exponents(inputs)), gates, linears, 32, max_bits)
    expected = route(x, gates.trunk_HK.float(), gates.offset_H, gates.head_ELF, gates.threshold_EL)
    assert torch.equal(prepared.bits_LT[:, :tokens].long(), expected)
    assert prepared.mixed == (tokens > 1)
    if isinstance(prepared, PreparedHalves):
        most = expected.amax(1)
        halved = (expected == 3).any(1)
        assert prepared.steps_L2 is not None
        assert torch.equal(
            prepared.steps_L2.long(), torch.stack([most // 2 + halved, halved], dim=1)
        )
        # What is padded asks for nothing.
        assert (prepared.bits_LT[:, tokens:] == 2).all()


@pytest.mark.parametrize(
    ("tokens", "names"),
    [
        (8, ("x_BT864", "scale_sum_B8T2")),
        (16, ("x_TK", "sum_GT", "bias_sum_GT", "unscale_T")),
    ],
)
def test_inputs_are_scaled_as_their_columns_are(tokens: int, names: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    x, power_K = torch.randn(tokens, 384).bfloat16(), powers_of_two(exponents(384))
    ones_K = torch.ones(384)
    found, expected, unscaled = (
        prepare(tokens_TK, powers_K, 8, 1, 128, 8)
        for tokens_TK, powers_K in ((x, power_K), (x.float() * power_K, ones_K), (x, ones_K))
    )
    for name in names:
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert not torch.equal(getattr(found, names[0]), getattr(unscaled, names[0]))


def test_a_token_of_zeros_is_routed_like_any_other() -> None:
    gates = _gates(4, 64, 2, 8, 0.0)
    x = torch.zeros(2, 64).half()
    expected = route(x, gates.trunk_HK.float(), gates.offset_H, gates.head_ELF, gates.threshold_EL)
    assert torch.equal(prepare(x, POWERS[64], gates, 2, 32, 8).bits_LT[:, :2].long(), expected)


def test_widths_for_all_tokens_of_each_linear() -> None:
    widths = torch.tensor([[6], [3], [2]], dtype=torch.int32)
    prepared = prepare(torch.randn(3, 64).half(), POWERS[64], widths, 3, 32, 8)
    assert not prepared.mixed
    assert prepared.bits_LT[:, :3].tolist() == [[6] * 3, [3] * 3, [2] * 3]


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width_for_all(bits: int) -> None:
    prepared = prepare(torch.randn(2, 64).half(), POWERS[64], bits, 2, 32, 8)
    assert prepared.bits_LT[:, :2].tolist() == [[bits] * 2] * 2
    assert not prepared.mixed


def test_tallies_tokens_and_bits() -> None:
    tally = torch.zeros(2, 2, dtype=torch.int64)
    widths = torch.tensor([[2, 8, 3], [4, 4, 6]])
    x = torch.randn(3, 64).half()
    prepare(x, POWERS[64], widths, 2, 32, 8, tally)
    prepare(x, POWERS[64], 3, 2, 32, 8, tally)
    prepare(x, POWERS[64], widths, 2, 32, 8)
    assert tally.tolist() == [[6, 6], [13 + 9, 14 + 9]]


def test_tokens_that_cannot_differ_are_not_mixed() -> None:
    x, two = torch.randn(2, 64).half(), torch.tensor([[3, 8]])
    assert prepare(x, POWERS[64], two, 1, 32, 8).mixed
    assert not prepare(x[:1], POWERS[64], two[:, :1], 1, 32, 8).mixed
    assert not prepare(x, POWERS[64], torch.tensor([[2, 2]]), 1, 32, 2).mixed


def test_no_more_linears_and_tokens_than_it_takes() -> None:
    with pytest.raises(ValueError, match="4 linears: the kernels take 1 to 3"):
        prepare(torch.zeros(1, 256).half(), POWERS[256], 2, 4, 128, 8)
    with pytest.raises(ValueError, match="65 tokens: the kernels take 1 to 64"):
        prepare(torch.zeros(65, 256).half(), POWERS[256], 2, 1, 128, 8)
