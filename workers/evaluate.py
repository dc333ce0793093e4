"""Perplexity of a model variant, block by block, and the table made of several.

A variant is one set of weights for the same model; `variants.py` names them.

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

from mbq.artifacts.documents import Row
from mbq.artifacts.elastic import elastic_linears
from mbq.artifacts.errors import NumericError
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.reference import round_to_nearest
from mbq.workers.model import Model, linears
from mbq.workers.variants import FULL, parse

# Logits of a large vocabulary are the largest tensor of all: at most this many at once.
_MAX_LOGITS = 2**24
# What exp still holds; no loss of a language model comes near.
_LARGEST_EXPONENT = 700.0


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

    Raises:
        NumericError: a loss is not finite.
    """
    hidden_BTH = model.embed(ids_BT)
    for index, block in enumerate(blocks):
        model.advance(block, index, hidden_BTH, microbatch)
        report((index + 1) / (model.block_count + 1))
    head = model.head()
    size = sequences_at_once(ids_BT.shape[1], int(model.config.vocab_size))
    losses: list[float] = []
    for part_BTH, ids in zip(hidden_BTH.split(size), ids_BT.split(size), strict=True):
        losses += losses_of_logits(head(part_BTH), ids)
    if not all(map(math.isfinite, losses)):
        raise NumericError(
            "losses are not finite: the model's activations overflow its dtype; use one with a "
            "larger range, as bfloat16"
        )
    return losses


@torch.no_grad()
def token_bits(model: Model, blocks: Iterable[nn.Module], ids_BT: Tensor) -> list[float]:
    """Code bits per weight that each token of a text gets, averaged over the linears' weights.

    Args:
        blocks: routed blocks in order; each is used once.
    """
    read_T = torch.zeros(ids_BT.numel(), dtype=torch.float64)
    weights = 0
    hidden_BTH = model.embed(ids_BT)

    def note(linear: nn.Module, arguments: tuple[Tensor]) -> None:
        nonlocal read_T, weights
        assert isinstance(linear, ElasticLinear)
        widths = torch.as_tensor(linear.shared.widths(arguments[0], linear.number))
        read_T += linear.weights * widths.cpu()
        weights += linear.weights

    for index, block in enumerate(blocks):
        for linear in elastic_linears(block):
            linear.register_forward_pre_hook(note)
        hidden_BTH = model.run(block, index, hidden_BTH)
    bits: list[float] = (read_T / weights).tolist()
    return bits


def sequences_at_once(length: int, vocabulary: int) -> int:
    """How many sequences may have their logits in memory."""
    return max(1, _MAX_LOGITS // (length * vocabulary))


def losses_of_logits(logits_BTV: Tensor, ids_BT: Tensor) -> list[float]:
    """Mean negative log likelihood per predicted token (nats) of each sequence."""
    target_BT = ids_BT[:, 1:].to(logits_BTV.device, torch.int64)
    loss = F.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), target_BT.flatten(), reduction="none"
    )
    means: list[float] = loss.view(target_BT.shape).mean(1).tolist()
    return means


def rounded_block(block: nn.Module, bits: int, group_size: int) -> nn.Module:
    """The block with round-to-nearest weights, changed in place."""
    for linear in linears(block).values():
        linear.weight.copy_(round_to_nearest(linear.weight, bits, group_size))
    return block


def perplexity_of(losses: Sequence[float]) -> tuple[float, float]:
    """Perplexity, and its standard error, from the mean losses of two sequences or more."""
    mean = statistics.fmean(losses)
    perplexity = math.exp(min(mean, _LARGEST_EXPONENT))
    # First order: the error of exp(x) is exp(x) times the error of x.
    return perplexity, perplexity * _standard_error(losses)


def table(
    losses: Mapping[str, Sequence[float]],
    realised_bits: Mapping[str, float],
    other_bits: Mapping[str, float],
) -> list[Row]:
    """Perplexities and their paired gaps to full precision, in the order given.

    Args:
        realised_bits: code bits of each variant but the full one.
        other_bits: what each of them reads beside its codes, per weight.
    """
    full = losses[FULL]
    return [
        _row(variant, values, full, realised_bits.get(variant), other_bits.get(variant, 0.0))
        for variant, values in losses.items()
    ]


def _row(
    variant: str,
    values: Sequence[float],
    full: Sequence[float],
    realised_bits: float | None,
    other_bits: float,
) -> Row:
    gaps = [value - reference for value, reference in zip(values, full, strict=True)]
    perplexity, perplexity_error = perplexity_of(values)
    return Row(
        variant=variant,
        bits=parse(variant)[1],
        realised_bits=realised_bits,
        total_bits=None if realised_bits is None else realised_bits + other_bits,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        gap=statistics.fmean(gaps),
        gap_error=_standard_error(gaps),
    )


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
