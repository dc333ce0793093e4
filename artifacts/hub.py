"""Models of the Hugging Face Hub: the commit behind a name, its files, and the shapes in them.

What the Hub answers becomes one of our errors: InputError for what the user must change,
StoreError for what may pass.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mbq.artifacts.errors import InputError, MbqError, StoreError, first_line
from mbq.artifacts.tensors import Entry


def resolve_commit(repository: str, revision: str) -> str:
    """The commit that a branch, a tag or a commit stands for. Raises InputError."""
    from huggingface_hub import HfApi

    with _errors(repository):
        commit = HfApi().model_info(repository, revision=revision, timeout=15).sha
    if commit is None:
        raise InputError(f"model.source: the Hub names no commit for {repository}@{revision}")
    return commit


def download(repository: str, commit: str, name: str) -> Path | None:
    """Local path of one file, downloaded if need be; None when there is no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # Tasks read files long after the repository was looked up: the network may come back.
    with _errors(repository, unreachable=StoreError):
        try:
            return Path(hf_hub_download(repository, name, revision=commit))
        except LocalEntryNotFoundError as error:
            # A subclass of EntryNotFoundError that says the opposite: nobody was asked.
            raise StoreError(f"cannot reach the Hub for {repository}/{name}") from error
        except EntryNotFoundError:
            return None


def read_entries(repository: str, commit: str) -> dict[str, Entry]:
    """Every tensor by name, from the headers of the weight files.

    Raises:
        InputError: there are no weights that may be read.
        StoreError: the Hub cannot be reached.
    """
    from huggingface_hub import get_safetensors_metadata

    # Tasks ask, too.
    with _errors(repository, unreachable=StoreError):
        metadata = get_safetensors_metadata(repository, revision=commit)
    return {
        name: Entry(name, info.dtype, tuple(info.shape))
        for header in metadata.files_metadata.values()
        for name, info in header.tensors.items()
    }


@contextlib.contextmanager
def _errors(repository: str, unreachable: type[MbqError] = InputError) -> Iterator[None]:
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
        raise unreachable(
            f"model.source: cannot read {repository} from the Hub ({first_line(error)}); check the "
            "network, or give a local folder"
        ) from error
