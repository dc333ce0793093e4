"""Average widths of a loaded checkpoint: what they read, and what changing them must not cost."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, Qwen3Config

from mbq.artifacts import keys
from mbq.artifacts.checkpoint import (
    INDEX_FILE,
    find_linears,
    index_document,
    plan_shards,
    router_shape,
    routing_shard,
)
from mbq.artifacts.config import cut_config, read_config
from mbq.artifacts.documents import RoutingRecord
from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.errors import CorruptError, InputError
from mbq.artifacts.loading import load_model
from mbq.artifacts.sealed import get_document
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.quantize import unpack_pair
from mbq.kernels.reference import route, routed_linear
from mbq.kernels.router import Router
from mbq.kernels.widths import WIDTHS
from mbq.workers.settle import choose

IDS = torch.arange(3 * 24).view(3, 24) * 7 % 320
ROOT = Path(__file__).parents[2]


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


@pytest.fixture(scope="session")
def token_run(finish_run: Callable[..., Any], tiny_document: Any) -> Any:
    """A run whose checkpoint has learned routers."""
    return finish_run(tiny_document(evaluation=None, routing={"method": "token", "steps": 20}))


def _by_hand(router: Router, linear: ElasticLinear, number: int, x: torch.Tensor) -> torch.Tensor:
    """A routed linear token by token, from the buffers of the checkpoint."""
    x_TK = x.reshape(-1, x.shape[-1])
    knots = router.get_buffer("knots").view(torch.float32)
    threshold = torch.empty(knots.shape[:2])
    for extra, row in enumerate(knots):
        for place, (scores, earnings) in enumerate(row):
            fine = torch.linspace(-40, 40, 800_001, dtype=torch.float64)
            at = torch.searchsorted(scores.double(), fine).clamp(1, len(scores) - 1)
            x0, x1 = scores.double()[at - 1], scores.double()[at]
            y0, y1 = earnings.double()[at - 1], earnings.double()[at]
            inside = fine.clamp(scores[0].double(), scores[-1].double())
            value = y0 + (y1 - y0) * (inside - x0) / (x1 - x0) + (fine - inside)
            enough = (value >= router.precision.log_thresholds()[extra]).nonzero()
            threshold[extra, place] = fine[enough[0, 0]] if len(enough) else torch.inf
    widths = route(
        x_TK,
        router.get_buffer("trunk").view(torch.float16).float(),
        router.get_buffer("offset").view(torch.float32),
        router.get_buffer("head").view(torch.float32),
        threshold,
    )[number]
    pairs = [unpack_pair(linear.get_buffer(f"gain_bias_{bits}")) for bits in WIDTHS]
    bias = torch.stack([b for _, b in pairs])
    if linear.bias is not None:
        bias = bias + linear.bias
    weights = torch.stack([linear.weight(bits) for bits in WIDTHS])
    return routed_linear(x_TK, weights, bias, widths)


@pytest.mark.parametrize("kind", [None, Qwen3Config, MistralConfig])
def test_a_routed_block_equals_the_definition_token_by_token(
    finish_run: Callable[..., Any],
    make_model: Callable[..., Path],
    tiny_document: Any,
    token_run: Any,
    kind: type | None,
) -> None:
    run = token_run
    if kind is not None:
        source = {"source": str(make_model(kind, head_dim=16))}
        routing = {"method": "token", "steps": 20}
        run = finish_run(tiny_document(model=source, evaluation=None, routing=routing))
    model: Any = load_model(run.checkpoint)
    block = model.model.layers[1]
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, linear in block.named_modules():
        if isinstance(linear, ElasticLinear):
            linear.register_forward_hook(
                lambda module, arguments, out, name=name: seen.update({name: (arguments[0], out)})
            )
    routers = {name: module for name, module in block.named_modules() if isinstance(module, Router)}
    served = model.config.quantization_config.routing["routers"]
    pairs = [(router, *item) for router, names in served.items() for item in enumerate(names)]
    different = 0
    for bits in (2.3, 3.4, 4.6):
        model.set_average_bits(bits)
        _logits(model)
        assert len(seen) == len(pairs) == 7
        for router, number, name in pairs:
            x, out = seen[name]
            linear = block.get_submodule(name)
            expected = _by_hand(routers[router], linear, number, x)
            got = out.reshape(expected.shape).double()
            # A score within float32 of its threshold may fall on either side: rare, never many.
            wrong = ((got - expected).abs() > 1e-3 * expected.abs().max()).any(1)
            assert wrong.float().mean() <= 0.03
            different += len(linear.shared.widths(x, linear.number).unique()) > 1
    assert different >= 3


def test_reads_about_what_was_asked_and_the_same_everywhere_at_widths(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    read = []
    for bits in (2, 2.4, 3, 4.5, 6, 8):
        model.set_average_bits(bits)
        _logits(model)
        read.append(model.realised_bits())
    assert read == sorted(read)
    assert [read[place] for place in (0, 2, 4, 5)] == [2.0, 3.0, 6.0, 8.0]
    assert read == pytest.approx([2, 2.4, 3, 4.5, 6, 8], abs=0.3)
    for bits in WIDTHS:
        model.set_average_bits(bits)
        average = _logits(model)
        model.set_bits(bits)
        assert torch.equal(_logits(model), average)


def test_realised_bits_start_anew_with_every_width(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=6)
    with pytest.raises(InputError, match="no token has been processed"):
        model.realised_bits()
    _logits(model)
    assert model.realised_bits() == 6.0
    model.set_bits(2)
    _logits(model)
    assert model.realised_bits() == 2.0


def test_changing_the_width_loads_and_allocates_nothing(token_run: Any) -> None:
    model: Any = load_model(token_run.checkpoint)
    for bits in WIDTHS:
        model.set_bits(bits)
        _logits(model)
    model.set_average_bits(2.5)
    _logits(model)

    def places() -> list[int]:
        held = [tensor.data_ptr() for tensor in model.state_dict().values()]
        for module in model.modules():
            if isinstance(module, ElasticLinear):
                held += [weight.data_ptr() for weight in module._weights.values()]
            if isinstance(module, Router):
                held.append(module._threshold_EL.data_ptr())
        return held

    before = places()
    for bits in (2.1, 7.9, 3.3):
        model.set_average_bits(bits)
        _logits(model)
    assert places() == before


@pytest.mark.parametrize("bits", [1.9, 8.1, 0, -3])
def test_refuses_averages_that_are_not_stored(finished_run: Any, bits: float) -> None:
    with pytest.raises(InputError, match=r"average bits .* must lie between 2 and 8"):
        load_model(finished_run.checkpoint, average_bits=bits)


def test_two_widths_at_once_are_refused(finished_run: Any) -> None:
    with pytest.raises(InputError, match="give one of them"):
        load_model(finished_run.checkpoint, bits=2, average_bits=2.5)


def _cut(run: Any, folder: Path, max_bits: int) -> Path:
    """The checkpoint without the files of higher slices: what a download of fewer bits leaves."""
    shutil.copytree(run.checkpoint, folder)
    document, spec = run.document, run.document.spec
    config = (folder / "config.json").read_bytes()
    quantization = read_config(config)
    assert quantization is not None and quantization.routing is not None
    shape = router_shape(quantization.routing.method, spec.routing.width)
    found = find_linears(document.source.tensors)
    shards = plan_shards(document.source.tensors, max_bits // 2, spec.group_size)
    shards.append(routing_shard(found, spec.max_bits, shape))
    (folder / "config.json").write_bytes(cut_config(config, max_bits))
    (folder / INDEX_FILE).write_bytes(index_document(shards))
    kept = {shard.file for shard in shards}
    for file in folder.glob("*.safetensors"):
        if file.name not in kept:
            file.unlink()
    return folder


@pytest.mark.parametrize("name", ["finished_run", "token_run"])
def test_cut_to_four_bits_it_shares_as_the_whole_one_does(
    request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    run = request.getfixturevalue(name)
    model: Any = load_model(_cut(run, tmp_path / "cut", 4))
    whole: Any = load_model(run.checkpoint)
    for bits in (2, 2.5, 3, 3.5, 4):
        model.set_average_bits(bits)
        _logits(model)
        assert model.realised_bits() == pytest.approx(bits, abs=0.3)
        for linear in elastic_linears(model):
            tokens, bits_read = linear.tally
            assert linear.precision.max_bits == 4
            assert 2 * tokens <= bits_read <= 4 * tokens
    with pytest.raises(InputError, match="average bits 5 must lie between 2 and 4"):
        model.set_average_bits(5)
    with pytest.raises(InputError, match=r"bits 6 must be one of \[2, 3, 4\]"):
        model.set_bits(6)
    for bits in (2, 2.3, 3, 3.5, 4):
        whole.set_average_bits(bits)
        model.set_average_bits(bits)
        assert torch.equal(_logits(model), _logits(whole))
        assert model.realised_bits() == whole.realised_bits()


def test_cut_to_two_bits_it_has_one_average(finished_run: Any, tmp_path: Path) -> None:
    model: Any = load_model(_cut(finished_run, tmp_path / "cut", 2), average_bits=2)
    _logits(model)
    assert model.realised_bits() == 2.0
    with pytest.raises(InputError, match="must lie between 2 and 2"):
        model.set_average_bits(2.5)
    with pytest.raises(InputError, match=r"bits 3 must be one of \[2\]"):
        model.set_bits(3)


def test_cut_to_six_bits_it_shares_up_to_six(token_run: Any, tmp_path: Path) -> None:
    model: Any = load_model(_cut(token_run, tmp_path / "cut", 6))
    whole: Any = load_model(token_run.checkpoint)
    for bits in (2, 3, 4, 6):
        model.set_bits(bits)
        whole.set_bits(bits)
        assert torch.equal(_logits(model), _logits(whole))
    for bits in (2.6, 3.4, 5.2):
        model.set_average_bits(bits)
        _logits(model)
        assert model.realised_bits() == pytest.approx(bits, abs=0.3)


def test_the_method_chosen_is_the_one_that_loses_least(finished_run: Any) -> None:
    config = json.loads((finished_run.checkpoint / "config.json").read_text())
    chosen = config["quantization_config"]["routing"]
    store, run = finished_run.store, finished_run.document.run
    methods = ("linear", "norm", "token")
    records = [get_document(store, keys.routing_key(run, m), RoutingRecord) for m in methods]
    record = choose(records)
    assert record.method == chosen["method"]
    for upper, curve in record.curves.items():
        stored = chosen["curves"][str(upper)]
        assert tuple(stored["average_bits"]) == curve.average_bits
        assert tuple(stored["log_thresholds"]) == curve.log_thresholds


def test_widths_change_in_and_out_of_inference_mode(token_run: Any) -> None:
    model: Any = load_model(token_run.checkpoint, average_bits=2.5)
    with torch.inference_mode():
        model(IDS)
    model.set_average_bits(3.5)
    model.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False)
    model(IDS)
    assert model.realised_bits() == pytest.approx(3.5, abs=0.4)


def test_mixed_widths_run_under_autocast(token_run: Any) -> None:
    model: Any = load_model(token_run.checkpoint, average_bits=3.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(IDS).logits).all()
    router = next(m for m in model.modules() if isinstance(m, Router))
    x = torch.randn(9, 64)
    expected = router.scores(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.scores(x), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model.model.layers[0]))]
)
def test_a_model_that_has_run_can_be_copied(token_run: Any, copied: Any) -> None:
    model: Any = load_model(token_run.checkpoint, average_bits=3.5)
    expected = _logits(model)
    again = copied(model)
    if hasattr(again, "lm_head"):
        assert torch.equal(_logits(again), expected)
    else:
        assert len(elastic_linears(again)) == 7


def test_saved_again_it_routes_the_same(token_run: Any, tmp_path: Path) -> None:
    model: Any = load_model(token_run.checkpoint, average_bits=2.7)
    expected = _logits(model)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(load_model(tmp_path / "again", average_bits=2.7)), expected)


def test_a_checkpoint_without_thresholds_says_so(finished_run: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run.checkpoint, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["routing"]["curves"]["8"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptError, match=r"curves lead to \[3, 4, 6\], widths go to 8"):
        load_model(folder)


def test_a_missing_router_is_an_error(finished_run: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run.checkpoint, tmp_path / "copy"))
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "routing" not in f}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"has no model\.layers\..*_router"):
        load_model(folder)
