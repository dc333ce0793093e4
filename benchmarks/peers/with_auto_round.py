"""One static width by auto-round; run with the Python of an environment that has it.

    python benchmarks/peers/with_auto_round.py MODEL TOKENS OUT BITS sym|asym GROUP

Its defaults: 200 iterations of 8 sequences, inputs of the quantized model. TOKENS is a safetensors
file of calibration sequences `ids` [samples, length]; OUT becomes a folder of the model with the
quantized weights as floats; GROUP inputs share a scale.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, tokens: str, out: str, bits: str, kind: str, group: str) -> None:
    torch.set_num_threads(1)
    ids = load_file(tokens)["ids"].long()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with TemporaryDirectory() as folder:
        started = time.monotonic(), time.process_time()
        AutoRound(
            model,
            AutoTokenizer.from_pretrained(source),
            bits=int(bits),
            group_size=int(group),
            sym=kind == "sym",
            nsamples=len(ids),
            seqlen=ids.shape[1],
            dataset=[row[None] for row in ids],
            device_map="cpu",
            enable_torch_compile=False,
            amp=False,
        ).quantize_and_save(output_dir=folder, format="fake")
        seconds = time.monotonic() - started[0], time.process_time() - started[1]
        config = next(Path(folder).rglob("config.json"))
        fake = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32)
    fake.save_pretrained(out)
    print("seconds", *seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
