"""`pull`, `verify` and `gc`: packed checkpoints out of a store, and a store kept clean."""

from pathlib import Path

import click

from mbq.artifacts.errors import CorruptError
from mbq.orchestrator.options import say, store_option, store_uri


@click.command()
@click.argument("source", metavar="RUN|URI")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--max-bits", type=int, help="Leave out what only wider weights need [default: all].")
@store_option
def pull(source: str, folder: Path, max_bits: int | None, store: str | None) -> None:
    """Download a packed checkpoint, or what fewer bits need of it.

    Every part is verified. Repeated, it fetches only what is missing or damaged: after a crash, or
    with more bits than before.
    """
    from mbq.artifacts.packed import open_checkpoint
    from mbq.orchestrator import display
    from mbq.orchestrator.checkpoints import find_checkpoint, pull_patiently

    checkpoint = open_checkpoint(find_checkpoint(source, store_uri(store)))
    with display.bar("pulling") as show:
        pulled = pull_patiently(checkpoint, folder, max_bits, show)
    say(
        f"{pulled.max_bits} bits in {folder}: {pulled.fetched_bytes:,} bytes fetched, "
        f"{pulled.kept_bytes:,} were there"
    )


@click.command()
@click.argument("target", metavar="RUN|URI|DIR")
@store_option
def verify(target: str, store: str | None) -> None:
    """Hold every byte of a packed checkpoint against its manifest."""
    from mbq.artifacts import packed
    from mbq.orchestrator import display
    from mbq.orchestrator.checkpoints import find_checkpoint, killable

    checkpoint = packed.open_checkpoint(find_checkpoint(target, store_uri(store)))
    with display.bar("verifying") as show, killable():
        faults = packed.verify(checkpoint, show)
    for fault in faults:
        say(fault)
    if faults:
        raise CorruptError(
            f"{target}: {len(faults)} of {len(checkpoint.manifest.files)} files are not what the "
            "manifest says; `mbq-cluster pull` mends a folder"
        )
    click.echo(f"{target} is what its manifest says")


@click.command()
@click.argument("store", metavar="STORE")
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
def gc(store: str, dry_run: bool) -> None:
    """Remove what no run of a store names: blobs, dead uploads, partial files.

    Nothing younger than a day is touched. To drop a run, delete its folder runs/RUN first.
    """
    from mbq.artifacts.garbage import find_garbage, remove_garbage
    from mbq.artifacts.store import open_store

    opened = open_store(store)
    garbage = find_garbage(opened)
    if not dry_run:
        remove_garbage(opened, garbage)
    for found in garbage.objects:
        click.echo(f"{found.size_bytes:>16,}  {found.key}")
    for unfinished in garbage.unfinished:
        click.echo(f"{unfinished.size_bytes:>16,}  {unfinished.key} (unfinished)")
    count = len(garbage.objects) + len(garbage.unfinished)
    verb = "would be removed from" if dry_run else "removed from"
    click.echo(f"{garbage.size_bytes:>16,}  bytes in {count} objects {verb} {opened.uri}")
