"""Runs, copies and the command line that tests share."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mbq.artifacts.documents import RunDocument
from mbq.artifacts.store import LocalStore
from mbq.orchestrator.cli import main


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


@pytest.fixture
def invoke(tmp_path: Path) -> Callable[..., Result]:
    """A command of the user's; keywords are variables of its environment."""

    def run(*arguments: str, **environment: str) -> Result:
        home = {"MBQ_HOME": str(tmp_path / "home"), "MBQ_STORE": "", "MBQ_ADDRESS": ""}
        return CliRunner().invoke(main, list(arguments), env=home | environment)

    return run


@pytest.fixture
def spec(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Where a spec was written."""

    def write(document: dict[str, Any]) -> str:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(document))
        return str(path)

    return write
