"""Perplexity of a model variant, block by block, and the table made of several.

A variant is one set of weights for the same model:

    full          the weights as they are
    rtn-<bits>    asymmetric round-to-nearest at one static width
    mbq-<bits>    the packed checkpoint at that width, read back from the store

Every predicted token counts once: a sequence of T tokens predicts T - 1. Standard errors are over
sequences; differences to full precision are paired, sequence by sequence, which removes most of
the noise that both share.

Legend: B sequences, T tokens, V vocabulary.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mbq.artifacts.manifest import Row
from mbq.kernels.reference import round_to_nearest
from mbq.workers.model import Model, linears

FULL = "full"


@torch.no_grad()
def sequence_losses(
    model: Model,
    blocks: Iterable[nn.Module],
    ids_BT: Tensor,
    microbatch: int,
    report: Callable[[float], None],
) -> list[float]:
    """Mean negative log likelihood per predicted token (nats) of each sequence.

    Args:
        blocks: the variant's blocks in order; each is used once, so it may be made on the fly.
        report: called with the finished fraction after every block.
    """
    hidden_BTH = model.embed(ids_BT)
    for index, block in enumerate(blocks):
        # Each part replaces its own input: memory is one set of hidden states, not two.
        for part in hidden_BTH.split(microbatch):
            part.copy_(model.run(block, index, part))
        report((index + 1) / (model.block_count + 1))
    head = model.head()
    losses: list[float] = []
    for part_BTH, ids in zip(hidden_BTH.split(microbatch), ids_BT.split(microbatch), strict=True):
        logits_BTV = head(part_BTH)[:, :-1].float()
        target_BT = ids[:, 1:].to(logits_BTV.device, torch.int64)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), reduction="none")
        losses += loss.view(target_BT.shape).mean(1).tolist()
    return losses


def rounded_block(block: nn.Module, bits: int, group_size: int) -> nn.Module:
    """The block with round-to-nearest weights, changed in place."""
    for linear in linears(block).values():
        linear.weight.copy_(round_to_nearest(linear.weight, bits, group_size))
    return block


def table(losses: Mapping[str, Sequence[float]]) -> list[Row]:
    """Perplexities and their paired gaps to full precision, in the order given."""
    full = losses[FULL]
    return [_row(variant, values, full) for variant, values in losses.items()]


def _row(variant: str, values: Sequence[float], full: Sequence[float]) -> Row:
    gaps = [value - reference for value, reference in zip(values, full, strict=True)]
    perplexity = math.exp(statistics.fmean(values))
    return Row(
        variant=variant,
        bits=None if variant == FULL else int(variant.partition("-")[2]),
        perplexity=perplexity,
        # First order: the error of exp(x) is exp(x) times the error of x.
        perplexity_error=perplexity * _standard_error(values),
        gap=statistics.fmean(gaps),
        gap_error=_standard_error(gaps),
    )


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
