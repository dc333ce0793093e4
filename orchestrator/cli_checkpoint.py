"""`eval` and `bench`: how good and how fast a packed checkpoint is on this machine."""

import click

from mbq.artifacts.errors import InputError
from mbq.orchestrator.options import json_option, say, store_option, store_uri


@click.command("eval")
@click.argument("target", metavar="RUN|URI|DIR")
@click.option("--bits", help="Widths, as in 2,4 [default: all that are stored].")
@click.option("--average-bits", help="Average widths, as in 2.5,3.2.")
@click.option("--dataset", default=None, help="wikitext2, c4, ptb, text, jsonl or stdlib.")
@click.option("--file", "files", multiple=True, help="A text file (or jsonl); repeatable.")
@click.option("--tokens", type=int, help="How many tokens of the text at most [default: 131072].")
@click.option(
    "--sequence-length", type=int, help="Tokens per sequence [default: 2048, or all positions]."
)
@store_option
@json_option
def evaluate(
    target: str,
    bits: str | None,
    average_bits: str | None,
    dataset: str | None,
    files: tuple[str, ...],
    tokens: int | None,
    sequence_length: int | None,
    store: str | None,
    as_json: bool,
) -> None:
    """Perplexity of a packed checkpoint, loaded here. A run's own text is the default."""
    from mbq.orchestrator import display
    from mbq.orchestrator import evaluate as evaluating

    cut = {"tokens": tokens, "sequence_length": sequence_length}
    cut = {name: value for name, value in cut.items() if value is not None}
    text = None
    if dataset or files:
        text = {"dataset": dataset or "text", "files": list(files), **cut}
    elif cut:
        raise InputError(
            "--tokens and --sequence-length are of a text; give --dataset or --file, or neither: "
            "then a run is measured on its own text"
        )
    rows = evaluating.evaluate(target, store_uri(store), bits, average_bits, text, say)
    if as_json:
        click.echo(display.to_json(rows))
        return
    for row in rows:
        shared = "average_bits" in row
        width = f"average {row['average_bits']:g}" if shared else f"{row['bits']}"
        read = f" ({row['realised_bits']:.2f} read)" if shared else ""
        perplexity = f"{row['perplexity']:.3f} ± {row['perplexity_error']:.3f}"
        click.echo(f"{width} bits{read}: {perplexity}")


@click.command()
@click.argument("target", metavar="RUN|URI|DIR")
@store_option
@json_option
def bench(target: str, store: str | None, as_json: bool) -> None:
    """Check a packed checkpoint's linears against float64 here and, on a GPU, time them."""
    from mbq.orchestrator import bench as benching
    from mbq.orchestrator import display

    records = benching.bench(target, store_uri(store), say)
    if as_json:
        click.echo(display.to_json([record.model_dump(mode="json") for record in records]))
        return
    for line in display.validation_lines(records):
        click.echo(line)
