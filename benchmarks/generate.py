"""Tokens per second of a random LLaMA-2-7B on a GPU: bf16, elastic at 2, 3, 4, 8 bits, routed at 4.

    python benchmarks/generate.py --out benchmarks/results
    python benchmarks/generate.py --step captured --out benchmarks/results
    python benchmarks/generate.py --step compiled --out benchmarks/results

One sequence, greedy. By default through `generate` as transformers has it, where the host's
launches decide; `--step` repeats one decoding step (static cache, last position), where the GPU
decides: replayed as a graph, or what `torch.compile` makes of it, with graphs of its own. Memory is
the most that was allocated while generating, and what is left after it. Weights and codes are
random: times and memory depend on shapes alone. Routers have 8 rows, as those of a checkpoint;
where they decide they give every token 4 bits.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from provenance import gpu_provenance
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from mbq.artifacts.checkpoint import Linear, RouterShape, find_routers
from mbq.artifacts.elastic import add_routers, elastic_linears, replace_linears
from mbq.artifacts.warming import warm_up
from mbq.kernels.linear import ElasticLinear
from mbq.kernels.precision import Precision
from mbq.kernels.quantize import pack_pair
from mbq.kernels.router import Router

# Passes that torch did not capture although it was asked to.
SKIPPED = "cudagraph_skips"
PROMPT_TOKENS = 8
NEW_TOKENS = 48
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)

Entry = dict[str, Any]


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder for the result."
)
@click.option("--step", type=click.Choice(["captured", "compiled"]), help="Repeat one step.")
@torch.no_grad()
def main(out: Path, step: str | None) -> None:
    """Generate text with random weights at several widths."""
    torch.manual_seed(0)
    measure = measure_generate if step is None else partial(measure_step, step)
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    result = gpu_provenance() | {"new_tokens": NEW_TOKENS, "measured": {}}
    path = out / f"{result['date']}-generate{f'-{step}' if step else ''}.json"

    def keep(name: str) -> None:
        result["measured"][name] = measure(model)
        click.echo(f"{name}: {result['measured'][name]}")
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    keep("bf16")
    precision = make_elastic(model)
    add_constant_routers(model, precision)
    warm_up(model)
    for bits in (2, 3, 4, 8):
        precision.set_bits(bits)
        keep(f"{bits} bits")
    precision.bits, precision.log_threshold = None, 0.0
    keep("4 bits, routed")


def make_elastic(model: LlamaForCausalLM) -> Precision:
    """Exchange the linears for elastic ones with random codes."""
    precision = Precision(8)
    replace_linears(model, LINEARS, 128, precision)
    for linear in elastic_linears(model):
        for name, buffer in linear.named_buffers():
            if name.startswith("plane_"):
                buffer.random_(-(2**31), 2**31 - 1)
            elif name == "scale_zero":
                scale = torch.full(buffer.shape, 0.01, device="cuda")
                buffer.copy_(pack_pair(scale, torch.full_like(scale, 2.0)))
            elif name.startswith("gain_bias_"):
                gain = torch.ones(buffer.shape, device="cuda")
                buffer.copy_(pack_pair(gain, torch.zeros_like(gain)))
    torch.cuda.empty_cache()
    return precision


def add_constant_routers(model: LlamaForCausalLM, precision: Precision) -> None:
    """Routers whose scores are constants: above a threshold of 0 up to 4 bits, below it beyond."""
    names = [n for n, m in model.named_modules() if isinstance(m, ElasticLinear)]
    routers = find_routers([Linear(f"model.layers.0.{name}", 0, 1, 1) for name in LINEARS])
    add_routers(model, names, routers, 8, RouterShape(width=8, knots=2), precision)
    floats: Any = {"dtype": torch.float32, "device": "cuda"}
    for router in model.modules():
        if isinstance(router, Router):
            router.get_buffer("trunk").random_(0, 2**10)
            head = torch.zeros(router.get_buffer("head").shape, **floats)
            head[..., -1] = torch.tensor([1.0, 1.0, -1.0, -1.0], **floats)[:, None]
            router.get_buffer("head").copy_(head.view(torch.int32))
            knots = router.get_buffer("knots")
            ends = torch.tensor([-1.0, 1.0], **floats).view(torch.int32)
            knots.copy_(ends.expand(knots.shape))


def measure_generate(model: Any) -> Entry:
    """Through `generate`: the time between tokens, prefill aside."""
    prompt = torch.randint(0, 32000, (1, PROMPT_TOKENS), device="cuda")
    seconds = []
    for tokens in (4, 1, NEW_TOKENS + 1, NEW_TOKENS + 1):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        started = time.monotonic()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    _, first, *runs = seconds
    return {
        "tokens_per_second": NEW_TOKENS / (statistics.fmean(runs) - first),
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "gpu_bytes": torch.cuda.memory_allocated(),
    }


def measure_step(how: str, model: Any) -> Entry:
    """One step at the last position of a static cache, over and over."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)
    prompt = torch.randint(0, 32000, (1, PROMPT_TOKENS), device="cuda")
    model(prompt, past_key_values=cache, use_cache=True)
    token = torch.randint(0, 32000, (1, 1), device="cuda")
    position = torch.full((1, 1), PROMPT_TOKENS, device="cuda")

    def rewind() -> None:
        """Every step moves the cache on."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(PROMPT_TOKENS)

    def step(called: Any) -> Any:
        return called(token, past_key_values=cache, position_ids=position, use_cache=True).logits

    counters.clear()
    made = torch.compile(model, mode="reduce-overhead") if how == "compiled" else model
    # The first compiles; `torch.compile` captures at the second or third.
    for _ in range(4):
        rewind()
        step(made)
    repeat = replayed(partial(step, made)) if how == "captured" else partial(step, made)
    # A replay that went on at another width, or was none, would have times that look right.
    rewind()
    found = repeat().float()
    rewind()
    expected = step(model).float()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        rewind()
        start.record()
        repeat()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return {
        "tokens_per_second": 1 / statistics.median(times),
        "relative_difference": ((found - expected).norm() / expected.norm()).item(),
        "graphs_skipped": counters["inductor"][SKIPPED],
    }


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step, captured once, and what repeats it."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


if __name__ == "__main__":
    main()
