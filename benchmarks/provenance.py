"""When, where and by what a result was made: stands at the top of every file of results."""

import datetime
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("mbq-cluster", "torch", "transformers")


def provenance(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Date, processor, versions and command."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "command": " ".join(["python", *sys.argv]),
    }


def gpu_provenance() -> dict[str, Any]:
    """The same of one that runs on a GPU, where this package need not be installed."""
    import torch

    packages = ("torch", "triton", "transformers")
    return provenance(packages) | {"hardware": torch.cuda.get_device_name()}


def processor() -> str:
    """How many of which kind."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
