"""`mbq-cluster head`: the local Ray that runs are submitted to when no --address is given."""

import click

from mbq.artifacts.errors import MbqError
from mbq.orchestrator.options import json_option, say


@click.group()
def head() -> None:
    """The local Ray that runs are submitted to when no --address is given."""


@head.command("start")
def head_start() -> None:
    """Start it, if it does not run, and print its dashboard's address."""
    from mbq.orchestrator.local import start_local_head

    click.echo(start_local_head(say).address)


@head.command("stop")
def head_stop() -> None:
    """Stop it, and every run on it."""
    from mbq.artifacts.errors import NotFoundError
    from mbq.cluster.head import stop_head
    from mbq.orchestrator.local import find_local_head, head_folder, jobs_of

    found = find_local_head()
    if found is None:
        raise NotFoundError("no local Ray is running")
    # Drivers live in sessions of their own and would outlive the head.
    try:
        jobs = jobs_of(found)
        for job in jobs.list():
            if job.alive:
                jobs.stop(job)
    except MbqError as error:
        say(f"its drivers could not be asked to stop: {error}")
    stop_head(head_folder(), found)


@head.command("status")
@json_option
def head_status(as_json: bool) -> None:
    """Say whether it runs, where its dashboard is and where its token lies."""
    from mbq.artifacts.errors import NotFoundError
    from mbq.orchestrator import display
    from mbq.orchestrator.local import find_local_head

    found = find_local_head()
    if found is None:
        raise NotFoundError("no local Ray is running")
    if as_json:
        facts = {"address": found.address, "pid": found.pid, "token_file": found.token_file}
        click.echo(display.to_json(facts))
    else:
        click.echo(f"dashboard {found.address}, token in {found.token_file}, pid {found.pid}")
