"""The command line: parse, import what the command needs, call one function, print.

Heavy imports are inside the commands, so that `--help` answers at once. Flags win over MBQ_*
variables, which win over the spec, which wins over defaults. Exit codes: 0 done, 1 something
failed, 2 wrong input, 3 not found.
"""

import sys
from typing import TYPE_CHECKING, Any

import click

from mbq.artifacts.errors import InputError, MbqError, RunError, printable
from mbq.orchestrator.cli_checkpoint import bench, evaluate
from mbq.orchestrator.cli_head import head
from mbq.orchestrator.cli_store import gc, pull, verify
from mbq.orchestrator.options import (
    address_option,
    json_option,
    say,
    set_option,
    store_option,
    store_uri,
)

if TYPE_CHECKING:
    from mbq.artifacts.documents import RunDocument
    from mbq.artifacts.store import Store
    from mbq.cluster.jobs import Jobs


class _Commands(click.Group):
    """Turns our errors into one line and their exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except MbqError as error:
            click.echo(f"mbq-cluster: {printable(str(error))}", err=True)
            context.exit(error.exit_code)


@click.group(cls=_Commands)
@click.version_option(package_name="mbq-cluster")
def main() -> None:
    """One checkpoint of a causal LM that runs at 2 to 8 bits per weight (MoBiQuant)."""


@main.command()
@click.argument("spec", metavar="SPEC|PRESET")
@set_option
@store_option
@address_option
@click.option("--watch", "watching", is_flag=True, help="Stay and show progress.")
def submit(
    spec: str,
    settings: tuple[str, ...],
    store: str | None,
    address: str | None,
    watching: bool,
) -> None:
    """Start a run and print its id. The same work again attaches to the run there is."""
    from mbq.orchestrator import submit as submitting

    name, parsed = submitting.read_spec(spec, settings)
    prepared = submitting.prepare(name, parsed)
    chosen = submitting.choose_store(store or parsed.store, address, prepared.document.source)
    jobs = submitting.submit(prepared, chosen, address, say)
    click.echo(prepared.document.run)
    if store is None and parsed.store is not None:
        where = f"{chosen.uri}/runs/{prepared.document.run}"
        say(f"it is in the spec's store: `mbq-cluster watch {where}` follows it")
    if watching:
        _watch(chosen, prepared.document, jobs, as_json=False, to_stderr=True)


@main.command()
@click.argument("spec", metavar="SPEC|PRESET")
@set_option
@store_option
@address_option
@json_option
def check(
    spec: str, settings: tuple[str, ...], store: str | None, address: str | None, as_json: bool
) -> None:
    """Say what a run would do and need, or why it cannot work. Starts and writes nothing."""
    from mbq.orchestrator import display, estimate
    from mbq.orchestrator import submit as submitting

    name, parsed = submitting.read_spec(spec, settings)
    prepared = submitting.prepare(name, parsed)
    chosen = submitting.choose_store(store or parsed.store, address, prepared.document.source)
    submitting.try_out(prepared, chosen, address)
    found = estimate.estimate(prepared.document)
    click.echo(display.to_json(found) if as_json else estimate.to_text(found))


@main.command("list")
@store_option
@address_option
@json_option
def list_runs(store: str | None, address: str | None, as_json: bool) -> None:
    """List the runs of a store."""
    from mbq.artifacts.store import open_store, require_folder
    from mbq.orchestrator import display, status

    opened = open_store(store_uri(store))
    # The default one is made by the first run.
    if store:
        require_folder(opened)
    states, unreadable = status.states(opened, _jobs(address))
    for reason in unreadable:
        say(reason)
    if as_json:
        click.echo(display.to_json([display.run_json(state) for state in states]))
    else:
        display.STDOUT.print(display.run_table(states))


@main.command("status")
@click.argument("run")
@store_option
@address_option
@json_option
def show_status(run: str, store: str | None, address: str | None, as_json: bool) -> None:
    """Show one run: its state, and its results when it is done."""
    from mbq.orchestrator import display, status

    chosen, document = status.locate(run, store_uri(store))
    jobs = _jobs(address)
    state = status.state_of(
        chosen, document, jobs.latest(document.run, chosen.uri) if jobs else None
    )
    if as_json:
        results = status.results_of(chosen, document)
        click.echo(display.to_json(display.run_json(state, results)))
        return
    display.STDOUT.print(display.run_table([state]))
    if state.detail:
        click.echo(printable(state.detail))
    if state.state == "done":
        _print_results(chosen, document, to_stderr=False)


@main.command()
@click.argument("run")
@store_option
@address_option
@json_option
def watch(run: str, store: str | None, address: str | None, as_json: bool) -> None:
    """Follow a run to its end and print its results."""
    from mbq.orchestrator import status

    chosen, document = status.locate(run, store_uri(store))
    _watch(chosen, document, _jobs(address), as_json, to_stderr=False)


@main.command()
@click.argument("run")
@store_option
@address_option
def logs(run: str, store: str | None, address: str | None) -> None:
    """Print what the driver of a run and its tasks printed."""
    from mbq.artifacts.errors import NotFoundError
    from mbq.orchestrator import status

    chosen, document = status.locate(run, store_uri(store))
    jobs = _jobs(address)
    job = jobs.latest(document.run, chosen.uri) if jobs else None
    if jobs is None or job is None:
        raise NotFoundError(f"no cluster that can be reached knows run {document.run}")
    click.echo(jobs.logs(job), nl=False)


@main.command()
@click.argument("run")
@store_option
@address_option
def stop(run: str, store: str | None, address: str | None) -> None:
    """Stop a run. What is finished is kept; `resume` continues it."""
    from mbq.artifacts.errors import NotFoundError
    from mbq.orchestrator import status

    chosen, document = status.locate(run, store_uri(store))
    jobs = _jobs(address)
    job = jobs.latest(document.run, chosen.uri) if jobs else None
    if jobs is None or job is None or not job.alive:
        state = status.state_of(chosen, document, job).state
        if state == "running":
            if jobs is None:
                raise InputError(
                    f"run {document.run} was driven a moment ago, and no local Ray runs: give its "
                    "--address; of a local Ray that is gone the driver ends by itself"
                )
            raise InputError(
                f"run {document.run} seems to be driven on another cluster; give its --address"
            )
        raise NotFoundError(f"run {document.run} is {state}: there is nothing to stop")
    jobs.stop(job)
    typed = status.as_typed(chosen, document.run)
    say(f"run {document.run} is stopped; `mbq-cluster resume {typed}` continues it")


@main.command()
@click.argument("run")
@store_option
@address_option
@click.option("--watch", "watching", is_flag=True, help="Stay and show progress.")
def resume(run: str, store: str | None, address: str | None, watching: bool) -> None:
    """Continue a run that failed, was stopped or lost its cluster."""
    from mbq.orchestrator import status
    from mbq.orchestrator import submit as submitting

    chosen, document = status.locate(run, store_uri(store))
    jobs = submitting.resume(document, chosen, address, say)
    click.echo(document.run)
    if watching:
        _watch(chosen, document, jobs, as_json=False, to_stderr=True)


@main.command()
@click.argument("run")
@click.option(
    "--out", type=click.Path(dir_okay=False), help="File to write [default: RUN.html here]."
)
@store_option
def report(run: str, out: str | None, store: str | None) -> None:
    """Write one self-contained HTML file about a run: quality, where bits go, provenance."""
    from pathlib import Path

    from mbq.orchestrator import report as reporting
    from mbq.orchestrator import status

    chosen, document = status.locate(run, store_uri(store))
    path = Path(out or f"{document.run}.html")
    page = reporting.render(reporting.collect(chosen, document))
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: cannot write {path}: {error.strerror}") from error
    click.echo(path)


def _watch(
    store: "Store", document: "RunDocument", jobs: "Jobs | None", as_json: bool, to_stderr: bool
) -> None:
    from mbq.orchestrator import display, status

    try:
        with display.Watch() as live:
            state = status.follow(store, document, jobs, live.show)
    except KeyboardInterrupt as error:
        typed = status.as_typed(store, document.run)
        raise MbqError(
            f"run {document.run} goes on unwatched; `mbq-cluster watch {typed}` follows it, "
            f"`mbq-cluster stop {typed}` stops it"
        ) from error
    if as_json:
        results = status.results_of(store, document)
        click.echo(display.to_json(display.run_json(state, results)))
    if state.state != "done":
        raise RunError(f"run {document.run} is {state.state}: {state.detail}")
    if not as_json:
        _print_results(store, document, to_stderr)


def _print_results(store: "Store", document: "RunDocument", to_stderr: bool) -> None:
    from mbq.orchestrator import display, status

    console = display.STDERR if to_stderr else display.STDOUT
    results = status.results_of(store, document)
    if results is not None:
        console.print(display.result_table(results))
        if worse := display.lost_to_rounding(results.rows):
            console.print(worse, soft_wrap=True)
    for line in display.validation_lines(status.validations_of(store, document)):
        console.print(line, soft_wrap=True)
    console.print(f"checkpoint: {status.checkpoint_location(store, document)}", soft_wrap=True)


def _jobs(address: str | None) -> "Jobs | None":
    from mbq.orchestrator.local import find_jobs

    try:
        return find_jobs(address)
    except MbqError as error:
        if address is not None:
            raise
        # The store still knows what the local Ray can not say.
        say(str(error))
        return None


for _command in (evaluate, bench, head, pull, verify, gc):
    main.add_command(_command)

if __name__ == "__main__":
    sys.exit(main())
