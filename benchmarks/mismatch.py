"""Codes calibrated at one width and read at another: the jump that an elastic checkpoint has not.

    python benchmarks/mismatch.py NAME RUN

Every block of the run's model is trained at 2, at 3 and at 4 bits alone, on the inputs of the
full-precision model: its ranges (`clip`, OmniQuant's learnable clipping) or ranges and weights
(`weights`). What was trained for fewer bits is then quantized at more, too, without training again.
MoBiQuant's experiment (arXiv 2602.20191) in small. Beside it are the run's own rows. Writes
benchmarks/results/<date>-mismatch-NAME.json.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from provenance import provenance
from quality import open_run, our_entries, paired
from torch import Tensor, nn

from mbq.artifacts.spec import Optimisation
from mbq.kernels.fake_linear import fake_linear
from mbq.kernels.quantize import group_bounds, scale_and_zero
from mbq.workers.determinism import attention
from mbq.workers.evaluate import sequence_losses
from mbq.workers.model import Model, linears
from mbq.workers.opened import Opened
from mbq.workers.variants import FULL

RESULTS = Path(__file__).with_name("results")
SETTINGS = Optimisation()
INITIAL_LOGIT = 4.0
# Trained at, read at.
READINGS = {2: (2, 3, 4), 3: (3, 4), 4: (4,)}


class StaticLinear(nn.Module):
    """A linear quantized at `bits`, with trainable ranges and a trainable weight."""

    def __init__(self, linear: nn.Linear, group_size: int) -> None:
        super().__init__()
        weight_NK = linear.weight.detach().float()
        self.low_NG, self.high_NG = group_bounds(weight_NK, group_size)
        self.unit_NG, _ = scale_and_zero(self.low_NG, self.high_NG)
        self.value = nn.Parameter(weight_NK / self.unit_NG.repeat_interleave(group_size, dim=1))
        self.logits = nn.Parameter(torch.full((2, *self.low_NG.shape), INITIAL_LOGIT))
        self.bits = 0

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.logits.sigmoid()
        scale_NG, zero_NG = scale_and_zero(low * self.low_NG, high * self.high_NG)
        rows = len(self.value)
        gain_N, bias_N = x.new_ones(rows), x.new_zeros(rows)
        power_K = x.new_ones(self.value.shape[1])
        return fake_linear(
            x, self.value, self.unit_NG, scale_NG, zero_NG, gain_N, bias_N, power_K, self.bits
        )


@click.command()
@click.argument("name")
@click.argument("run")
def main(name: str, run: str) -> None:
    """Train at 2, 3 and 4 bits, read what fewer bits gave at more."""
    opened = open_run(run)
    ours = our_entries(opened)
    full = ours.pop(FULL)["losses"]
    document = opened.document
    assert document.evaluation_tokens is not None
    ids = opened.tokens(document.calibration_tokens)
    text = opened.tokens(document.evaluation_tokens)
    rows: dict[str, Any] = {}
    with attention():
        for trained in ("clip", "weights"):
            for bits, readings in READINGS.items():
                blocks = train(opened, ids, bits, trained == "weights")
                for reading in readings:
                    shown = at_width(blocks, reading)
                    losses = sequence_losses(
                        opened.model, shown, text, opened.spec.microbatch, lambda _: None
                    )
                    gap, error = paired(losses, full)
                    rows[f"{trained} at {bits} bits, read at {reading}"] = [gap, error]
                    click.echo(f"{trained} at {bits}, read at {reading}: {gap:.4f} ± {error:.4f}")
    for variant, row in ours.items():
        rows[f"elastic {variant}"] = list(paired(row["losses"], full))
    result = {
        **provenance(),
        "propagation of the elastic rows": opened.spec.propagation,
        "gaps and errors": rows,
    }
    out = RESULTS / f"{result['date']}-mismatch-{name}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    click.echo(out)


def train(opened: Opened, ids_BT: Tensor, bits: int, weights: bool) -> list[nn.Module]:
    """All blocks, each trained alone at one width on full-precision inputs."""
    model = opened.model
    hidden_BTH = model.embed(ids_BT)
    blocks = []
    for index in range(model.block_count):
        block = model.block(index)
        with torch.no_grad():
            parts = [model.run(block, index, p) for p in hidden_BTH.split(opened.spec.microbatch)]
        target_BTH = torch.cat(parts)
        for name, linear in linears(block).items():
            block.set_submodule(name, StaticLinear(linear, opened.spec.group_size))
        list(at_width([block], bits))
        descend(model, block, index, hidden_BTH, target_BTH, weights)
        blocks.append(block)
        hidden_BTH = target_BTH
    return blocks


def descend(
    model: Model,
    block: nn.Module,
    index: int,
    hidden_BTH: Tensor,
    target_BTH: Tensor,
    weights: bool,
) -> None:
    """Adam on the block's output error, with the rates and passes of the product."""
    modules = [m for m in block.modules() if isinstance(m, StaticLinear)]
    groups = [{"params": [m.logits for m in modules], "lr": SETTINGS.clip_rate}]
    if weights:
        groups.append({"params": [m.value for m in modules], "lr": SETTINGS.weight_rate})
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(index)
    batches = -(-len(target_BTH) // SETTINGS.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, SETTINGS.passes * batches)
    for _ in range(SETTINGS.passes):
        order = torch.randperm(len(target_BTH), generator=generator)
        for batch in order.split(SETTINGS.batch_size):
            out = model.run(block, index, hidden_BTH[batch])
            optimiser.zero_grad(set_to_none=True)
            (out - target_BTH[batch]).square().mean().backward()
            optimiser.step()
            schedule.step()


def at_width(blocks: list[nn.Module], bits: int) -> Iterator[nn.Module]:
    """The same parameters, quantized at a width."""
    for block in blocks:
        for module in block.modules():
            if isinstance(module, StaticLinear):
                module.bits = bits
        yield block


if __name__ == "__main__":
    main()
