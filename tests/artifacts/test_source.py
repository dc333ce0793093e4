"""Source checkpoints on disk: found, described and refused without torch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mbq.artifacts.errors import InputError
from mbq.artifacts.source import open_source
from mbq.artifacts.tensors import Entry


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_describes_the_tensors_it_holds(tiny_model: Path) -> None:
    source = open_source(str(tiny_model), "main")
    assert source.config["model_type"] == "llama"
    name = "model.layers.2.mlp.down_proj.weight"
    assert source.tensors[name] == Entry(name, "F32", (64, 96))


def test_digest_follows_the_bytes_not_the_place(tiny_model: Path, copy: Path) -> None:
    digest = open_source(str(tiny_model), "main").digest
    assert digest.startswith("sha256:")
    assert open_source(str(copy), "main").digest == digest
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert open_source(str(copy), "main").digest != digest


def test_reads_sharded_checkpoints(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    sharded = open_source(str(tmp_path / "sharded"), "main")
    assert sharded.tensors == open_source(str(folder), "main").tensors


def test_stored_frequencies_are_no_tensors_of_the_model(tiny_model: Path, copy: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    plain = open_source(str(tiny_model), "main")
    # Named by an index, as those of several files are, and by the file alone.
    for index in (None, {"weight_map": dict.fromkeys(tensors, "model.safetensors")}):
        if index is not None:
            (copy / "model.safetensors.index.json").write_text(json.dumps(index))
        source = open_source(str(copy), "main")
        assert source.tensors == plain.tensors
        assert source.weight_map == plain.weight_map


@pytest.mark.parametrize("location", ["./nowhere", "/nowhere", "~nobody/x", "nowhere", "a/b/c"])
def test_a_folder_that_is_not_there(location: str) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_source(location, "main")


def test_damaged_or_foreign_checkpoints(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        _ = open_source(str(copy), "main").config
    (copy / "config.json").write_text(json.dumps({"hidden_size": 1}))
    with pytest.raises(InputError, match="names no num_hidden_layers, vocab_size"):
        _ = open_source(str(copy), "main").config
    (copy / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle in disguise")
    with pytest.raises(InputError, match="not a safetensors file"):
        _ = open_source(str(copy), "main").tensors
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        _ = open_source(str(copy), "main").tensors
