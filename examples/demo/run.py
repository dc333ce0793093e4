"""The demo: submit the demo run, watch it, write its report, pull its checkpoint, let it write.

    python examples/demo/run.py

A local Ray is started if none runs, and stopped again in the end. Run a second time, it finds the
finished run and shows it at once. MBQ_STORE=s3://bucket/prefix chooses another store.
"""

import signal
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
        code, run = _command("submit", "demo", capture=True)
        if not code:
            code, _ = _command("watch", run)
        if code:
            return code
    finally:
        if started_here and find_local_head() is not None:
            # A second Ctrl-C must not leave it running.
            print("stopping the local Ray, and what runs on it", flush=True)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _command("head", "stop")
            signal.signal(signal.SIGINT, signal.default_int_handler)
    print("report: ", end="", flush=True)
    _command("report", run, "--out", str(home() / "report.html"))
    folder = home() / "checkpoints" / run
    if _command("pull", run, str(folder))[0]:
        return 1
    _write(str(folder))
    return 0


def _command(*arguments: str, capture: bool = False) -> tuple[int, str]:
    """Exit code and output of a command.

    Ctrl-C reaches it, too. It has the time to clean up then, which subprocess.run would not give.
    """
    program = str(Path(sys.executable).with_name("mbq-cluster"))
    output = subprocess.PIPE if capture else None
    with subprocess.Popen([program, *arguments], stdout=output, text=True) as process:
        try:
            printed, _ = process.communicate()
        except KeyboardInterrupt:
            process.wait()
            raise
    return process.returncode, (printed or "").strip()


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
