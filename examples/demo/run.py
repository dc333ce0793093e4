"""The demo: submit the demo run, watch it, write its report, pull its checkpoint, let it write.

    python examples/demo/run.py

A local Ray is started if none runs, and stopped again in the end. Run a second time, it finds the
finished run and shows it at once. MBQ_STORE=s3://bucket/prefix chooses another store.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from mbq.orchestrator.display import STDOUT
from mbq.orchestrator.local import find_local_head, home

PROMPT = "import os\n\n\nclass "
NEW_TOKENS = 60


def main() -> int:
    started_here = find_local_head() is None
    try:
        submitted = _command("submit", "demo", capture=True)
        run = submitted.stdout.strip()
        if submitted.returncode:
            return submitted.returncode
        watched = _command("watch", run)
        if watched.returncode:
            return watched.returncode
    finally:
        if started_here and find_local_head() is not None:
            _command("head", "stop")
    print("report: ", end="", flush=True)
    _command("report", run, "--out", str(home() / "report.html"))
    folder = home() / "checkpoints" / run
    if _command("pull", run, str(folder)).returncode:
        return 1
    _write(str(folder))
    return 0


def _command(*arguments: str, capture: bool = False) -> "subprocess.CompletedProcess[str]":
    program = str(Path(sys.executable).with_name("mbq-cluster"))
    return subprocess.run(
        [program, *arguments], stdout=subprocess.PIPE if capture else None, text=True, check=False
    )


def _write(folder: str) -> None:
    """What the model writes, greedily, at the lowest, an average and the highest width."""
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from mbq.artifacts.loading import load_model

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load_model(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for bits in (2, 3.2, 8):
        model.set_average_bits(bits)
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        read = f"{model.realised_bits():.2f} read"
        STDOUT.rule(f"written at an average of {bits} bits ({read})", align="left")
        STDOUT.print(tokenizer.decode(out[0]), markup=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("the demo was interrupted; start it again, and it goes on from here")
