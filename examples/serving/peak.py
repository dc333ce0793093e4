"""Serve one checkpoint with fewer bits when many requests wait, and with more when few do.

    python examples/serving/peak.py CHECKPOINT

A policy is a callable that is asked for the average width before every `generate`. This one looks
at the queue: up to two waiting requests are answered at 4 bits, eight or more at 2.5, and in
between the width falls evenly. The requests arrive in a burst, so the width rises again as the
queue drains; nothing is reloaded in between.
"""

from collections import deque
from pathlib import Path
from typing import Any

import click
from transformers import AutoTokenizer

from mbq.artifacts.loading import load_model
from mbq.artifacts.precision import set_policy

OFF_PEAK_BITS, PEAK_BITS = 4.0, 2.5
SHORT_QUEUE, LONG_QUEUE = 2, 8
NEW_TOKENS = 12


def bits_for(waiting: int) -> float:
    """Average bits for a queue of that length."""
    share = (waiting - SHORT_QUEUE) / (LONG_QUEUE - SHORT_QUEUE)
    return OFF_PEAK_BITS + (PEAK_BITS - OFF_PEAK_BITS) * min(max(share, 0.0), 1.0)


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--requests", default=10, show_default=True, help="Length of the burst.")
def main(checkpoint: Path, requests: int) -> None:
    """Answer a burst of requests with the model in CHECKPOINT."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = load_model(checkpoint)
    model.warm_up()
    queue = deque(f"Item {n}: " for n in range(requests))
    set_policy(model, lambda: bits_for(len(queue)))
    while queue:
        waiting = len(queue)
        ids = tokenizer(queue[0], return_tensors="pt").input_ids
        model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        queue.popleft()
        click.echo(
            f"{waiting} waiting: asked for {bits_for(waiting):.2f} bits, "
            f"read {model.realised_bits():.2f}"
        )


if __name__ == "__main__":
    main()
