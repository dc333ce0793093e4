"""Train a model like the demo's, from nothing: tokenizer first, then a small causal LM.

    python examples/demo/train.py OUT [--shape demo] [--steps 6000] [--seed 0] [--device cpu]

Shapes: `demo` is the demo's LLaMA; `qwen3` has norms on queries and keys, one key-value head for
four heads of 64; `deep` is a LLaMA of 24 narrow blocks. On a GPU a step is captured once as a graph
and replayed: such models are too small to keep one busy otherwise.

Text: the source of the running Python's standard library without the modules that heldout.txt
lists, shuffled by the seed. A document begins with <s>. Recipe: byte-level BPE of 2048 tokens;
sequences of 256 tokens, 16 a step; AdamW (betas 0.9 and 0.95, weight decay 0.1), peak rate 1.5e-3
after a tenth of the steps, then cosine to a tenth of it; gradients clipped to norm 1. The weights
are saved as bfloat16 safetensors in Hugging Face layout. 6000 steps are nine passes over the text;
the same seed on the same machine and Python gives the same weights.
"""

import math
import random
from collections.abc import Callable
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mbq.artifacts.spec import Text
from mbq.workers.data import library_modules

SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_RATE = 1.5e-3
VOCABULARY = 2048
# Before a step is captured: what libraries make at first use must exist.
WARM_UP_STEPS = 3
HELD_OUT = Path(__file__).with_name("heldout.txt")


COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: dict[str, PreTrainedConfig] = {
    "demo": LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        **COMMON,
    ),
    "qwen3": Qwen3Config(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
        **COMMON,
    ),
    "deep": LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        **COMMON,
    ),
}


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--shape", type=click.Choice(list(SHAPES)), default="demo", show_default=True)
@click.option("--steps", default=6000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(out: Path, shape: str, steps: int, seed: int, device: str) -> None:
    """Train a small model on the standard library's source and save it to OUT."""
    texts = _texts(seed)
    tokenizer = _train_tokenizer(texts)
    stream = [id for text in texts for id in [0, *tokenizer.encode(text).ids]]
    click.echo(f"{len(texts)} modules, {len(stream):,} tokens")
    model = train(SHAPES[shape], stream, steps, seed, torch.device(device))
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(out)


def _texts(seed: int) -> list[str]:
    paths = library_modules(Text(dataset="stdlib", exclude=str(HELD_OUT)), "text")
    random.Random(seed).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(
    config: PreTrainedConfig, stream: list[int], steps: int, seed: int, device: torch.device
) -> PreTrainedModel:
    """A model of this shape, trained from nothing on one stream of tokens."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    count = len(stream) // SEQUENCE_LENGTH
    sequences = torch.tensor(stream[: count * SEQUENCE_LENGTH]).view(count, SEQUENCE_LENGTH)
    rate = torch.tensor(PEAK_RATE, device=device)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, capturable=rate.is_cuda
    )
    batch = torch.empty(BATCH_SIZE, SEQUENCE_LENGTH, dtype=torch.int64, device=device)

    def step() -> Tensor:
        logits = model(batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        return loss.detach()

    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        batch.copy_(sequences[torch.randint(count, (BATCH_SIZE,), generator=generator)])
        rate.fill_(PEAK_RATE * _rate(number, steps))
        if device.type == "cuda" and number == WARM_UP_STEPS:
            step = _captured(step)
        loss = step()
        if (number + 1) % 100 == 0 or number + 1 == steps:
            shown = f"perplexity {math.exp(loss.item()):.2f} on the last batch"
            click.echo(f"step {number + 1}: {shown}")
    trained: PreTrainedModel = model
    return trained


def _captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The step as a graph: capturing records it without running it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def _rate(step: int, steps: int) -> float:
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


if __name__ == "__main__":
    main()
