"""What is pinned, and that it holds across processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from mbq.workers.determinism import attention, hardware_kind, pin, seed_of
from mbq.workers.environment import ENVIRONMENT

_SCRIPT = """
import hashlib, sys, torch
from pathlib import Path
from mbq.artifacts.checkpoint import find_linears, find_routers
from mbq.artifacts.source import open_source
from mbq.artifacts.spec import Optimisation
from mbq.kernels.widths import WIDTHS
from mbq.workers.calibrate import calibrate_block
from mbq.workers.determinism import attention, pin
from mbq.workers.model import open_model
from mbq.workers.pack import encode_block

pin(int(sys.argv[2]))
source = open_source(sys.argv[1], "main")
model = open_model(source, torch.float32, torch.device("cpu"))
readers = find_routers(find_linears(source.tensors)).values()
hidden = torch.randn(8, 40, 64, generator=torch.Generator().manual_seed(1))
junk = [torch.randn(n * 13 + 1) for n in range(int(sys.argv[3]))]  # moves later allocations
with attention():
    done = calibrate_block(
        model.runner(0, 4), dict.fromkeys(WIDTHS, hidden), hidden,
        Optimisation(passes=4, batch_size=4), 32, readers, 0, lambda fraction: None,
    )
print(hashlib.sha256(b"".join(encode_block(done.linears, {}))).hexdigest())
"""


def _digest(model: Path, threads: int, junk: int) -> str:
    command = [sys.executable, "-c", _SCRIPT, str(model), str(threads), str(junk)]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_two_processes_calibrate_the_same_bytes(tiny_model: Path) -> None:
    assert _digest(tiny_model, 1, 0) == _digest(tiny_model, 1, 37)


def test_pin_sets_what_it_says() -> None:
    threads = torch.get_num_threads()
    try:
        pin(2)
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_blocks_and_runs_have_seeds_of_their_own() -> None:
    seeds = {seed_of(seed, block) for seed in range(10) for block in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, 0) == 3056769172604291498


def test_attention_is_one_of_the_pinned_kernels() -> None:
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with attention():
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    out.sum().backward()
    assert q.grad is not None


def test_hardware_kind_names_processor_and_torch() -> None:
    kind = hardware_kind(torch.device("cpu"))
    assert torch.backends.cpu.get_cpu_capability() in kind
    assert torch.__version__ in kind
