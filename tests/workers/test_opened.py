"""A run as its tasks see it: what is measured is the checkpoint that users get."""

from typing import Any

import pytest
import torch

from mbq.artifacts.source import Source
from mbq.workers.blocks import variant_blocks
from mbq.workers.evaluate import sequence_losses
from mbq.workers.opened import Opened, RunRef


@pytest.mark.parametrize("variant", ["mbq-2", "mbq-8", "routed-2.5"])
def test_packed_variants_read_nothing_of_the_source(
    finished_run: Any, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    document = finished_run.document
    opened = Opened(RunRef(finished_run.store.uri, document.run, "cpu"))
    ids = opened.tokens(document.evaluation_tokens)[:2]
    # What is planned is planned by the source's headers.
    assert opened.linears and opened.shards and opened.model

    def refuse(source: Source, file: str) -> None:
        raise AssertionError(f"{file} of the source was opened")

    monkeypatch.setattr(Source, "open", refuse)
    made = variant_blocks(opened, variant, ids)
    losses = sequence_losses(made.model, made.blocks, ids, 2, lambda fraction: None)
    assert torch.tensor(losses).isfinite().all()
    with pytest.raises(AssertionError, match="of the source was opened"):
        opened.model.head()
