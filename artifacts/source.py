"""A source checkpoint: a local folder or a Hugging Face repository, read file by file.

Knows names, shapes and digests, never tensors: everything here works without torch, so a wrong
model is refused before any heavy import. Only safetensors files are read; pickled weights are not.

What the Hub answers becomes one of our errors: InputError for what the user must change,
StoreError for what may pass.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mbq.artifacts.errors import CorruptError, InputError, MbqError, StoreError
from mbq.artifacts.spec import is_path
from mbq.artifacts.store import LocalStore
from mbq.artifacts.tensors import Entry, open_tensors

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Early LLaMA checkpoints store this buffer, which every model computes for itself.
_COMPUTED = "rotary_emb.inv_freq"


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
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        # Tasks read files long after the repository was looked up: the network may come back.
        with _hub_errors(self.location, unreachable=StoreError):
            try:
                return Path(hf_hub_download(self.location, name, revision=self.revision))
            except LocalEntryNotFoundError as error:
                # A subclass of EntryNotFoundError that says the opposite: nobody was asked.
                raise StoreError(f"cannot reach the Hub for {self.location}/{name}") from error
            except EntryNotFoundError:
                return None

    def require(self, name: str) -> Path:
        path = self.path(name)
        if path is None:
            raise InputError(
                f"model.source: {self.location} has no {name}; give a folder or repository in "
                "Hugging Face layout with safetensors weights (pickled weights are not read)"
            )
        return path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        config = _read_json(self.require("config.json"))
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
        index = self.path(_INDEX)
        if index is None:
            names = dict.fromkeys(_read_header(self.require(_SINGLE)), _SINGLE)
        else:
            found = _read_json(index).get("weight_map")
            if not isinstance(found, dict) or not found:
                raise InputError(f"model.source: {index} has no weight_map; fetch it again")
            names = found
            if not all(isinstance(file, str) and "/" not in file for file in names.values()):
                raise InputError(f"model.source: {index} names files outside its folder")
        return {name: file for name, file in names.items() if not name.endswith(_COMPUTED)}

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor by name. Reads the headers of the weight files, nothing else."""
        entries: dict[str, Entry] = {}
        if self.revision is None:
            for file in sorted(set(self.weight_map.values())):
                entries |= _read_header(self.require(file))
        else:
            from huggingface_hub import get_safetensors_metadata

            with _hub_errors(self.location):
                metadata = get_safetensors_metadata(self.location, revision=self.revision)
            for header in metadata.files_metadata.values():
                for name, info in header.tensors.items():
                    entries[name] = Entry(name, info.dtype, tuple(info.shape))
        return {name: entry for name, entry in entries.items() if not name.endswith(_COMPUTED)}

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
    if is_path(location) or location.count("/") != 1:
        raise InputError(
            f"model.source: there is no folder {location}; give a folder that exists or a "
            "repository id such as meta-llama/Llama-2-13b-hf"
        )
    return Source(location, _resolve_commit(location, revision))


def _resolve_commit(repository: str, revision: str) -> str:
    from huggingface_hub import HfApi

    with _hub_errors(repository):
        commit = HfApi().model_info(repository, revision=revision, timeout=15).sha
    if commit is None:
        raise InputError(f"model.source: the Hub names no commit for {repository}@{revision}")
    return commit


@contextlib.contextmanager
def _hub_errors(repository: str, unreachable: type[MbqError] = InputError) -> Iterator[None]:
    """Say in our words what the Hub said, or that it said nothing."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        NotASafetensorsRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"model.source: {repository} is gated; accept its licence on huggingface.co, then run "
            "`hf auth login` here and on the cluster's nodes (or set HF_TOKEN there)"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise InputError(
            f"model.source: the Hub has no {repository} that you may read at that revision; check "
            "both names, or log in with `hf auth login` if it is private"
        ) from error
    except NotASafetensorsRepoError as error:
        raise InputError(
            f"model.source: {repository} holds no safetensors weights; pickled weights are not "
            "read, use a repository that was converted"
        ) from error
    except MbqError:
        raise
    except Exception as error:  # the client passes on whatever its HTTP library raises
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise unreachable(
            f"model.source: cannot read {repository} from the Hub ({reason}); check the network, "
            "or give a local folder"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"model.source: {path} is not JSON ({error}); fetch it again") from error
    if not isinstance(document, dict):
        raise InputError(f"model.source: {path} holds no JSON object; fetch it again")
    return document


def _read_header(path: Path) -> dict[str, Entry]:
    try:
        return open_tensors(LocalStore(path.parent), path.name).entries
    except (CorruptError, StoreError) as error:
        raise InputError(f"model.source: {path}: {error}; fetch it again") from error


def _sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk
