"""One static width by llm-compressor's GPTQ; run with the Python of an environment that has it.

    python benchmarks/peers/with_llmcompressor.py MODEL TOKENS OUT BITS sym|asym GROUP

Arguments and result as in `with_auto_round.py`. The weights that it makes are read by what its
linears do to unit vectors.
"""

import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(source: str, tokens: str, out: str, bits: str, kind: str, group: str) -> None:
    torch.set_num_threads(1)
    ids = load_file(tokens)["ids"].tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    weights = QuantizationArgs(
        num_bits=int(bits),
        type="int",
        symmetric=kind == "sym",
        strategy="group",
        group_size=int(group),
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    started = time.monotonic(), time.process_time()
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups={"g0": scheme}),
    )
    seconds = time.monotonic() - started[0], time.process_time() - started[1]
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, linear in plain.model.layers.named_modules():
        if isinstance(linear, torch.nn.Linear):
            with torch.no_grad():
                unit = torch.eye(linear.in_features)
                linear.weight.copy_(model.model.layers.get_submodule(name)(unit).T)
    plain.save_pretrained(out)
    print("seconds", *seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
