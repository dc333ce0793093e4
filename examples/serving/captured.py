"""Decode from a step that was captured once, at a width that may change with every token.

    python examples/serving/captured.py CHECKPOINT --average-bits 4 --average-bits 2.5

Through `generate` a token takes as long as the host needs for the launches of a step; replayed from
a CUDA graph it takes what the GPU needs. A captured step follows whatever width is set between two
replays, so nothing is captured again. One sequence, greedy, in a cache of fixed size. Models whose
cache slides are not for it: they keep its place on the host. On a CPU the step runs as it is.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import AutoTokenizer, StaticCache

from mbq.artifacts.loading import load_model

# Whatever is captured runs before, so that all it needs is there.
_STEPS_BEFORE = 2


class Decoder:
    """Decodes one sequence after the other, each of up to `most_tokens` with its prompt."""

    def __init__(self, model: Any, most_tokens: int) -> None:
        self._model = model
        self._most_tokens = most_tokens
        self._cache = StaticCache(config=model.config, max_cache_len=most_tokens)
        self._token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self._position = torch.zeros_like(self._token)
        model.warm_up([1, most_tokens])
        self._next = self._captured() if model.device.type == "cuda" else self._step

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Iterator[int]:
        """Tokens that follow a prompt [1, T], until there is no room for more."""
        self._cache.reset()
        self._position.fill_(ids.shape[1])
        self._choose(self._model(ids, past_key_values=self._cache, use_cache=True).logits)
        for _ in range(self._most_tokens - ids.shape[1]):
            yield int(self._token)
            self._next()

    @torch.no_grad()
    def _step(self) -> None:
        """From one token to the next, in place: the cache moves on as well."""
        out = self._model(
            self._token,
            past_key_values=self._cache,
            position_ids=self._position,
            use_cache=True,
        )
        self._choose(out.logits)
        self._position += 1

    def _choose(self, logits: Tensor) -> None:
        self._token.copy_(logits[:, -1:].argmax(-1))

    def _captured(self) -> Callable[[], None]:
        for _ in range(_STEPS_BEFORE):
            self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompt", default="Item 1: ", show_default=True)
@click.option("--average-bits", "widths", type=float, multiple=True, default=(4.0, 2.5))
@click.option("--tokens", default=16, show_default=True, help="How many to decode at each width.")
def main(checkpoint: Path, prompt: str, widths: tuple[float, ...], tokens: int) -> None:
    """Continue a text with the model in CHECKPOINT, at one width after the other."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(checkpoint).to(device)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    decoder = Decoder(model, ids.shape[1] + len(widths) * tokens)
    decoded = decoder.decode(ids)
    for bits in widths:
        model.set_average_bits(bits)
        text = tokenizer.decode(list(islice(decoded, tokens)))
        click.echo(f"asked for {bits:.2f} bits, read {model.realised_bits():.2f}: {text!r}")


if __name__ == "__main__":
    main()
