"""What the commands share: options and their defaults, and a word beside the results."""

import re
from collections.abc import Callable
from typing import Any

import click

from mbq.artifacts.errors import InputError

Command = Callable[..., Any]
_ADDRESS = re.compile(r"https?://([^/\s\[\]]+|\[[0-9a-fA-F:.]+\](:\d+)?)(/\S*)?")


def store_option(command: Command) -> Command:
    return click.option(
        "--store",
        envvar="MBQ_STORE",
        show_envvar=True,
        help="Folder, file:// or s3://bucket/prefix that holds the runs "
        "[default: $MBQ_HOME/store, else ~/.mbq-cluster/store].",
    )(command)


def address_option(command: Command) -> Command:
    return click.option(
        "--address",
        envvar="MBQ_ADDRESS",
        show_envvar=True,
        callback=_checked_address,
        help="Ray dashboard of the cluster, as http://host:8265 [default: a local Ray].",
    )(command)


def _checked_address(context: object, option: object, address: str | None) -> str | None:
    if address is not None and not _ADDRESS.fullmatch(address):
        raise InputError(
            f"--address {address}: write the address of the Ray dashboard, as in http://host:8265"
        )
    return address


def json_option(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def set_option(command: Command) -> Command:
    return click.option(
        "--set", "settings", multiple=True, metavar="a.b=c", help="Change a field of the spec."
    )(command)


def store_uri(store: str | None) -> str:
    from mbq.orchestrator.local import default_store

    return store or default_store()


def say(text: str) -> None:
    click.echo(text, err=True)
