"""Perplexity of a packed checkpoint at several widths, loaded as its users load it.

Unlike a run's own evaluation tasks, which go block by block, this loads the whole model through
transformers in this process and changes its width while running.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mbq.artifacts import keys
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.spec import Evaluation, explain
from mbq.orchestrator.status import checkpoint_location, locate
from mbq.workers.data import Tokens, evaluation_tokens

_DEFAULT_LENGTH = 2048


def evaluate(
    target: str,
    store_uri: str,
    bits: str,
    text: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Perplexity and its standard error at each width.

    Args:
        target: a folder with a packed checkpoint, or a run.
        bits: widths, separated by commas.
        text: fields of an `Evaluation`; default: the run's own evaluation tokens.

    Raises:
        InputError: no text was given for a folder, or a width is not stored.
        NotFoundError: there is no such checkpoint.
    """
    widths = _parse_bits(bits)
    folder, tokens = _find(target, store_uri, text)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mbq.artifacts.loading import load_model
    from mbq.workers.determinism import attention
    from mbq.workers.evaluate import losses_of_logits, sequences_at_once

    disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_model(folder).eval()
    model.to(device)
    size = sequences_at_once(tokens.shape[1], model.config.vocab_size)
    rows = []
    for width in widths:
        model.set_bits(width)
        losses: list[float] = []
        with torch.inference_mode(), attention():
            for part in torch.from_numpy(tokens).long().split(size):
                losses += losses_of_logits(model(part.to(device)).logits, part)
        perplexity = math.exp(statistics.fmean(losses))
        error = statistics.stdev(losses) / math.sqrt(len(losses))
        say(f"evaluated {tokens.size:,} tokens at {width} bits")
        rows.append(
            {"bits": width, "perplexity": perplexity, "perplexity_error": perplexity * error}
        )
    return rows


def _find(target: str, store_uri: str, text: Mapping[str, Any] | None) -> tuple[str, Tokens]:
    """The checkpoint's folder and the tokens to evaluate it on."""
    if (Path(target) / "config.json").is_file():
        folder = target
    else:
        store, document = locate(target, store_uri)
        folder = checkpoint_location(store, document)
        if text is None:
            if document.evaluation_tokens is None:
                raise InputError(f"run {document.run} has no evaluation text; give --dataset")
            return folder, _stored_tokens(store, document.evaluation_tokens.sha256)
    if text is None:
        raise InputError(f"{target} is a folder and names no text; give --dataset or --file")
    source = Source(folder)
    positions = int(source.config.get("max_position_embeddings", _DEFAULT_LENGTH))
    text = {"sequence_length": min(_DEFAULT_LENGTH, positions), **text}
    try:
        evaluation = Evaluation.model_validate(text)
    except ValidationError as error:
        raise InputError(explain(error)) from error
    if evaluation.sequence_length > positions:
        raise InputError(
            f"--sequence-length {evaluation.sequence_length} is more than the model's {positions} "
            f"positions; use at most {positions}"
        )
    return folder, evaluation_tokens(evaluation, source)


def _stored_tokens(store: Any, sha256: str) -> Tokens:
    import numpy as np

    from mbq.artifacts.tensors import open_tensors

    file = open_tensors(store, keys.blob_key(sha256))
    tokens: Tokens = np.frombuffer(file.read("tokens"), dtype="<i4")
    return tokens.reshape(file.entries["tokens"].shape).copy()


def _parse_bits(bits: str) -> list[int]:
    try:
        return [int(part) for part in bits.split(",")]
    except ValueError as error:
        raise InputError(f"--bits {bits}: write widths separated by commas, as in 2,4") from error
