"""Calibrate one random LLaMA block and fit its routers, twice: seconds, peak memory, equal bytes.

    python benchmarks/block.py --device cuda
    python benchmarks/block.py --device cpu --hidden 256 --intermediate 768 --heads 8 --samples 16

Defaults are LLaMA-2-13B's dimensions and the calibration of its preset. Needs neither ray nor
boto3 nor datasets.
"""

import hashlib
import json
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from provenance import provenance
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mbq.artifacts.checkpoint import find_linears, find_routers
from mbq.artifacts.source import Source
from mbq.artifacts.spec import Optimisation, Routing
from mbq.kernels.widths import CODE_BITS, WIDTHS
from mbq.workers.calibrate import calibrate_block
from mbq.workers.determinism import attention, hardware_kind, pin
from mbq.workers.model import Model, open_model
from mbq.workers.pack import encode_block
from mbq.workers.route import first_sequences, fit_routers


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--hidden", default=5120, show_default=True)
@click.option("--intermediate", default=13824, show_default=True)
@click.option("--heads", default=40, show_default=True)
@click.option("--samples", default=128, show_default=True)
@click.option("--length", default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--passes", default=6, show_default=True)
@click.option("--microbatch", default=4, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--threads", default=4, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for the result.")
def main(**options: Any) -> None:
    """Calibrate one random block twice and print what it took."""
    pin(options["threads"])
    device = torch.device(options["device"])
    result = provenance(("torch", "transformers")) | {
        "hardware": hardware_kind(device),
        "options": {k: v for k, v in options.items() if k != "out"},
    }
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        write_model(Path(folder), options)
        source = Source(folder)
        model = open_model(source, getattr(torch, options["dtype"]), device)
        hidden = random_hidden(model, options)
        # Written after each: a run that is cut off leaves the first.
        for _ in range(2):
            runs.append(calibrate(model, source, hidden, options))
            text = json.dumps(result | described(runs), indent=1)
            if options["out"] is not None:
                name = f"{result['date']}-block-{options['device']}.json"
                (options["out"] / name).write_text(text + "\n", encoding="utf-8")
    click.echo(text)


def described(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs took, and whether their bytes are equal; None while there is one."""
    return {
        "seconds": [run["seconds"] for run in runs],
        "router_seconds": [run["router_seconds"] for run in runs],
        "peak_gpu_bytes": max(run["peak_gpu_bytes"] for run in runs),
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss_before": runs[0]["loss_before"],
        "loss_after": runs[0]["loss_after"],
        "equal_bytes_twice": runs[0]["sha256"] == runs[1]["sha256"] if len(runs) > 1 else None,
    }


def write_model(folder: Path, options: dict[str, Any]) -> None:
    """A checkpoint that holds one random block, as the loader expects it."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=options["hidden"],
        intermediate_size=options["intermediate"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["heads"],
        num_hidden_layers=1,
        max_position_embeddings=options["length"],
    )
    torch.manual_seed(0)
    state = LlamaForCausalLM(config).to(getattr(torch, options["dtype"])).state_dict()
    save_file(state, folder / "model.safetensors")
    config.save_pretrained(folder)


def random_hidden(model: Model, options: dict[str, Any]) -> torch.Tensor:
    shape = (options["samples"], options["length"], options["hidden"])
    generator = torch.Generator(model.device).manual_seed(1)
    made: Any = {"generator": generator, "device": model.device, "dtype": model.dtype}
    return torch.randn(shape, **made)


def calibrate(
    model: Model, source: Source, hidden: torch.Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """One calibration and fit of routers."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    inputs = find_routers(find_linears(source.tensors))
    started = time.monotonic()
    with attention():
        done = calibrate_block(
            model.runner(0, options["microbatch"]),
            dict.fromkeys(WIDTHS, hidden),
            hidden,
            Optimisation(passes=options["passes"]),
            group_size=128,
            readers=inputs.values(),
            seed=0,
            report=Progress(),
        )
        _finish(model.device)
        calibrated = time.monotonic()
        # Of a block on its own the loss is not known: channels count alike.
        alike = {
            name: torch.ones(len(linear.code_NK), device=model.device)
            for name, linear in done.linears.items()
        }
        routers = fit_routers(
            model.runner(0, options["microbatch"]),
            inputs,
            done.linears,
            alike,
            first_sequences(hidden, Routing().tokens),
            Routing(),
            max_bits=CODE_BITS,
            seed=0,
        )
        _finish(model.device)
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    return {
        "seconds": calibrated - started,
        "router_seconds": time.monotonic() - calibrated,
        "peak_gpu_bytes": peak,
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "sha256": hashlib.sha256(b"".join(encode_block(done.linears, routers))).hexdigest(),
    }


class Progress:
    """Says how long the first step took, and every tenth of the whole."""

    def __init__(self) -> None:
        self.started, self.said = time.monotonic(), -1

    def __call__(self, fraction: float) -> None:
        if int(10 * fraction) > self.said:
            self.said = int(10 * fraction)
            click.echo(f"{fraction:.1%} after {time.monotonic() - self.started:.0f} s")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
