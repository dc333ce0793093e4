"""Runs and copies that the driver's tests share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mbq.artifacts.documents import RunDocument
from mbq.artifacts.store import LocalStore


@pytest.fixture
def write(
    store: LocalStore, write_run: Callable[..., RunDocument]
) -> Callable[[dict[str, Any]], Any]:
    return lambda document: write_run(store, document)


@pytest.fixture
def finished_copy(finished_run: Any, tmp_path: Path) -> LocalStore:
    """The store of the finished run, to be damaged."""
    return LocalStore(Path(shutil.copytree(finished_run.store.root, tmp_path / "finished")))


@pytest.fixture
def model_copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))
