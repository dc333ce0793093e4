"""Train a model like the demo's, from nothing: tokenizer first, then a small LLaMA.

    python examples/demo/train.py OUT [--steps 6000] [--seed 0]

Text: the source of the running Python's standard library without the modules that heldout.txt
lists, shuffled by the seed. A document begins with <s>. Recipe: byte-level BPE of 2048 tokens;
sequences of 256 tokens, 16 a step; AdamW (betas 0.9 and 0.95, weight decay 0.1), peak rate 1.5e-3
after a tenth of the steps, then cosine to a tenth of it; gradients clipped to norm 1. The weights
are saved as bfloat16 safetensors in Hugging Face layout. 6000 steps are nine passes over the text;
the same seed on the same machine and Python gives the same weights.
"""

import math
import random
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mbq.artifacts.spec import Text
from mbq.workers.data import library_modules

SEQUENCE_LENGTH = 256
BATCH_SIZE = 16
PEAK_RATE = 1.5e-3
VOCABULARY = 2048
HELD_OUT = Path(__file__).with_name("heldout.txt")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--steps", default=6000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(out: Path, steps: int, seed: int) -> None:
    """Train a small LLaMA on the standard library's source and save it to OUT."""
    torch.manual_seed(seed)
    texts = _texts(seed)
    tokenizer = _train_tokenizer(texts)
    stream = [id for text in texts for id in [0, *tokenizer.encode(text).ids]]
    click.echo(f"{len(texts)} modules, {len(stream):,} tokens")
    model = _train(stream, steps, seed)
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


def _train(stream: list[int], steps: int, seed: int) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    count = len(stream) // SEQUENCE_LENGTH
    sequences = torch.tensor(stream[: count * SEQUENCE_LENGTH]).view(count, SEQUENCE_LENGTH)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = sequences[torch.randint(count, (BATCH_SIZE,), generator=generator)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == steps:
            click.echo(f"step {step}: perplexity {math.exp(loss.item()):.2f} on the last batch")
    return model


def _rate(step: int, steps: int) -> float:
    warm_up = max(steps // 10, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


if __name__ == "__main__":
    main()
