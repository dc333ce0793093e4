"""What is pinned so that the same run on the same kind of hardware gives the same bytes.

    before the process starts   `environment.py`: one MKL code path, deterministic cuBLAS workspaces
    at the start of a task      `pin`: threads (1 thread and 2 give different gradient bits), one
                                interop thread, deterministic algorithms, no TF32
    around a forward pass       `attention`: which attention kernels may be chosen
    every draw                  `seed_of`: a seed per (run's seed, block), never a global generator

`hardware_kind` names what the bytes still depend on.
"""

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def pin(threads: int) -> None:
    """Fix what can be fixed in a running process. `threads` is the run's, never the machine's."""
    torch.set_num_threads(threads)
    if torch.get_num_interop_threads() != 1:
        # Refused once parallel work has started; the first task of a process comes before that.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
    torch.use_deterministic_algorithms(True)
    # On by default with the line above, and only of use where memory is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False


@contextlib.contextmanager
def attention() -> Iterator[None]:
    """Choose among attention kernels whose backward pass is deterministic, in a fixed order."""
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


def seed_of(seed: int, block: int) -> int:
    """A seed of its own for each block: 63 bits."""
    digest = hashlib.sha256(f"{seed}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _maker() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("vendor_id", "CPU implementer")):
                return line.partition(":")[2].strip()
    return platform.machine()


def hardware_kind(device: torch.device) -> str:
    """Kind of machine whose results are equal bit for bit: processor and torch build."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        # Of one capability, libraries choose other ways on other makers' processors.
        chip = f"cpu {_maker()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{chip}, torch {torch.__version__}"
