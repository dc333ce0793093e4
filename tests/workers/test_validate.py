"""Packed linears are held against float64: right ones pass, wrong ones are named."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mbq.artifacts import keys
from mbq.artifacts.documents import ValidationRecord
from mbq.artifacts.errors import CorruptError, KernelError
from mbq.artifacts.packed import open_checkpoint
from mbq.artifacts.sealed import document_sha256, get_document
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import TensorFile
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.quantize import pack_pair, unpack_pair
from mbq.workers.validate import open_linear, shapes, tensor_files, validate_linear

CPU = torch.device("cpu")


@pytest.fixture
def files(finished_run: Any) -> dict[str, TensorFile]:
    return tensor_files(open_checkpoint(LocalStore(finished_run.checkpoint)), 8)


def _linear(files: dict[str, TensorFile], group_size: int) -> ElasticLinear:
    return open_linear(files, next(iter(shapes(files).values())), group_size, CPU)


class _Wrong(ElasticLinear):
    """Spoils one output of the last token at one width."""

    spoil: Callable[[float], float]
    at = 3

    def _multiply(self, x: Tensor, bits: int) -> Tensor:
        out = super()._multiply(x, bits).clone()
        if bits == self.at:
            out[-1, -1] = self.spoil(out[-1, -1].item())
        return out


class _Rounded(ElasticLinear):
    """Off by a part of every output, as rounding it would."""

    def _multiply(self, x: Tensor, bits: int) -> Tensor:
        return super()._multiply(x, bits) * (1 + 2e-5)


def test_a_run_validates_every_shape(finished_run: Any) -> None:
    store, run = finished_run.store, finished_run.document.run
    sha256 = document_sha256(store, keys.manifest_key(run))
    wanted = {
        f"{linear.weight.shape[0]}x{linear.weight.shape[1]}"
        for linear in _source_linears(finished_run)
    }
    assert set(store.children(f"runs/{run}/validations")) == {f"{s}.json" for s in wanted}
    for shape in wanted:
        record = get_document(store, keys.validation_key(run, shape), ValidationRecord)
        assert f"{record.out_features}x{record.in_features}" == shape
        assert record.manifest_sha256 == sha256
        # Five numbers of tokens, each at five widths and at a mix of them.
        assert record.checks == 5 * (5 + 1)
        assert 0 < record.largest_error < 1e-5
        assert record.timings == ()


def _source_linears(finished_run: Any) -> list[Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished_run.document.source.location)
    return [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("spoil", [lambda y: y + 0.5, lambda y: math.nan, lambda y: -math.inf])
def test_a_wrong_output_is_named(
    finished_run: Any, files: dict[str, TensorFile], spoil: Callable[[float], float]
) -> None:
    linear = _linear(files, finished_run.document.spec.group_size)
    linear.__class__ = _Wrong
    linear.spoil = spoil
    with pytest.raises(KernelError, match=r"a\.b is wrong on cpu.*at 3 bits are off by"):
        validate_linear(linear, "a.b", "0" * 64, lambda _: None)


def test_tells_how_far_it_is(finished_run: Any, files: dict[str, TensorFile]) -> None:
    linear = _linear(files, finished_run.document.spec.group_size)
    told: list[float] = []
    validate_linear(linear, "a.b", "0" * 64, told.append)
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] < 1


def test_a_checkpoint_cut_to_four_bits(finished_run: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished_run.checkpoint, tmp_path / "cut"))
    for e in (2, 3):
        for file in folder.glob(f"model-slice{e}-*"):
            file.unlink()
    files = tensor_files(open_checkpoint(LocalStore(folder)), 4)
    linear = _linear(files, finished_run.document.spec.group_size)
    assert linear.stored_bits == 4
    assert validate_linear(linear, "a.b", "0" * 64, lambda _: None).largest_error < 1e-5


def test_a_missing_tensor(finished_run: Any, files: dict[str, TensorFile]) -> None:
    name = next(iter(shapes(files).values()))
    del files[f"{name}.gain_bias_4"]
    with pytest.raises(CorruptError, match="gain_bias_4; fetch it again"):
        open_linear(files, name, finished_run.document.spec.group_size, CPU)


@pytest.mark.parametrize("part", ["scale_zero", "gain_bias_4"])
def test_what_rounding_leaves_of_a_large_channel_is_no_error(
    finished_run: Any, files: dict[str, TensorFile], part: str
) -> None:
    # One row of weights, or one bias, is a hundred times larger than all others.
    linear = _linear(files, finished_run.document.spec.group_size)
    first, second = unpack_pair(linear.get_buffer(part))
    if part == "scale_zero":
        first[3] *= 100
    else:
        second[3] = 100 * second.abs().max() + 1
    linear.register_buffer(part, pack_pair(first, second))
    linear.__class__ = _Rounded
    assert validate_linear(linear, "a.b", "0" * 64, lambda _: None).largest_error > 1e-5
