"""Specs by name, for models people ask for first.

The calibration recipe is the one of the papers: 128 sequences of 2048 tokens from WikiText-2. The
revision is `main` and becomes a commit when a run is submitted.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mbq.artifacts.errors import InputError

_HUB_MODELS = {
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
}
_DEMO = Path(__file__).resolve().parent.parent / "examples" / "demo" / "demo.yaml"

NAMES = ("demo", *_HUB_MODELS)


def preset(name: str) -> Mapping[str, Any] | Path:
    """The document of a preset, or for the demo the file that holds it.

    Raises:
        InputError: there is no preset of that name here.
    """
    if name == "demo":
        if not _DEMO.is_file():
            raise InputError(
                "preset demo: its model lies in the repository, not in the installed package; run "
                "it from a checkout installed with `pip install -e .`"
            )
        return _DEMO
    if name not in _HUB_MODELS:
        raise InputError(
            f"{name} is neither a spec file nor a preset; presets are {', '.join(NAMES)}"
        )
    return {
        "model": {"source": _HUB_MODELS[name]},
        "calibration": {"dataset": "wikitext2"},
        "evaluation": {"dataset": "wikitext2"},
        "dtype": "bfloat16",
        # Weights are quantized anew for every pass: on a GPU that takes as long as some thousand
        # tokens do.
        "microbatch": 4,
        "threads": 4,
    }
