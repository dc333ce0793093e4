"""What this user has on this machine: a folder, and in it a store, checkpoints, and a local Ray."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

from mbq.artifacts.errors import InputError
from mbq.cluster import head as heads
from mbq.cluster.jobs import Jobs

Say = Callable[[str], None]


def home() -> Path:
    """Where all of it lies: MBQ_HOME, or ~/.mbq-cluster."""
    try:
        return Path(os.environ.get("MBQ_HOME") or "~/.mbq-cluster").expanduser().resolve()
    except RuntimeError as error:
        raise InputError("MBQ_HOME is in the home of nobody; write the folder's path") from error


def default_store() -> str:
    """The store of runs that name none."""
    return str(home() / "store")


def head_folder() -> Path:
    """The state of the local Ray, of this machine: others may have the same home."""
    return home() / "head" / platform.node()


def find_local_head() -> heads.Head | None:
    """The local Ray, if it runs."""
    return heads.find_head(head_folder())


def start_local_head(say: Say) -> heads.Head:
    """The local Ray, started if it does not run. Raises as `head.start_head`."""
    head = find_local_head()
    if head is None:
        say("starting a local Ray (about 10 s)")
        head = heads.start_head(head_folder())
    return head


def jobs_of(head: heads.Head) -> Jobs:
    """The Jobs API of the local Ray."""
    return Jobs(head.address, heads.client_environment(head))


def find_jobs(address: str | None) -> Jobs | None:
    """The cluster to ask about runs: the one given, the local Ray if it runs, or none."""
    if address is not None:
        return Jobs(address)
    head = find_local_head()
    return jobs_of(head) if head else None
