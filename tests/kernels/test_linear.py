"""The elastic linear at every width, and what it must not remember."""

import pytest
import torch
from torch.nn import functional as F

from mbq.kernels import dispatch
from mbq.kernels.bitplanes import pack_planes
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import dequantize, pack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.shared_input import share_input
from mbq.kernels.widths import WIDTHS
from tests.support.weights import exponents

ROWS, COLUMNS, GROUP = 10, 96, 32


def _state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    scale = torch.rand(ROWS, COLUMNS // GROUP, generator=generator) + 0.1
    state = {f"plane_{p}": plane for p, plane in enumerate(pack_planes(code))}
    state["scale_zero"] = pack_pair(scale, torch.full_like(scale, 2.0))
    state["exponent"] = exponents(COLUMNS)
    for bits in WIDTHS:
        gain, bias = torch.rand(2, ROWS, generator=generator)
        state[f"gain_bias_{bits}"] = pack_pair(gain + 0.5, bias)
    return state


def _linear(seed: int, precision: Precision, bias: bool = False) -> ElasticLinear:
    parameter = torch.nn.Parameter(torch.arange(ROWS).float()) if bias else None
    linear = ElasticLinear(COLUMNS, ROWS, GROUP, precision, parameter)
    linear.load_state_dict(_state(seed), strict=False)
    return linear


def _expected(linear: ElasticLinear, x: torch.Tensor, bits: int) -> torch.Tensor:
    """From planes to output bit by bit, in float64."""
    code = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    for p in range(bits):
        words = linear.get_buffer(f"plane_{p}").long() & 0xFFFFFFFF
        for column in range(COLUMNS):
            code[:, column] |= ((words[:, column // 32] >> (column % 32)) & 1) << (7 - p)
    pair = linear.get_buffer("scale_zero").view(torch.float16).view(ROWS, -1, 2).float()
    weight = dequantize(code.to(torch.uint8), pair[..., 0], pair[..., 1], bits).double()
    row = linear.get_buffer(f"gain_bias_{bits}").view(torch.float16).view(ROWS, 2).double()
    scaled = x.double() * 2.0 ** linear.get_buffer("exponent")
    out = scaled @ weight.T * row[:, 0] + row[:, 1]
    return out if linear.bias is None else out + linear.bias.detach().double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_the_definition_at_every_width(bits: int, bias: bool) -> None:
    precision = Precision(8)
    linear = _linear(3, precision, bias)
    precision.set_bits(bits)
    x = torch.randn(2, 7, COLUMNS)
    torch.testing.assert_close(linear(x).double(), _expected(linear, x, bits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stored", "widths"), [(2, [2]), (4, [2, 3, 4]), (6, [2, 3, 4, 6])])
def test_cut_it_gives_what_the_whole_one_does(stored: int, widths: list[int]) -> None:
    whole, cut = _linear(3, Precision(8)), ElasticLinear(COLUMNS, ROWS, GROUP, Precision(stored))
    held = dict(cut.named_buffers())
    assert set(held) == {
        "exponent",
        "scale_zero",
        *(f"plane_{p}" for p in range(stored)),
        *(f"gain_bias_{bits}" for bits in widths),
    }
    cut.load_state_dict({name: value for name, value in _state(3).items() if name in held})
    x = torch.randn(5, COLUMNS)
    for bits in widths:
        for linear in (whole, cut):
            linear.precision.set_bits(bits)
        assert torch.equal(cut(x), whole(x))


def test_one_assignment_changes_every_linear() -> None:
    precision = Precision(8)
    linears = [_linear(seed, precision) for seed in (1, 2)]
    x = torch.randn(3, COLUMNS)
    at_eight = [linear(x) for linear in linears]
    precision.set_bits(2)
    assert not any(torch.equal(a, linear(x)) for a, linear in zip(at_eight, linears, strict=True))
    precision.set_bits(8)
    assert all(torch.equal(a, linear(x)) for a, linear in zip(at_eight, linears, strict=True))


def test_loading_new_codes_forgets_remembered_weights() -> None:
    linear = _linear(1, Precision(8))
    x = torch.randn(3, COLUMNS)
    linear(x)
    linear.load_state_dict(_state(2))
    assert torch.equal(linear(x), _linear(2, Precision(8))(x))


def test_casting_the_model_leaves_scales_alone() -> None:
    linear = _linear(1, Precision(8)).to(torch.bfloat16)
    assert torch.equal(linear.get_buffer("scale_zero"), _state(1)["scale_zero"])
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(linear(x.bfloat16()).float(), linear(x), rtol=0.05, atol=0.5)


def test_weight_at_a_width_is_a_dense_matrix() -> None:
    linear = _linear(1, Precision(8))
    for width in (3, 6):
        pair = linear.get_buffer(f"gain_bias_{width}").view(torch.float16).view(ROWS, 2)
        linear.precision.set_bits(width)
        x = torch.randn(4, COLUMNS)
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight(width), pair[:, 1].float()))


@pytest.mark.parametrize("bits", [0, 1, 5, 6, 8, -2])
def test_refuses_widths_that_are_not_loaded(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits {bits} must be one of \[2, 3, 4\]"):
        Precision(4).set_bits(bits)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 9, -3])
def test_refuses_bits_between_the_widths(bits: int) -> None:
    precision = Precision(8)
    precision.set_bits(3)
    with pytest.raises(ValueError, match=rf"bits {bits} must be one of \[2, 3, 4, 6, 8\]"):
        precision.set_bits(bits)
    assert precision.bits == 3


class _Given(torch.nn.Module):
    """Stands where a router stands and answers with widths that a test chose."""

    def __init__(self, widths: torch.Tensor) -> None:
        super().__init__()
        self.widths = widths

    def forward(self, x: torch.Tensor, linear: int) -> torch.Tensor:
        return self.widths


def _routed(widths: torch.Tensor) -> ElasticLinear:
    precision = Precision(8)
    precision.bits = None
    linear = _linear(1, precision)
    share_input([linear], _Given(widths))
    return linear


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_each_token_is_multiplied_by_its_own_width(tokens: int) -> None:
    drawn = torch.randint(0, 5, (tokens,), generator=torch.Generator().manual_seed(tokens))
    widths = torch.tensor(WIDTHS)[drawn]
    linear = _routed(widths)
    pairs = [linear.get_buffer(f"gain_bias_{bits}") for bits in WIDTHS]
    biases = torch.stack([pair.view(torch.float16).view(ROWS, 2)[:, 1].float() for pair in pairs])
    weights = torch.stack([linear.weight(bits) for bits in WIDTHS])
    x = torch.randn(tokens, COLUMNS)
    expected = routed_linear(x, weights, biases, widths)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear(x[None]), linear(x)[None])


def test_neighbouring_tokens_of_all_widths_are_those_widths() -> None:
    widths = torch.tensor([3, 8, 2, 6, 4, 3, 2])
    x = torch.randn(7, COLUMNS)
    linear = _routed(widths)
    out = linear(x)
    assert linear.tally == (7, 28)
    for token, bits in enumerate(widths.tolist()):
        expected = _expected(linear, x[token], bits)
        torch.testing.assert_close(out[token].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_gates_forced_to_one_width_are_that_width_exactly(bits: int) -> None:
    x = torch.randn(3, 5, COLUMNS)
    uniform = _linear(1, Precision(8))
    uniform.precision.set_bits(bits)
    assert torch.equal(_routed(torch.full((15,), bits))(x), uniform(x))


def test_an_empty_batch_is_fine() -> None:
    assert _routed(torch.zeros(0, dtype=torch.int64))(torch.zeros(0, COLUMNS)).shape == (0, ROWS)


def test_tallies_what_was_read() -> None:
    linear = _routed(torch.tensor([2, 8, 3]))
    linear(torch.randn(3, COLUMNS))
    linear(torch.randn(3, COLUMNS))
    assert linear.tally == (6, 26)
    for bits, read in ((6, 24), (3, 12)):
        linear.reset_tally()
        linear.precision.set_bits(bits)
        linear(torch.randn(2, 2, COLUMNS))
        assert linear.tally == (4, read)


def test_a_linear_without_a_router_says_so() -> None:
    precision = Precision(8)
    precision.bits = None
    with pytest.raises(RuntimeError, match="has no router"):
        _linear(1, precision)(torch.randn(1, COLUMNS))


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel, in Triton's interpreter, serves what it would serve on a GPU."""
    monkeypatch.setattr(dispatch, "packs", lambda x, _: x.dtype is torch.float16)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_decoding_gives_what_dequantizing_does(bits: int, bias: bool) -> None:
    linear = _linear(0, Precision(8), bias)
    linear.precision.set_bits(bits)
    x = torch.randn(2, 3, COLUMNS)
    with torch.no_grad():
        out = linear(x.half())
        assert out.shape == (2, 3, ROWS)
        assert torch.allclose(out.float(), linear(x.half().float()), rtol=5e-3, atol=5e-3)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_decoding_routed_tokens() -> None:
    linear = _linear(0, Precision(8))
    share_input([linear], _Given(torch.tensor([2, 8, 4, 3, 6])))
    linear.precision.bits = None
    x = torch.randn(5, COLUMNS)
    with torch.no_grad():
        out, expected = linear(x.half()), linear(x.half().float())
    assert torch.allclose(out.float(), expected, rtol=5e-3, atol=5e-3)
    assert linear.tally == (10, 46)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_after_decoding_the_state_is_as_it_was() -> None:
    linear = _linear(0, Precision(8))
    with torch.no_grad():
        linear(torch.randn(1, COLUMNS).half())
        # Exchanged for the run-time layout, not kept beside it.
        assert linear.get_buffer("plane_0").numel() == 0
        before = linear(torch.ones(1, COLUMNS))
        state = linear.state_dict()
        assert all(torch.equal(state[name], value) for name, value in _state(0).items())
        assert torch.equal(linear(torch.ones(1, COLUMNS)), before)
        linear(torch.randn(1, COLUMNS).half())
        linear.load_state_dict(_state(1), strict=False)
        assert torch.equal(
            linear(torch.ones(1, COLUMNS)), _linear(1, Precision(8))(torch.ones(1, COLUMNS))
        )
