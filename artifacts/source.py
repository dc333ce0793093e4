"""A source checkpoint: a local folder, a prefix of an object store, or a Hub repository.

Knows names, shapes and digests, never tensors: everything here works without torch, so what is no
model is refused before any heavy import. Only safetensors files are read; pickled weights are not.
Folders and object stores are read in ranges, block by block, and once their digests are known
everything is held against them: a model that changes under a run is an error, not another result.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbq.artifacts import hub
from mbq.artifacts.digests import CheckedObject, Digest, digest_of, read_chunks
from mbq.artifacts.errors import CorruptError, InputError, NotFoundError, StoreError
from mbq.artifacts.spec import is_path
from mbq.artifacts.store import WORKING_SECONDS, LocalStore, Store, is_name, open_store
from mbq.artifacts.tensors import Entry, TensorFile, open_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Tokenizers of large vocabularies have tens of megabytes; nothing but weights has more.
_MAX_FILE_BYTES = 256 * 1024 * 1024
_MAX_JSON_BYTES = 16 * 1024 * 1024
# Early LLaMA checkpoints store this buffer, which every model computes for itself.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies.

    Attributes:
        location: a local folder, an `s3://` URI, or a repository id such as
            `meta-llama/Llama-2-13b-hf`.
        revision: the repository's commit; None for anything else.
        files: digests of its files, to hold what is read against; None if they are not known.
    """

    location: str
    revision: str | None = None
    files: Mapping[str, Digest] | None = None

    def read(self, name: str) -> bytes | None:
        """A whole file that is no weight file; None when there is no such file.

        Raises:
            CorruptError: it is not what its digest says.
            StoreError: it cannot be read.
        """
        store = self._holder(name)
        if store is None:
            return None
        try:
            if self.files is not None and name in self.files:
                return CheckedObject(store, name, self.files[name]).read()
            return store.read(name, 0, _MAX_FILE_BYTES)
        except NotFoundError:
            return None

    def require(self, name: str) -> bytes:
        """`read` for a file that must be there. Raises InputError if it is not."""
        data = self.read(name)
        if data is None:
            raise self._lacks(name)
        return data

    def open(self, file: str) -> TensorFile:
        """A weight file, read tensor by tensor.

        Raises:
            CorruptError: it is no safetensors file.
            InputError: there is no such file.
        """
        if file not in self._opened:
            store = self._holder(file)
            if store is None or store.stat(file) is None:
                raise self._lacks(file)
            digest = self.files.get(file) if self.files is not None else None
            self._opened[file] = open_tensors(store, file, digest)
        return self._opened[file]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config = self._parse("config.json", self.require("config.json"))
        sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
        missing = [key for key in sizes if not isinstance(config.get(key), int)]
        if not isinstance(config.get("model_type"), str) or missing:
            what = ", ".join(missing) or "model_type"
            raise InputError(
                f"model.source: config.json of {self.location} names no {what}; fetch it again"
            )
        return config

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Name of every tensor and the file that holds it."""
        index = self.read(_INDEX)
        if index is None:
            names = dict.fromkeys(self._header(_SINGLE), _SINGLE)
        else:
            found = self._parse(_INDEX, index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise InputError(
                    f"model.source: {_INDEX} of {self.location} has no weight_map; fetch it again"
                )
            names = found
            if not all(isinstance(file, str) and is_name(file) for file in names.values()):
                raise InputError(
                    f"model.source: {_INDEX} of {self.location} names files outside its folder"
                )
        return {name: file for name, file in names.items() if not name.endswith(_COMPUTED)}

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by name. Reads the headers of the weight files, nothing else."""
        if self.revision is not None:
            entries = hub.read_entries(self.location, self.revision)
        else:
            files = sorted(set(self.weight_map.values()))
            headers = [(name, file, e) for file in files for name, e in self._header(file).items()]
            entries = {name: e for name, _, e in headers}
            there = {name: file for name, file, _ in headers if not name.endswith(_COMPUTED)}
            if there != self.weight_map:
                raise InputError(
                    f"model.source: {_INDEX} of {self.location} does not name the tensors that its "
                    "files hold; fetch it again"
                )
        return {name: entry for name, entry in entries.items() if not name.endswith(_COMPUTED)}

    @cached_property
    def digests(self) -> dict[str, Digest] | None:
        """Digests of the files that make the model, read in full; None for a commit."""
        if self.revision is not None:
            return None
        names = ["config.json", *TOKENIZER_FILES, *sorted(set(self.weight_map.values()))]
        store = open_store(self.location, WORKING_SECONDS)
        present = [name for name in names if store.stat(name) is not None]
        with ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: digest_of(read_chunks(store, name)), present)
            return dict(zip(present, digests, strict=True))

    @property
    def digest(self) -> str:
        """What the model's bytes are: the commit, or the sha256 over its files."""
        if self.digests is None:
            return f"{self.location}@{self.revision}"
        lines = [f"{digest.sha256}  {name}\n" for name, digest in self.digests.items()]
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def _opened(self) -> dict[str, TensorFile]:
        return {}

    def _holder(self, name: str) -> Store | None:
        """The store that holds a file under its name, downloaded if need be."""
        if self.revision is None:
            return open_store(self.location, WORKING_SECONDS)
        path = hub.download(self.location, self.revision, name)
        return None if path is None else LocalStore(path.parent)

    def _lacks(self, name: str) -> InputError:
        return InputError(
            f"model.source: {self.location} has no {name}; give a folder or repository in "
            "Hugging Face layout with safetensors weights (pickled weights are not read)"
        )

    def _header(self, file: str) -> dict[str, Entry]:
        try:
            return self.open(file).entries
        except (CorruptError, StoreError) as error:
            raise InputError(
                f"model.source: {self.location}/{file}: {error}; fetch it again"
            ) from error

    def _parse(self, name: str, data: bytes) -> dict[str, Any]:
        if len(data) > _MAX_JSON_BYTES:
            raise InputError(
                f"model.source: {name} of {self.location} has {len(data):,} bytes; no such file has"
            )
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"model.source: {name} of {self.location} is not JSON ({error}); fetch it again"
            ) from error
        if not isinstance(document, dict):
            raise InputError(
                f"model.source: {name} of {self.location} holds no JSON object; fetch it again"
            )
        return document


def open_source(location: str, revision: str) -> Source:
    """Find a checkpoint and fix what it is: a folder, a prefix, or a repository's present commit.

    Raises:
        InputError: there is none, or the Hub or the object store cannot be used.
    """
    if "://" in location:
        try:
            store = open_store(location)
            found = store.stat("config.json")
        except (InputError, StoreError) as error:
            raise InputError(f"model.source: {error}") from error
        if found is None:
            raise InputError(
                f"model.source: there is no config.json in {location}; give the prefix of a "
                "model in Hugging Face layout"
            )
        return Source(store.uri)
    if os.path.isdir(location):
        return Source(str(Path(location).resolve()))
    if is_path(location) or location.count("/") != 1:
        raise InputError(
            f"model.source: there is no folder {location}; give a folder that exists or a "
            "repository id such as meta-llama/Llama-2-13b-hf"
        )
    return Source(location, hub.resolve_commit(location, revision))
