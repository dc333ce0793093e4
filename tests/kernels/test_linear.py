"""The elastic linear at every width, and what it must not remember."""

import pytest
import torch
from torch.nn import functional as F

from mbq.kernels import dispatch
from mbq.kernels.bitplanes import pack_planes
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.quantize import dequantize, pack_pair
from mbq.kernels.reference import routed_linear
from mbq.kernels.router import Precision

ROWS, COLUMNS, GROUP = 10, 96, 32


def _state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 256, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator)
    scale = torch.rand(ROWS, COLUMNS // GROUP, generator=generator) + 0.1
    state = {f"plane_{p}": plane for p, plane in enumerate(pack_planes(code))}
    state["scale_zero"] = pack_pair(scale, torch.full_like(scale, 2.0))
    for k in range(1, 5):
        gain, bias = torch.rand(2, ROWS, generator=generator)
        state[f"gain_bias_{k}"] = pack_pair(gain + 0.5, bias)
    return state


def _linear(seed: int, precision: Precision, bias: bool = False) -> ElasticLinear:
    parameter = torch.nn.Parameter(torch.arange(ROWS).float()) if bias else None
    linear = ElasticLinear(COLUMNS, ROWS, GROUP, precision, parameter)
    linear.load_state_dict(_state(seed), strict=False)
    return linear


def _expected(linear: ElasticLinear, x: torch.Tensor, slices: int) -> torch.Tensor:
    """From planes to output bit by bit, in float64."""
    code = torch.zeros(ROWS, COLUMNS, dtype=torch.int64)
    for p in range(2 * slices):
        words = linear.get_buffer(f"plane_{p}").long() & 0xFFFFFFFF
        for column in range(COLUMNS):
            code[:, column] |= ((words[:, column // 32] >> (column % 32)) & 1) << (7 - p)
    pair = linear.get_buffer("scale_zero").view(torch.float16).view(ROWS, -1, 2).float()
    weight = dequantize(code.to(torch.uint8), pair[..., 0], pair[..., 1], slices).double()
    row = linear.get_buffer(f"gain_bias_{slices}").view(torch.float16).view(ROWS, 2).double()
    out = x.double() @ weight.T * row[:, 0] + row[:, 1]
    return out if linear.bias is None else out + linear.bias.detach().double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_equals_the_definition_at_every_width(slices: int, bias: bool) -> None:
    precision = Precision(4)
    linear = _linear(3, precision, bias)
    precision.set_bits(2 * slices)
    x = torch.randn(2, 7, COLUMNS)
    torch.testing.assert_close(
        linear(x).double(), _expected(linear, x, slices), rtol=1e-4, atol=1e-4
    )


def test_one_assignment_changes_every_linear() -> None:
    precision = Precision(4)
    linears = [_linear(seed, precision) for seed in (1, 2)]
    x = torch.randn(3, COLUMNS)
    at_eight = [linear(x) for linear in linears]
    precision.set_bits(2)
    assert not any(torch.equal(a, linear(x)) for a, linear in zip(at_eight, linears, strict=True))
    precision.set_bits(8)
    assert all(torch.equal(a, linear(x)) for a, linear in zip(at_eight, linears, strict=True))


def test_loading_new_codes_forgets_remembered_weights() -> None:
    linear = _linear(1, Precision(4))
    x = torch.randn(3, COLUMNS)
    linear(x)
    linear.load_state_dict(_state(2))
    assert torch.equal(linear(x), _linear(2, Precision(4))(x))


def test_casting_the_model_leaves_scales_alone() -> None:
    linear = _linear(1, Precision(4)).to(torch.bfloat16)
    assert torch.equal(linear.get_buffer("scale_zero"), _state(1)["scale_zero"])
    x = torch.randn(3, COLUMNS)
    torch.testing.assert_close(linear(x.bfloat16()).float(), linear(x), rtol=0.05, atol=0.5)


def test_weight_at_a_width_is_a_dense_matrix() -> None:
    linear = _linear(1, Precision(4))
    _, bias = linear.get_buffer("gain_bias_3").view(torch.float16).view(ROWS, 2).float().unbind(1)
    linear.precision.set_bits(6)
    x = torch.randn(4, COLUMNS)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight(3), bias))


@pytest.mark.parametrize("bits", [0, 1, 3, 6, 8, -2])
def test_refuses_widths_that_are_not_loaded(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits {bits} must be one of \[2, 4\]"):
        Precision(2).set_bits(bits)


class _Given(torch.nn.Module):
    """Stands where a router stands and answers with counts that a test chose."""

    def __init__(self, counts: torch.Tensor) -> None:
        super().__init__()
        self.counts = counts

    def forward(self, x: torch.Tensor, linear: int) -> torch.Tensor:
        return self.counts


def _routed(counts: torch.Tensor) -> ElasticLinear:
    precision = Precision(4)
    precision.slices = None
    linear = _linear(1, precision)
    linear.route(_Given(counts), 0)
    return linear


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_each_token_is_multiplied_by_its_own_width(tokens: int) -> None:
    counts = torch.randint(1, 5, (tokens,), generator=torch.Generator().manual_seed(tokens))
    linear = _routed(counts)
    pairs = [linear.get_buffer(f"gain_bias_{k}") for k in range(1, 5)]
    biases = torch.stack([pair.view(torch.float16).view(ROWS, 2)[:, 1].float() for pair in pairs])
    weights = torch.stack([linear.weight(k) for k in range(1, 5)])
    x = torch.randn(tokens, COLUMNS)
    expected = routed_linear(x, weights, biases, counts)
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(linear(x[None]), linear(x)[None])


@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_gates_forced_to_one_width_are_that_width_exactly(slices: int) -> None:
    x = torch.randn(3, 5, COLUMNS)
    uniform = _linear(1, Precision(4))
    uniform.precision.set_bits(2 * slices)
    assert torch.equal(_routed(torch.full((15,), slices))(x), uniform(x))


def test_an_empty_batch_is_fine() -> None:
    assert _routed(torch.zeros(0, dtype=torch.int64))(torch.zeros(0, COLUMNS)).shape == (0, ROWS)


def test_tallies_what_was_read() -> None:
    linear = _routed(torch.tensor([1, 4, 2]))
    linear(torch.randn(3, COLUMNS))
    linear(torch.randn(3, COLUMNS))
    assert (linear.tokens, int(linear.slices_read)) == (6, 14)
    linear.reset_tally()
    linear.precision.set_bits(6)
    linear(torch.randn(2, 2, COLUMNS))
    assert (linear.tokens, int(linear.slices_read)) == (4, 12)


def test_a_linear_without_a_router_says_so() -> None:
    precision = Precision(4)
    precision.slices = None
    with pytest.raises(RuntimeError, match="has no router"):
        _linear(1, precision)(torch.randn(1, COLUMNS))


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode kernel, in Triton's interpreter, serves what it would serve on a GPU."""
    monkeypatch.setattr(dispatch, "decodes", lambda x, *_: x.dtype is torch.float16)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slices", [1, 4])
def test_decoding_gives_what_dequantizing_does(slices: int, bias: bool) -> None:
    linear = _linear(0, Precision(4), bias)
    linear.precision.slices = slices
    x = torch.randn(2, 3, COLUMNS)
    with torch.no_grad():
        out = linear(x.half())
        assert out.shape == (2, 3, ROWS)
        assert torch.allclose(out.float(), linear(x.half().float()), rtol=5e-3, atol=5e-3)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_decoding_routed_tokens() -> None:
    linear = _linear(0, Precision(4))
    linear.route(_Given(torch.tensor([1, 4, 2, 3, 1])), 0)
    linear.precision.slices = None
    x = torch.randn(5, COLUMNS)
    with torch.no_grad():
        out, expected = linear(x.half()), linear(x.half().float())
    assert torch.allclose(out.float(), expected, rtol=5e-3, atol=5e-3)
    assert linear.tokens == 10
    assert int(linear.slices_read) == 22


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_after_decoding_the_state_is_as_it_was() -> None:
    linear = _linear(0, Precision(4))
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
            linear(torch.ones(1, COLUMNS)), _linear(1, Precision(4))(torch.ones(1, COLUMNS))
        )
