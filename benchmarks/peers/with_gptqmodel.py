"""One static width by GPTQModel's GPTQ; run with the Python of an environment that has it.

    python benchmarks/peers/with_gptqmodel.py MODEL TOKENS OUT BITS sym|asym GROUP

Arguments and result as in `with_auto_round.py`; GPTQMODEL_CPU_WORKERS is 2. It calibrates in
bfloat16; the weights that it makes are read by what its linears do to unit vectors.
"""

import sys
import time
from tempfile import TemporaryDirectory

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(source: str, tokens: str, out: str, bits: str, kind: str, group: str) -> None:
    torch.set_num_threads(1)
    ids = load_file(tokens)["ids"].tolist()
    config = QuantizeConfig(bits=int(bits), group_size=int(group), sym=kind == "sym", device="cpu")
    model = GPTQModel.load(source, config)
    with TemporaryDirectory() as folder:
        started = time.monotonic(), time.process_time()
        model.quantize(
            [{"input_ids": x, "attention_mask": [1] * len(x)} for x in ids], batch_size=1
        )
        seconds = time.monotonic() - started[0], time.process_time() - started[1]
        model.save(folder)
        made = GPTQModel.load(folder, backend=BACKEND.TORCH, device="cpu").model
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, linear in plain.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            quantized = made.model.layers.get_submodule(name)
            with torch.no_grad():
                unit = torch.eye(linear.in_features, dtype=torch.bfloat16)
                linear.weight.copy_(quantized(unit).float().T)
    plain.save_pretrained(out)
    print("seconds", *seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
