"""A causal LM opened block by block: never the whole model, always exactly its own forward pass.

Transformers builds the modules on the meta device; weights are read per block from safetensors.
Calling `embed`, then `run` for every block, then `logits` gives what the full model gives.

Legend: B sequences, T tokens, H hidden_size, V vocabulary.
"""

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mbq.artifacts.checkpoint import block_prefix
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.tensors import TensorFile
from mbq.workers.tensors import read_tensor


class Weights(Protocol):
    """Where tensors lie: a source, or a packed checkpoint."""

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The file of every tensor."""

    def open(self, file: str) -> TensorFile: ...


@dataclass(frozen=True)
class Model:
    """A model without weights, and where to read them.

    Attributes:
        skeleton: the causal LM on the meta device.
        dtype: of the weights read and of the hidden states.
        device: where blocks run.
    """

    weights: Weights
    config: PretrainedConfig
    skeleton: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def block_count(self) -> int:
        return int(self.config.num_hidden_layers)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, H] that enter block 0."""
        weight = self.read("model.embed_tokens.")["weight"]
        return F.embedding(ids_BT.to(self.device), weight.to(self.device, self.dtype))

    def block(self, index: int) -> nn.Module:
        """Block `index` with its weights, in evaluation mode and without gradients."""
        block = self.empty_block(index)
        block.load_state_dict(self.block_tensors(index), strict=True, assign=True)
        return block.requires_grad_(False)

    def empty_block(self, index: int) -> nn.Module:
        """Block `index` without weights, on the meta device, in evaluation mode."""
        block: nn.Module = copy.deepcopy(self.skeleton.model.layers[index])
        return block.eval()

    def block_tensors(self, index: int, without: Container[str] = ()) -> dict[str, Tensor]:
        """Tensors of block `index` by name inside it, those left out that are named."""
        return self._placed(block_prefix(index), without)

    def runner(self, index: int, microbatch: int) -> "BlockRunner":
        """Block `index`, freshly read, and its forward pass."""
        return BlockRunner(self.block(index), lambda b, x: self.run(b, index, x), microbatch)

    def run(self, block: nn.Module, index: int, hidden_BTH: Tensor) -> Tensor:
        """Hidden states [B, T, H] that leave block `index`, given those that enter it."""
        position_1T = torch.arange(hidden_BTH.shape[1], device=hidden_BTH.device)[None]
        kind = _layer_type(self.config, index)
        make_mask = (
            create_sliding_window_causal_mask if kind == "sliding_attention" else create_causal_mask
        )
        mask = make_mask(
            config=self.config,
            inputs_embeds=hidden_BTH,
            attention_mask=None,
            past_key_values=None,
            position_ids=position_1T,
        )
        # inv_freq is a buffer that no checkpoint stores: on meta it has no data.
        rotary = type(self.skeleton.model.rotary_emb)(config=self.config).to(hidden_BTH.device)
        out = block(
            hidden_BTH,
            attention_mask=mask,
            position_embeddings=rotary(hidden_BTH, position_1T),
            position_ids=position_1T,
            past_key_values=None,
            use_cache=False,
        )
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def advance(self, block: nn.Module, index: int, hidden_BTH: Tensor, microbatch: int) -> None:
        """Put what leaves block `index` in the place of what enters it: no second set in memory."""
        for part in hidden_BTH.split(microbatch):
            part.copy_(self.run(block, index, part))

    def head(self) -> nn.Module:
        """The final norm and the language model head as one module: [B, T, H] to [B, T, V]."""
        norm = copy.deepcopy(self.skeleton.model.norm)
        norm.load_state_dict(self._placed("model.norm."), strict=True, assign=True)
        head = copy.deepcopy(self.skeleton.lm_head)
        tied = "lm_head.weight" not in self.weights.weight_map
        state = self._placed("model.embed_tokens." if tied else "lm_head.")
        head.load_state_dict(state, strict=True, assign=True)
        return nn.Sequential(norm, head).eval().requires_grad_(False)

    def read(self, prefix: str, without: Container[str] = ()) -> dict[str, Tensor]:
        """Tensors under a prefix as they are stored, by the rest of their names."""
        by_file: dict[str, list[str]] = {}
        for name, file in self.weights.weight_map.items():
            if name.startswith(prefix) and name.removeprefix(prefix) not in without:
                by_file.setdefault(file, []).append(name)
        tensors = {}
        for file, names in by_file.items():
            opened = self.weights.open(file)
            # In the order they lie in, so that each part of the file is read once.
            for name in sorted(names, key=lambda name: opened.starts.get(name, 0)):
                tensors[name.removeprefix(prefix)] = read_tensor(opened, name)
        return tensors

    def _placed(self, prefix: str, without: Container[str] = ()) -> dict[str, Tensor]:
        found = self.read(prefix, without)
        return {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}


def open_model(source: Source, dtype: torch.dtype, device: torch.device) -> Model:
    """Build the modules without weights. Nothing but config.json is read.

    Raises:
        InputError: transformers cannot build what it describes.
    """
    try:
        # Transformers writes into what it is given.
        config = CONFIG_MAPPING[source.config["model_type"]].from_dict(copy.deepcopy(source.config))
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # whatever a wrong value leads to
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"model.source: transformers cannot build what config.json of {source.location} "
            f"describes ({what}); fetch it again"
        ) from error
    return Model(source, config, skeleton, dtype, device)


def promised_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model that config.json describes, a head of its own too.

    Raises:
        InputError: as `open_model`.
    """
    skeleton = open_model(source, torch.float32, torch.device("meta")).skeleton
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


@dataclass(frozen=True)
class BlockRunner:
    """A block and its forward pass.

    Attributes:
        run: given the block and hidden states [B, T, H], makes those that leave it.
        microbatch: sequences of a pass.
    """

    module: nn.Module
    run: Callable[[nn.Module, Tensor], Tensor]
    microbatch: int

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        """One pass, which may record gradients."""
        return self.run(self.module, hidden_BTH)

    @torch.no_grad()
    def forward(self, hidden_BTH: Tensor) -> Tensor:
        """As many passes as the sequences take."""
        return torch.cat([self(part) for part in hidden_BTH.split(self.microbatch)])


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are taken off in the end, whatever happens."""
    placed = list(hooks)
    try:
        yield
    finally:
        for hook in placed:
            hook.remove()


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name, in the order the module defines them."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def remedy_for_infinities(block: nn.Module) -> str:
    """What to do where a block computes what is not finite."""
    if next(block.parameters()).dtype != torch.float32:
        return "use dtype float32"
    return "look at the model's weights: float32 overflows only where they are broken"


def _layer_type(config: PretrainedConfig, index: int) -> str:
    types = getattr(config, "layer_types", None)
    if types:
        return str(types[index])
    # Mistral lists no layer types: a sliding window, when set, holds for every block.
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
