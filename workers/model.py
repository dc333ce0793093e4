"""A causal LM opened block by block: never the whole model, always exactly its own forward pass.

Transformers builds the modules on the meta device; weights are read per block from safetensors.
Calling `embed`, then `run` for every block, then `head()` gives what the full model gives.

What surrounds the blocks is left to the model, too: how embeddings are scaled, which mask and which
positions a block is given, what becomes of the logits. Its own forward pass runs with stand-ins for
the blocks: they hand on what they get, or tell what a block is given.

Legend: B sequences, T tokens, H hidden_size, V vocabulary.
"""

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from mbq.artifacts.checkpoint import BLOCKS_PREFIX, block_prefix
from mbq.artifacts.errors import InputError
from mbq.artifacts.source import Source
from mbq.artifacts.tensors import TensorFile
from mbq.workers.tensors import read_tensor

_EMBEDDINGS = "model.embed_tokens.weight"


class Weights(Protocol):
    """Where tensors lie: a source, or a packed checkpoint."""

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The file of every tensor."""

    def open(self, file: str) -> TensorFile: ...


class _Reached(Exception):
    """A pass has come to its goal."""


class _Goal(nn.Module):
    """Ends the pass, with what it gets."""

    def forward(self, hidden_BTH: Tensor, **arguments: Any) -> Tensor:
        raise _Reached(hidden_BTH, arguments)


class _Passed(nn.Module):
    """Hands on what it gets, or what it was given."""

    def __init__(self, instead_BTH: Tensor | None = None) -> None:
        super().__init__()
        self._instead_BTH = instead_BTH

    def forward(self, hidden_BTH: Tensor, **arguments: Any) -> Tensor:
        return hidden_BTH if self._instead_BTH is None else self._instead_BTH


class _Head(nn.Module):
    """What comes after the blocks, as one module."""

    def __init__(self, frame: Any) -> None:
        super().__init__()
        self.frame = frame

    def forward(self, hidden_BTH: Tensor) -> Tensor:
        self.frame.model.layers = nn.ModuleList([_Passed(hidden_BTH)])
        logits: Tensor = self.frame(inputs_embeds=hidden_BTH, use_cache=False).logits
        # Or the hidden states would be kept until the next call.
        self.frame.model.layers = nn.ModuleList()
        return logits


@dataclass(frozen=True)
class Model:
    """A model without weights, and where to read them.

    Attributes:
        skeleton: the causal LM on the meta device.
        frame: the same without its blocks; what no checkpoint stores, as positions, on the device.
        dtype: of the weights read and of the hidden states.
        device: where blocks run.
    """

    weights: Weights
    config: PretrainedConfig
    skeleton: Any
    frame: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def block_count(self) -> int:
        return int(self.config.num_hidden_layers)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, H] that enter block 0."""
        frame = self._filled_frame(self._placed([_EMBEDDINGS]))
        size = *ids_BT.shape, self.config.hidden_size
        hidden_BTH = torch.empty(size, dtype=self.dtype, device=self.device)
        # One at a time: the model may make a mask of T x T for each.
        for hidden, ids in zip(hidden_BTH.split(1), ids_BT.split(1), strict=True):
            inputs = ids.to(self.device, torch.int64)
            hidden.copy_(_reach(frame, 0, input_ids=inputs)[0])
        return hidden_BTH

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
        prefix = block_prefix(index)
        inside = [name for name in self.weights.weight_map if name.startswith(prefix)]
        wanted = [name for name in inside if name.removeprefix(prefix) not in without]
        return {name.removeprefix(prefix): tensor for name, tensor in self._placed(wanted).items()}

    def runner(self, index: int, microbatch: int) -> "BlockRunner":
        """Block `index`, freshly read, and its forward pass."""
        return BlockRunner(self.block(index), lambda b, x: self.run(b, index, x), microbatch)

    def run(self, block: nn.Module, index: int, hidden_BTH: Tensor) -> Tensor:
        """Hidden states [B, T, H] that leave block `index`, given those that enter it."""
        _, arguments = _reach(self.frame, index, inputs_embeds=hidden_BTH)
        out = block(hidden_BTH, **arguments)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def advance(self, block: nn.Module, index: int, hidden_BTH: Tensor, microbatch: int) -> None:
        """Put what leaves block `index` in the place of what enters it: no second set in memory."""
        for part in hidden_BTH.split(microbatch):
            part.copy_(self.run(block, index, part))

    def head(self) -> nn.Module:
        """All that comes after the blocks as one module: [B, T, H] to [B, T, V]."""
        stored = self.weights.weight_map
        outside = [name for name in stored if not name.startswith(BLOCKS_PREFIX)]
        state = self._placed(name for name in outside if name != _EMBEDDINGS)
        if "lm_head.weight" not in stored:
            state["lm_head.weight"] = self._placed([_EMBEDDINGS])[_EMBEDDINGS]
        return _Head(self._filled_frame(state)).eval().requires_grad_(False)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name as they are stored."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.weights.weight_map[name], []).append(name)
        tensors = {}
        for file, inside in by_file.items():
            opened = self.weights.open(file)
            # In the order they lie in, so that each part of the file is read once.
            for name in sorted(inside, key=lambda name: opened.starts.get(name, 0)):
                tensors[name] = read_tensor(opened, name)
        return tensors

    def _placed(self, names: Iterable[str]) -> dict[str, Tensor]:
        found = self.read(names)
        return {name: tensor.to(self.device, self.dtype) for name, tensor in found.items()}

    def _filled_frame(self, state: dict[str, Tensor]) -> Any:
        """A frame of its own, with some weights."""
        frame = copy.deepcopy(self.frame)
        frame.load_state_dict(state, strict=False, assign=True)
        return frame


@torch.no_grad()
def _reach(frame: Any, index: int, **inputs: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What block `index` is given by a model's own forward pass: hidden states, and arguments."""
    frame.model.layers = nn.ModuleList([_Passed()] * index + [_Goal()])
    try:
        frame.model(**inputs, use_cache=False)
    except _Reached as reached:
        hidden_BTH, arguments = reached.args
        # The exception itself would keep every frame that it passed.
        return hidden_BTH, arguments
    raise AssertionError(f"the model has no block {index}")


def open_model(source: Source, dtype: torch.dtype, device: torch.device) -> Model:
    """Build the modules without weights. Nothing but config.json is read.

    Raises:
        InputError: transformers cannot build what it describes.
    """
    try:
        # Transformers writes into what it is given.
        config = CONFIG_MAPPING[source.config["model_type"]].from_dict(copy.deepcopy(source.config))
        # Not as config.json may have it: `determinism.py` pins what is the default.
        config._attn_implementation = None
        config.return_dict = True
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except Exception as error:  # whatever a wrong value leads to
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(
            f"model.source: transformers cannot build what config.json of {source.location} "
            f"describes ({what}); fetch it again"
        ) from error
    return Model(source, config, skeleton, _frame(skeleton, device), dtype, device)


def _frame(skeleton: Any, device: torch.device) -> Any:
    """A model without its blocks, and with the buffers that no checkpoint stores.

    On the meta device those have no data; transformers, too, makes them after loading.
    """
    frame = copy.deepcopy(skeleton)
    frame.model.layers = nn.ModuleList()
    for module in frame.modules():
        computed = {n: b for n, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in computed.items():
            setattr(module, name, torch.empty_like(buffer, device=device))
        if computed:
            frame._init_weights(module)
    return frame


@dataclass(frozen=True)
class Promise:
    """What config.json says of a model: shapes of all tensors, linears, and whether it is tied.

    The head of one that is tied is the embeddings.
    """

    shapes: dict[str, tuple[int, ...]]
    linears: frozenset[str]
    tied: bool


def promise_of(source: Source) -> Promise:
    """What the config.json of a source promises; `linears` are those inside blocks.

    Raises:
        InputError: as `open_model`.
    """
    skeleton = open_model(source, torch.float32, torch.device("meta")).skeleton
    return Promise(
        {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()},
        frozenset(name for name in linears(skeleton) if name.startswith(BLOCKS_PREFIX)),
        tied=bool(skeleton.config.tie_word_embeddings),
    )


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


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block, or of a model, by name, in the order the module defines them."""
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def remedy_for_infinities(block: nn.Module) -> str:
    """What to do where a block computes what is not finite."""
    if next(block.parameters()).dtype != torch.float32:
        return "use dtype float32"
    return "look at the model's weights: float32 overflows only where they are broken"
