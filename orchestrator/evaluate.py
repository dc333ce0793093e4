"""Perplexity of a packed checkpoint at several widths, loaded as its users load it.

Unlike a run's own evaluation tasks, which go block by block, this loads the whole model through
transformers in this process and changes its width while running.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mbq.artifacts import keys
from mbq.artifacts.config import CONFIG_FILE, folder_quantization
from mbq.artifacts.documents import Manifest
from mbq.artifacts.errors import InputError, RunError, first_line
from mbq.artifacts.sealed import find_document
from mbq.artifacts.source import Source
from mbq.artifacts.spec import Evaluation, explain
from mbq.artifacts.store import LocalStore
from mbq.kernels.widths import widths_up_to
from mbq.orchestrator.checkpoints import find_checkpoint, local_folder
from mbq.orchestrator.display import bar
from mbq.orchestrator.status import locate, names_run
from mbq.workers.data import Tokens, evaluation_tokens

_DEFAULT_LENGTH = 2048
# That set fields of an `Evaluation`.
_OPTIONS = {
    "dataset": "--dataset",
    "files": "--file",
    "tokens": "--tokens",
    "sequence_length": "--sequence-length",
}


def evaluate(
    target: str,
    store_uri: str,
    bits: str | None,
    average_bits: str | None,
    text: Mapping[str, Any] | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Perplexity, its standard error and the bits that were read, at each width.

    Args:
        target: a folder with a packed checkpoint, or a run.
        bits: widths of every token, separated by commas; default: all that are stored, unless
            there are average widths.
        average_bits: average widths, separated by commas.
        text: fields of an `Evaluation`; default: the run's own evaluation tokens.

    Raises:
        InputError: no text was given for a folder, or a width is not stored.
        NotFoundError: there is no such checkpoint.
        RunError: it does not fit on the GPU.
    """
    widths = [("bits", width) for width in _parse("--bits", bits, int)]
    widths += [("average_bits", width) for width in _parse("--average-bits", average_bits, float)]
    folder, own = _find(target, store_uri, text)
    stored = _stored_bits(folder)
    widths = widths or [("bits", width) for width in stored]
    for kind, width in widths:
        if not stored[0] <= width <= stored[-1] or (kind == "bits" and width not in stored):
            option = f"--{kind.replace('_', '-')}"
            raise InputError(f"{option} {width:g}: {_what_runs(folder, stored, width)}")
    tokens = own if own is not None else _text_tokens(folder, text or {})
    import torch
    from transformers.utils.logging import disable_progress_bar

    from mbq.artifacts.loading import load_model

    disable_progress_bar()
    model: Any = load_model(folder).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
        return [_measure(model, kind, width, tokens, say) for kind, width in widths]
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"the model does not fit on this GPU ({first_line(error)}); with CUDA_VISIBLE_DEVICES= "
            "in front the command takes the CPU"
        ) from error


def _measure(
    model: Any, kind: str, width: float, tokens: Tokens, say: Callable[[str], None]
) -> dict[str, Any]:
    """One width of a loaded model."""
    import torch

    from mbq.workers.determinism import attention
    from mbq.workers.evaluate import losses_of_logits, perplexity_of, sequences_at_once

    getattr(model, f"set_{kind}")(width)
    losses: list[float] = []
    size = sequences_at_once(tokens.shape[1], model.config.vocab_size)
    with torch.inference_mode(), attention():
        for part in torch.from_numpy(tokens).long().split(size):
            losses += losses_of_logits(model(part.to(model.device)).logits, part)
    perplexity, error = perplexity_of(losses)
    say(f"evaluated {tokens.size:,} tokens at {width:g} bits")
    return {
        kind: width,
        "realised_bits": model.realised_bits(),
        "perplexity": perplexity,
        "perplexity_error": error,
    }


def _stored_bits(folder: str) -> list[int]:
    return list(widths_up_to(folder_quantization(Path(folder)).max_bits))


def _what_runs(folder: str, stored: Sequence[int], width: float) -> str:
    """The widths of a checkpoint for who asked for another one, and how to have that one."""
    manifest = find_document(LocalStore(Path(folder)), keys.MANIFEST_FILE, Manifest)
    cut = manifest is not None and stored[-1] < width <= manifest.max_bits
    averages = " and averages between them" if len(stored) > 1 else ""
    more = "; pull it with a larger --max-bits" if cut else ""
    return f"{folder} runs at {', '.join(map(str, stored))} bits{averages}{more}"


def _find(target: str, store_uri: str, text: Mapping[str, Any] | None) -> tuple[str, Tokens | None]:
    """The checkpoint's folder, pulled if it is not here, and a run's own tokens without a text."""
    here = os.path.isfile(f"{target}/{CONFIG_FILE}")
    if text is None and (here or not names_run(target)):
        raise InputError(f"{target} is no run and names no text; give --dataset or --file")
    tokens = _run_tokens(target, store_uri) if text is None else None
    if here:
        folder = target
    else:
        with bar("pulling") as show:
            folder = str(local_folder(find_checkpoint(target, store_uri), show))
    return folder, tokens


def _text_tokens(folder: str, text: Mapping[str, Any]) -> Tokens:
    source = Source(folder)
    positions = int(source.config.get("max_position_embeddings", _DEFAULT_LENGTH))
    text = {"sequence_length": min(_DEFAULT_LENGTH, positions), **text}
    try:
        evaluation = Evaluation.model_validate(text)
    except ValidationError as error:
        raise _of_options(explain(error)) from error
    if evaluation.sequence_length > positions:
        raise InputError(
            f"--sequence-length {evaluation.sequence_length} is more than the model's {positions} "
            f"positions; use at most {positions}"
        )
    try:
        return evaluation_tokens(evaluation, source)
    except InputError as error:
        raise _of_options(str(error)) from error


def _of_options(fault: str) -> InputError:
    """What is wrong with a field of the evaluation, said of the option that sets it."""
    field, colon, rest = fault.partition(":")
    option = _OPTIONS.get(field.removeprefix("evaluation."), field)
    return InputError(option + colon + rest)


def _run_tokens(target: str, store_uri: str) -> Tokens:
    """The run's own evaluation tokens."""
    import numpy as np

    from mbq.artifacts.tensors import open_tensors

    store, document = locate(target, store_uri)
    blob = document.evaluation_tokens
    if blob is None:
        raise InputError(f"run {document.run} has no evaluation text; give --dataset")
    file = open_tensors(store, keys.blob_key(blob.sha256), blob)
    tokens: Tokens = np.frombuffer(file.read("tokens"), dtype="<i4")
    return tokens.reshape(file.entries["tokens"].shape).copy()


def _parse(option: str, widths: str | None, kind: type[int] | type[float]) -> list[float]:
    try:
        return [kind(part) for part in widths.split(",")] if widths is not None else []
    except ValueError as error:
        example = "2,4" if kind is int else "2.5,3"
        raise InputError(
            f"{option} {widths}: write widths separated by commas, as in {example}"
        ) from error
