"""Packed checkpoints as transformers loads them."""

import gc
import json
import pickle
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from mbq.artifacts import keys
from mbq.artifacts.documents import BlockRecord
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError, StoreError
from mbq.artifacts.loading import load_model
from mbq.artifacts.sealed import get_document
from mbq.artifacts.tensors import open_tensors
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.quantize import dequantize, powers_of_two, unpack_pair
from mbq.kernels.widths import WIDTHS
from mbq.workers.pack import read_linear

IDS = torch.arange(2 * 20).view(2, 20) * 7 % 320


@pytest.fixture
def copy(finished_run: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.checkpoint, tmp_path / "copy"))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


def test_holds_the_calibrated_weights_at_every_width(finished_run: Any) -> None:
    model = load_model(finished_run.checkpoint)
    run = finished_run.document.run
    for block in range(3):
        record = get_document(finished_run.store, keys.block_key(run, block), BlockRecord)
        blob = open_tensors(finished_run.store, keys.blob_key(record.blob.sha256))
        for name in ("self_attn.k_proj", "mlp.down_proj"):
            linear = read_linear(blob, name)
            loaded = model.get_submodule(f"model.layers.{block}.{name}")
            assert isinstance(loaded, ElasticLinear)
            assert linear.exponent_K.any()
            scale, zero = unpack_pair(linear.scale_zero_NG)
            gain, _ = unpack_pair(linear.gain_bias_WN)
            for row, bits in enumerate(WIDTHS):
                expected = dequantize(linear.code_NK, scale, zero, bits) * gain[row][:, None]
                expected *= powers_of_two(linear.exponent_K)
                assert torch.equal(loaded.weight(bits), expected)


def test_changes_width_while_running(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=2)
    at_two = _logits(model)
    model.set_bits(3)
    at_three = _logits(model)
    assert model.realised_bits() == 3.0
    assert torch.equal(_logits(load_model(finished_run.checkpoint, bits=3)), at_three)
    model.set_bits(8)
    at_eight = _logits(model)
    assert not torch.allclose(at_two, at_eight)
    assert not torch.allclose(at_two, at_three)
    assert torch.equal(_logits(load_model(finished_run.checkpoint)), at_eight)
    model.set_bits(2)
    assert torch.equal(_logits(model), at_two)


def test_eight_bits_are_close_to_the_source_and_two_are_not(
    finished_run: Any, tiny_model: Path
) -> None:
    source = _logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    model: Any = load_model(finished_run.checkpoint)
    errors = []
    for bits in WIDTHS:
        model.set_bits(bits)
        errors.append(((_logits(model) - source).norm() / source.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.06


def test_a_new_process_computes_the_same_logits(finished_run: Any, tmp_path: Path) -> None:
    model = load_model(finished_run.checkpoint, bits=4)
    script = (
        "import sys, torch\n"
        "from mbq.artifacts.loading import load_model\n"
        "torch.set_num_threads(int(sys.argv[3]))\n"
        "ids = torch.arange(40).view(2, 20) * 7 % 320\n"
        "with torch.no_grad(): logits = load_model(sys.argv[1], bits=4)(ids).logits\n"
        "from safetensors.torch import save_file\n"
        "save_file({'logits': logits.contiguous()}, sys.argv[2])\n"
    )
    out = tmp_path / "logits.safetensors"
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-c", script, str(finished_run.checkpoint), str(out), threads]
    subprocess.run(command, check=True)
    from safetensors.torch import load_file

    assert torch.equal(load_file(out)["logits"], _logits(model))


def test_generates_text(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=2)
    tokenizer = AutoTokenizer.from_pretrained(finished_run.checkpoint)
    ids = tokenizer("Item 5: the", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 5)
    assert tokenizer.decode(out[0]).startswith("Item 5: the")


def test_loads_with_plain_transformers_once_imported(finished_run: Any) -> None:
    plain = AutoModelForCausalLM.from_pretrained(finished_run.checkpoint)
    assert torch.equal(_logits(plain), _logits(load_model(finished_run.checkpoint)))


def test_saved_again_it_is_the_same_model(finished_run: Any, tmp_path: Path) -> None:
    model = load_model(finished_run.checkpoint)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(_logits(load_model(tmp_path / "again")), _logits(model))


def test_a_model_survives_pickling_with_its_methods(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=4)
    model.set_policy(_three_bits)
    again: Any = pickle.loads(pickle.dumps(model))
    assert torch.equal(_logits(again), _logits(model))
    again.set_bits(2)
    assert not torch.equal(_logits(again), _logits(model))
    again.generate(IDS, max_new_tokens=1, do_sample=False)
    assert torch.equal(_logits(again), _logits(load_model(finished_run.checkpoint, average_bits=3)))


def test_a_model_goes_with_its_last_user(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint)
    model.set_policy(_three_bits)
    model.generate(IDS, max_new_tokens=1, do_sample=False)
    gone, set_bits = weakref.ref(model), model.set_bits
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
    with pytest.raises(InputError, match="the model is gone: keep it"):
        set_bits(4)


def test_takes_what_transformers_takes(finished_run: Any) -> None:
    model = load_model(finished_run.checkpoint, use_cache=False, max_position_embeddings=64)
    assert (model.config.use_cache, model.config.max_position_embeddings) == (False, 64)


def test_loads_without_its_head(finished_run: Any) -> None:
    bare: Any = AutoModel.from_pretrained(finished_run.checkpoint)
    whole: Any = load_model(finished_run.checkpoint, average_bits=3.5)
    bare.set_average_bits(3.5)
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_short_memory_is_not_blamed_on_the_files(
    finished_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(finished_run.checkpoint)


def _three_bits() -> float:
    return 3.0


def test_keeps_the_biases_of_the_source(
    finish_run: Callable[..., Any], make_model: Callable[..., Path], tiny_document: Any
) -> None:
    folder = make_model(Qwen2Config)
    run = finish_run(tiny_document(model={"source": str(folder)}, evaluation=None))
    source = AutoModelForCausalLM.from_pretrained(folder)
    model = load_model(run.checkpoint)
    for block in range(3):
        name = f"model.layers.{block}.self_attn.q_proj.bias"
        assert torch.equal(model.get_parameter(name), source.get_parameter(name))
    assert (_logits(model) - _logits(source)).norm() / _logits(source).norm() < 0.1


@pytest.mark.parametrize("bits", [5, 7, 0, 10])
def test_refuses_widths_that_are_not_stored(finished_run: Any, bits: int) -> None:
    message = rf"bits {bits} must be one of \[2, 3, 4, 6, 8\]"
    with pytest.raises(InputError, match=message):
        load_model(finished_run.checkpoint, bits=bits)
    model: Any = load_model(finished_run.checkpoint, bits=3)
    with pytest.raises(InputError, match=message):
        model.set_bits(bits)
    _logits(model)
    assert model.realised_bits() == 3.0


def test_refuses_what_is_no_width_and_no_folder(finished_run: Any) -> None:
    model: Any = load_model(finished_run.checkpoint, bits=3)
    with pytest.raises(InputError, match="average bits 'three' must be a number"):
        model.set_average_bits("three")
    with pytest.raises(InputError, match=r"bits '4' must be one of \[2, 3, 4, 6, 8\]"):
        model.set_bits("4")
    with pytest.raises(InputError, match="policy 5 must be a function that returns average bits"):
        model.set_policy(5)
    model.set_bits(4.0)
    assert torch.equal(_logits(model), _logits(load_model(finished_run.checkpoint, bits=4)))
    with pytest.raises(InputError, match="`mbq-cluster pull s3://bucket/x DIR`"):
        load_model("s3://bucket/x")


def test_a_missing_plane_is_an_error(copy: Path) -> None:
    index_path = copy / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    gone = "model-slice2-00001-of-00001.safetensors"
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != gone}
    index_path.write_text(json.dumps(index))
    with pytest.raises(CorruptError, match=r"has no model\.layers\.0\..*plane_4"):
        load_model(copy)


def test_a_missing_file_is_an_error(copy: Path) -> None:
    for name in ("model-slice2-00001-of-00001.safetensors", "model.safetensors.index.json"):
        (copy / name).unlink()
        with pytest.raises(CorruptError, match="fetch it again") as caught:
            load_model(copy)
        assert "\n" not in str(caught.value)


def test_a_config_that_cannot_be_read_is_an_error(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").symlink_to("config.json")
    with pytest.raises(StoreError, match=r"cannot read .*/config\.json"):
        load_model(copy)


def test_a_truncated_file_is_an_error(copy: Path) -> None:
    path = copy / "model-slice0-00001-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptError, match="is damaged"):
        load_model(copy)


@pytest.mark.parametrize("change", [{"format_version": 99}, {"packing": "other"}])
def test_another_format_is_refused(copy: Path, change: dict[str, Any]) -> None:
    path = copy / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptError, match="install the version that wrote it"):
        load_model(copy)


def test_other_folders_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"holds no config\.json"):
        load_model(tmp_path)
    with pytest.raises(NotFoundError, match="not a checkpoint packed by mbq-cluster"):
        load_model(tiny_model)
