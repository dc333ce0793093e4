"""Would it pay to know how sensitive the loss is to each token's errors?

    python benchmarks/oracle.py NAME RUN

A router expects a token's local error, channels weighed by the loss's mean sensitivity to each
(`workers/sensitivity.py`). Here oracles share the bits of the run's evaluation text, which no
router could do: `local` knows every token's true error, as the rival of that name, `loss` weighs it
also with the token's own squared gradient, a mean over channels, relative to that of all tokens,
`gradient` knows only that and the mean error. Thresholds are found on the text itself. Gaps and
errors are as `quality.py`'s. Writes benchmarks/results/<date>-oracle-NAME.json.

Legend: B sequences, T tokens, L linears of an input, E extra widths.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from provenance import provenance
from quality import open_run, our_entries, paired
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.checkpoint import block_prefix
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.shared_input import share_input
from mbq.kernels.widths import around
from mbq.workers.allocate import thresholds
from mbq.workers.determinism import attention
from mbq.workers.evaluate import sequence_losses
from mbq.workers.model import linears
from mbq.workers.opened import Opened
from mbq.workers.rivals import OracleRouter
from mbq.workers.settle import RoutedModel, Setting, run_settings
from mbq.workers.variants import FULL

RESULTS = Path(__file__).with_name("results")
AVERAGES = (2.25, 2.5, 2.75, 3.5)
KNOWN = ("local", "loss", "gradient")
# Of the evaluation text, from its start.
SEQUENCES = 64
SMALLEST = 1e-30


class InformedRouter(OracleRouter):
    """An oracle that has the squared gradients of every token of every microbatch.

    Attributes:
        log_gradient: by microbatch, log of the squared gradient over its mean: [L, T]; with none
            of them only the local error counts.
        knows_errors: whether errors are those of the token, or their mean.
    """

    log_gradient: Sequence[Tensor] = ()
    knows_errors = True
    calls = 0

    def forward(self, x: Tensor, linear: int) -> Tensor:
        bits = super().forward(x, linear)
        self.calls += 1
        return bits

    def log_earnings_of(self, x: Tensor, number: int) -> Tensor:
        log_ET = super().log_earnings_of(x, number)
        if not self.knows_errors:
            log_ET = log_ET.exp().mean(1, keepdim=True).log().expand_as(log_ET)
        if self.log_gradient:
            # Every linear asks once for each microbatch, in the order of the text.
            part = self.calls // len(self.linears) % len(self.log_gradient)
            log_ET = log_ET + self.log_gradient[part][number]
        return log_ET


@click.command()
@click.argument("name")
@click.argument("run")
def main(name: str, run: str) -> None:
    """Measure oracles on the evaluation text of a run."""
    opened = open_run(run)
    document = opened.document
    assert document.evaluation_tokens is not None
    ids_BT = opened.tokens(document.evaluation_tokens)[:SEQUENCES]
    full = our_entries(opened)[FULL]["losses"][:SEQUENCES]
    rows: dict[str, Any] = {}
    with attention():
        gradients = token_gradients(opened, ids_BT)
        for known in KNOWN:
            for average in AVERAGES:
                losses = oracle_losses(opened, ids_BT, gradients, known, average)
                rows[f"{known}-{average:g}"] = [*paired(losses, full)]
                click.echo(f"{known} {average:g}: {rows[f'{known}-{average:g}']}")
    result = {
        **provenance(),
        "run": document.run,
        "sequences": len(full),
        "gaps and errors": rows,
    }
    out = RESULTS / f"{result['date']}-oracle-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(out)


def token_gradients(opened: Opened, ids_BT: Tensor) -> dict[str, list[Tensor]]:
    """Mean squared gradient of the summed loss at each linear's output, by its name: [T] a part."""
    model = opened.model
    head = model.head()
    found: dict[str, list[Tensor]] = {name: [] for name in opened.linears}
    blocks = [model.block(index) for index in range(model.block_count)]
    for index, block in enumerate(blocks):
        for name, linear in linears(block).items():
            linear.register_forward_hook(watch(found[block_prefix(index) + name]))
    for ids in ids_BT.split(opened.spec.microbatch):
        hidden = model.embed(ids).requires_grad_(True)
        for index, block in enumerate(blocks):
            hidden = model.run(block, index, hidden)
        logits = head(hidden)[:, :-1].float()
        target = ids[:, 1:].to(torch.int64)
        F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").backward()
    return found


def watch(found: list[Tensor]) -> Any:
    def note(module: nn.Module, arguments: object, out: Tensor) -> None:
        out.register_hook(lambda gradient: found.append(gradient.square().mean(2).flatten()))

    return note


def oracle_losses(
    opened: Opened,
    ids_BT: Tensor,
    gradients: dict[str, list[Tensor]],
    known: str,
    average: float,
) -> list[float]:
    """Losses of the calibrated model whose bits an oracle shares."""
    precision = Precision(opened.spec.max_bits)
    model, microbatch = opened.model, opened.spec.microbatch

    def blocks() -> Iterator[nn.Module]:
        for index in range(model.block_count):
            yield oracle_block(opened, index, precision, gradients, known)

    precision.set_average_bits(average, opened.curves("linear"))
    routed = RoutedModel(model, blocks, precision, opened.router_weights)
    setting = Setting(average, precision.log_threshold)
    earned, _ = run_settings(routed, ids_BT, microbatch, [setting])
    precision.log_threshold = thresholds(earned[0], [average], around(average)[1])[0]
    return sequence_losses(model, blocks(), ids_BT, microbatch, lambda _: None)


def oracle_block(
    opened: Opened,
    index: int,
    precision: Precision,
    gradients: dict[str, list[Tensor]],
    known: str,
) -> nn.Module:
    """A calibrated block whose inputs ask an oracle."""
    block = opened.elastic_block(index, precision)
    source = opened.model.block(index)
    for name, served in opened.routers.items():
        worths = opened.log_worths(index, served)
        elastic = [block.get_submodule(linear) for linear in served]
        weights = [source.get_parameter(f"{linear}.weight") for linear in served]
        router = InformedRouter(
            [e for e in elastic if isinstance(e, ElasticLinear)],
            weights,
            [*opened.importance(index, served).values()],
            worths,
            precision,
        )
        router.knows_errors = known != "gradient"
        if known != "local":
            names = [opened.linear(index, linear).name for linear in served]
            relative = [relative_logs(gradients[name]) for name in names]
            router.log_gradient = [torch.stack(parts) for parts in zip(*relative, strict=True)]
        parent, _, child = name.rpartition(".")
        block.get_submodule(parent).add_module(child, router)
        share_input(router.linears, router)
    return block


def relative_logs(parts: Sequence[Tensor]) -> list[Tensor]:
    mean = torch.cat(list(parts)).mean()
    return [(part / mean).clamp(min=SMALLEST).log() for part in parts]


if __name__ == "__main__":
    main()
