"""Pulling a packed checkpoint: what a width needs and nothing else, whole, mended, never spoilt."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts.checkpoint import INDEX_FILE
from mbq.artifacts.config import CONFIG_FILE
from mbq.artifacts.errors import InputError, NotFoundError
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import PackedCheckpoint, open_checkpoint, verify
from mbq.artifacts.pull import pull
from mbq.artifacts.store import LocalStore, Store, open_store
from tests.support.proxy import Proxy
from tests.support.servers import Server


def _silent(fraction: float) -> None:
    assert 0 < fraction <= 1


@pytest.fixture
def checkpoint(finished_run: Any, any_store: Store) -> PackedCheckpoint:
    """The packed checkpoint of a finished run, in a store of each kind."""
    for path in finished_run.checkpoint.iterdir():
        any_store.put(path.name, [path.read_bytes()])
    return open_checkpoint(any_store)


@pytest.fixture
def local(finished_run: Any) -> PackedCheckpoint:
    return open_checkpoint(LocalStore(finished_run.checkpoint))


@pytest.fixture
def proxied(
    finished_run: Any, start_server: Callable[[str], Server], connect: Callable[..., Store]
) -> Iterator[tuple[PackedCheckpoint, Proxy]]:
    """The same behind a proxy that counts what goes through."""
    server = start_server("rclone")
    store = connect(server)
    for path in finished_run.checkpoint.iterdir():
        store.put(path.name, [path.read_bytes()])
    with Proxy(server.endpoint) as proxy:
        connect(server, proxy)
        yield open_checkpoint(store), proxy


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_whole_pull_is_the_checkpoint_byte_for_byte(
    checkpoint: PackedCheckpoint, finished_run: Any, tmp_path: Path
) -> None:
    pulled = pull(checkpoint, tmp_path / "new" / "dir", None, _silent)
    assert _files(tmp_path / "new" / "dir") == _files(finished_run.checkpoint)
    assert (pulled.max_bits, pulled.kept_bytes) == (8, 0)
    assert verify(open_checkpoint(LocalStore(tmp_path / "new" / "dir")), _silent) == []
    assert verify(checkpoint, _silent) == []


def test_four_bits_move_half_of_the_planes_and_everything_else_once(
    proxied: tuple[PackedCheckpoint, Proxy], tmp_path: Path
) -> None:
    checkpoint, proxy = proxied
    manifest = checkpoint.manifest
    size = {name: digest.size_bytes for name, digest in manifest.files.items()}
    slices = [sum(size[name] for name in names) for names in manifest.slice_files]
    other = sum(size.values()) - sum(slices) - size[INDEX_FILE]
    proxy.exchanges.clear()
    pull(checkpoint, tmp_path / "dir", 4, _silent)
    # The second slice holds as many planes as the others, but gains and biases of two widths.
    assert slices[0] == slices[2] == slices[3] < slices[1]
    assert sum(e.received_bytes for e in proxy.exchanges) == slices[0] + slices[1] + other
    assert {e.method for e in proxy.exchanges} == {"GET"}


def test_more_bits_later_move_only_what_is_missing(
    proxied: tuple[PackedCheckpoint, Proxy], finished_run: Any, tmp_path: Path
) -> None:
    checkpoint, proxy = proxied
    pull(checkpoint, tmp_path / "dir", 4, _silent)
    proxy.exchanges.clear()
    pulled = pull(checkpoint, tmp_path / "dir", 8, _silent)
    upper = checkpoint.manifest.slice_files[2] + checkpoint.manifest.slice_files[3]
    missing = sum(checkpoint.manifest.files[name].size_bytes for name in upper)
    config = checkpoint.manifest.files[CONFIG_FILE].size_bytes
    assert pulled.fetched_bytes == missing
    assert sum(e.received_bytes for e in proxy.exchanges) == missing + config
    assert _files(tmp_path / "dir") == _files(finished_run.checkpoint)
    proxy.exchanges.clear()
    assert pull(checkpoint, tmp_path / "dir", None, _silent).fetched_bytes == 0
    assert sum(e.received_bytes for e in proxy.exchanges) == config


_LOAD = """
import json, sys, torch
from mbq.artifacts.loading import load_model
out = []
for folder, average in ((sys.argv[1], 3.0), (sys.argv[2], 3.0)):
    model = load_model(folder)
    ids = torch.arange(2, 34)[None]
    uniform = []
    for bits in (2, 3, 4):
        model.set_bits(bits)
        uniform.append(model(ids).logits.double().sum().item())
    model.set_average_bits(average)
    finite = torch.isfinite(model(ids).logits).all().item()
    out.append([model.config.quantization_config.max_bits, uniform, finite])
print(json.dumps(out))
"""


def test_a_cut_checkpoint_loads_in_a_new_process(
    local: PackedCheckpoint, finished_run: Any, tmp_path: Path
) -> None:
    pull(local, tmp_path / "four", 4, _silent)
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "four"), str(finished_run.checkpoint)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    four, eight = json.loads(done.stdout.splitlines()[-1])
    assert (four[0], eight[0]) == (4, 8)
    assert four[1] == eight[1] and len(set(four[1])) == 3
    assert four[2] and eight[2]


def test_a_cut_checkpoint_can_be_pulled_from(local: PackedCheckpoint, tmp_path: Path) -> None:
    pull(local, tmp_path / "four", 4, _silent)
    cut = open_checkpoint(LocalStore(tmp_path / "four"))
    assert pull(cut, tmp_path / "again", None, _silent).max_bits == 4
    assert _files(tmp_path / "again") == _files(tmp_path / "four")
    pull(cut, tmp_path / "two", 2, _silent)
    assert verify(open_checkpoint(LocalStore(tmp_path / "two")), _silent) == []
    with pytest.raises(InputError, match="holds 4 bits of its checkpoint; pull from one that was"):
        pull(cut, tmp_path / "eight", 8, _silent)
    assert not (tmp_path / "eight").exists()


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 10, -2])
def test_widths_that_do_not_exist(local: PackedCheckpoint, tmp_path: Path, bits: int) -> None:
    with pytest.raises(InputError, match=f"--max-bits {bits}: .* 2, 4, 6, 8 bits"):
        pull(local, tmp_path / "dir", bits, _silent)
    assert not (tmp_path / "dir").exists()


def test_folders_that_would_be_spoilt(
    local: PackedCheckpoint, tiny_model: Path, tmp_path: Path
) -> None:
    before = _files(tiny_model)
    with pytest.raises(InputError, match="holds another model"):
        pull(local, tiny_model, None, _silent)
    assert _files(tiny_model) == before
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="is not a folder"):
        pull(local, tmp_path / "file", None, _silent)
    pull(local, tmp_path / "dir", 6, _silent)
    with pytest.raises(InputError, match="holds this checkpoint at 6 bits already"):
        pull(local, tmp_path / "dir", 4, _silent)
    other = PackedCheckpoint(
        local.store, local.manifest.model_copy(update={"run": "another", "hardware": ()})
    )
    with pytest.raises(InputError, match="holds another checkpoint"):
        pull(other, tmp_path / "dir", None, _silent)
    assert verify(open_checkpoint(LocalStore(tmp_path / "dir")), _silent) == []
    with pytest.raises(InputError, match="is where the checkpoint lies"):
        pull(open_checkpoint(LocalStore(tmp_path / "dir")), tmp_path / "dir", None, _silent)


@pytest.mark.parametrize("place", ["/proc", "/proc/new", "file/new", "x" * 300])
def test_folders_that_cannot_be_written_are_refused_before_anything_is_fetched(
    finished_run: Any, tmp_path: Path, place: str
) -> None:
    source = LocalStore(tmp_path / "source")
    for name in (MANIFEST_FILE, CONFIG_FILE):
        source.put(name, [(finished_run.checkpoint / name).read_bytes()])
    (tmp_path / "file").touch()
    folder = tmp_path / place
    with pytest.raises(InputError, match=f"cannot write into {folder} .* pull into a folder"):
        pull(open_checkpoint(source), folder, None, _silent)


def test_two_pulls_do_not_write_to_one_folder(
    local: PackedCheckpoint, finished_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "dir"
    folder.mkdir()
    other = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=rf"another pull writes to {folder}; wait"):
            pull(local, folder, None, _silent)
        assert _files(folder) == {}
    finally:
        os.close(other)
    pull(local, folder, None, _silent)
    assert _files(folder) == _files(finished_run.checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json"])
def test_what_transformers_would_load_instead_is_noticed(
    local: PackedCheckpoint, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "dir"
    pull(local, folder, None, _silent)
    (folder / name).write_bytes(b"of another model")
    (fault,) = verify(open_checkpoint(LocalStore(folder)), _silent)
    assert fault.startswith(f"{name}: ")
    with pytest.raises(InputError, match=f"holds {name}, .* remove that"):
        pull(local, folder, None, _silent)


def test_a_damaged_manifest_is_mended_in_a_folder_that_is_named_as_users_do(
    local: PackedCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("dir")
    pull(local, folder, 4, _silent)
    with (folder / "manifest.json").open("ab") as file:
        file.write(b"damage")
    assert pull(local, folder, 4, _silent).fetched_bytes == 0
    assert verify(open_checkpoint(LocalStore(folder)), _silent) == []


def test_damage_is_named_and_mended(
    local: PackedCheckpoint, finished_run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "dir"
    pull(local, folder, None, _silent)
    base, first, second = (local.manifest.slice_files[e][0] for e in (0, 1, 2))
    data = bytearray((folder / base).read_bytes())
    data[-1] ^= 1
    (folder / base).write_bytes(data)
    (folder / first).unlink()
    with (folder / second).open("ab") as file:
        file.write(b"more")
    faults = verify(open_checkpoint(LocalStore(folder)), _silent)
    assert [fault.split(":")[0] for fault in faults] == [first, second, base]
    assert pull(local, folder, None, _silent).fetched_bytes == sum(
        local.manifest.files[name].size_bytes for name in (base, first)
    )
    assert _files(folder) == _files(finished_run.checkpoint)


@pytest.mark.parametrize("name", [CONFIG_FILE, INDEX_FILE])
def test_edited_documents_are_noticed(local: PackedCheckpoint, tmp_path: Path, name: str) -> None:
    for bits in (4, 8):
        folder = tmp_path / f"{bits}"
        pull(local, folder, bits, _silent)
        document = json.loads((folder / name).read_bytes())
        document["edited"] = True
        (folder / name).write_text(json.dumps(document))
        faults = verify(open_checkpoint(LocalStore(folder)), _silent)
        assert [fault.split(":")[0] for fault in faults] == [name]
        pull(local, folder, bits, _silent)
        assert verify(open_checkpoint(LocalStore(folder)), _silent) == []


def test_what_is_no_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    for place in (tiny_model, tmp_path / "nowhere"):
        with pytest.raises(NotFoundError, match=f"holds no {MANIFEST_FILE}"):
            open_checkpoint(open_store(str(place)))
