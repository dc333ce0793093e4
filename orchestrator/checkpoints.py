"""Packed checkpoints by what users call them: a folder, a URI, or the run that made them."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from mbq.artifacts import keys
from mbq.artifacts.keys import MANIFEST_FILE
from mbq.artifacts.packed import PackedCheckpoint, Report, open_checkpoint
from mbq.artifacts.pull import Pulled, pull
from mbq.artifacts.sealed import document_sha256
from mbq.artifacts.store import WORKING_SECONDS, LocalStore, Store, open_store
from mbq.orchestrator.local import home
from mbq.orchestrator.status import locate, names_run, no_checkpoint

_SHOW_CURSOR = b"\x1b[?25h"


def find_checkpoint(target: str, uri: str) -> Store:
    """The store whose root is the checkpoint's folder.

    Args:
        target: a folder's path, a URI of a checkpoint, or a run as `locate` takes it.
        uri: of the store that holds the run.

    Raises:
        NotFoundError: there is no such run, or it has no checkpoint yet.
        InputError: several runs match, or the scheme is unknown.
    """
    if not names_run(target) or _is_folder(target):
        return open_store(target)
    store, document = locate(target, uri)
    if store.stat(keys.manifest_key(document.run)) is None:
        raise no_checkpoint(store, document)
    return open_store(f"{store.uri}/{keys.checkpoint_prefix(document.run)}")


def _is_folder(target: str) -> bool:
    """Whether a name that could be a run's is that of a folder here, and not of a run's own."""
    return os.path.isdir(target) and not os.path.isfile(f"{target}/{keys.SPEC_FILE}")


def pull_patiently(
    checkpoint: PackedCheckpoint, folder: Path, max_bits: int | None, report: Report
) -> Pulled:
    """Pull as `artifacts.pull` does, with the patience of work: a transfer may take hours."""
    patient = open_store(checkpoint.store.uri, WORKING_SECONDS)
    with killable():
        return pull(dataclasses.replace(checkpoint, store=patient), folder, max_bits, report)


@contextlib.contextmanager
def killable() -> Iterator[None]:
    """Ctrl-C ends the process at once, for work that may be killed at any moment.

    Otherwise it would wait for threads, and these for a store that does not answer.
    """

    def end(number: int, frame: object) -> None:
        if sys.stderr.isatty():
            # The progress bar hides it, and has no time to show it again.
            os.write(sys.stderr.fileno(), _SHOW_CURSOR)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def local_folder(store: Store, report: Report) -> Path:
    """A folder here with the checkpoint: its own, or one that it is pulled to.

    Raises:
        NotFoundError: there is no checkpoint.
    """
    checkpoint = open_checkpoint(store)
    if isinstance(store, LocalStore):
        return store.root
    manifest = checkpoint.manifest
    folder = home() / "checkpoints" / f"{manifest.run}-{document_sha256(store, MANIFEST_FILE)[:12]}"
    pull_patiently(checkpoint, folder, None, report)
    return folder
