"""A source checkpoint: a local folder or a Hugging Face repository, read file by file.

Knows names, shapes and digests, never tensors: everything here works without torch, so a wrong
model is refused before any heavy import. Only safetensors files are read; pickled weights are not.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbq.artifacts.errors import InputError
from mbq.artifacts.tensors import Entry

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies.

    Attributes:
        location: a local folder, or a repository id such as `meta-llama/Llama-2-13b-hf`.
        revision: the repository's commit; None for a local folder.
    """

    location: str
    revision: str | None = None

    def path(self, name: str) -> Path | None:
        """Local path of one file, downloaded if need be; None when there is no such file."""
        if self.revision is None:
            path = Path(self.location) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(self.location, name, revision=self.revision))
        except EntryNotFoundError:
            return None

    def require(self, name: str) -> Path:
        path = self.path(name)
        if path is None:
            raise InputError(
                f"model.source: {self.location} has no {name}; give a folder or repository in "
                "Hugging Face layout with safetensors weights"
            )
        return path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        path = self.require("config.json")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"model.source: {path} is not JSON ({error})") from error
        if not isinstance(config, dict) or "model_type" not in config:
            raise InputError(f"model.source: {path} names no model_type")
        return config

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Name of every tensor and the file that holds it."""
        index = self.path(_INDEX)
        if index is not None:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return dict.fromkeys(read_header(self.require(_SINGLE)), _SINGLE)

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by name. Reads the headers of the weight files, nothing else."""
        if self.revision is None:
            files = sorted(set(self.weight_map.values()))
            headers = [read_header(self.require(name)) for name in files]
            return {
                name: Entry(name, fields["dtype"], tuple(fields["shape"]))
                for header in headers
                for name, fields in header.items()
            }
        from huggingface_hub import get_safetensors_metadata

        metadata = get_safetensors_metadata(self.location, revision=self.revision)
        return {
            name: Entry(name, info.dtype, tuple(info.shape))
            for file in metadata.files_metadata.values()
            for name, info in file.tensors.items()
        }

    @cached_property
    def digest(self) -> str:
        """What the model's bytes are: the commit, or the sha256 over a local folder's files."""
        if self.revision is not None:
            return f"{self.location}@{self.revision}"
        names = ["config.json", *TOKENIZER_FILES, *sorted(set(self.weight_map.values()))]
        paths = {name: path for name in names if (path := self.path(name)) is not None}
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_sha256_file, paths.values()))
        lines = [f"{digest}  {name}\n" for name, digest in zip(paths, digests, strict=True)]
        return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def open_source(location: str, revision: str) -> Source:
    """Find a checkpoint and fix what it is: a local folder, or a repository's present commit.

    Raises:
        InputError: there is no such folder or repository, or the Hub cannot be reached.
    """
    if Path(location).is_dir():
        return Source(str(Path(location).resolve()))
    if location.startswith((".", "/", "~")) or location.count("/") != 1:
        raise InputError(
            f"model.source: there is no folder {location}; give a folder that exists or a "
            "repository id such as meta-llama/Llama-2-13b-hf"
        )
    return Source(location, _resolve_commit(location, revision))


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Tensors of a safetensors file: name to {dtype, shape, data_offsets}.

    Raises:
        InputError: the file is not safetensors.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise InputError(f"model.source: {path} is not a safetensors file")
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except ValueError as error:
            raise InputError(f"model.source: {path} has a broken header ({error})") from error
    header.pop("__metadata__", None)
    return header


def _resolve_commit(repository: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        commit = HfApi().model_info(repository, revision=revision, timeout=15).sha
    except GatedRepoError as error:
        raise InputError(
            f"model.source: {repository} is gated; accept its licence on huggingface.co, then run "
            "`hf auth login` here and on the cluster's nodes (or set HF_TOKEN there)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"model.source: the Hub has no repository {repository} that you may read; check the "
            "name, or log in with `hf auth login` if it is private"
        ) from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise InputError(
            f"model.source: cannot look up {repository} (revision {revision}) on the Hub: "
            f"{_first_line(error)}; check the revision and the network, or give a local folder"
        ) from error
    if commit is None:
        raise InputError(f"model.source: the Hub names no commit for {repository}@{revision}")
    return commit


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk
