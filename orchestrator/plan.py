"""What a run consists of, and what of it can start now: pure functions on small frozen data.

    capture 0 -> capture 1 -> ... -> capture n-1      the chain of hidden states
        |            |                   |
    calibrate 0  calibrate 1    ...  calibrate n-1    in parallel; each needs its capture
        \\____________|___________________/
           pack <file> ...                            each needs its blocks
                     |
                 publish                              index, config, tokenizer, manifest
                     |
           evaluate mbq-<bits> ...                    evaluate full and rtn-<bits> need nothing

With sequential propagation capture i + 1 also needs calibrate i. Hidden states are bounded: the
chain runs at most `workers + 2` blocks ahead of calibration.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from mbq.artifacts.checkpoint import Linear, Shard, find_linears, plan_shards
from mbq.artifacts.errors import InputError
from mbq.artifacts.manifest import RunDocument
from mbq.artifacts.source import Source
from mbq.artifacts.spec import SLICE_BITS, RunSpec
from mbq.workers.variants import FULL, PACKED, ROUNDED

# Dense decoders whose block is attention and an MLP of linears, with rotary positions.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
BITS = (2, 4, 6, 8)

Kind = Literal["capture", "calibrate", "pack", "evaluate"]
# Evaluations of the source model need nothing and fill whatever is left idle, so they come last.
_PRIORITY: dict[Kind, int] = {"capture": 0, "calibrate": 1, "pack": 2, "evaluate": 3}
_LOOK_AHEAD = 2


@dataclass(frozen=True)
class Task:
    """One unit of work; `target` is a block's number, a file's name or a variant.

    Attributes:
        flops: how much arithmetic it is, to tell the time left; not exact.
    """

    kind: Kind
    target: str
    flops: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.target}"

    @property
    def block(self) -> int:
        return int(self.target)


@dataclass(frozen=True)
class Plan:
    """All tasks of a run and what they need from each other."""

    captures: tuple[Task, ...]
    calibrations: tuple[Task, ...]
    packs: tuple[Task, ...]
    evaluations: tuple[Task, ...]
    shards: tuple[Shard, ...]
    linears: tuple[Linear, ...]
    sequential: bool

    @property
    def tasks(self) -> tuple[Task, ...]:
        return self.captures + self.calibrations + self.packs + self.evaluations


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        done: finished tasks; a finished capture's hidden states may be gone again.
        held: blocks whose hidden states exist.
        busy: tasks that are running or wait for their next attempt.
        failed: tasks that are given up.
    """

    done: Set[Task]
    held: Set[int]
    busy: Set[Task]
    failed: Set[Task]
    published: bool

    @property
    def settled(self) -> Set[Task]:
        """Tasks that will not run again."""
        return self.done | self.failed


def build_plan(document: RunDocument) -> Plan:
    """The plan of a resolved run."""
    spec = document.spec
    tensors = document.source.tensors
    linears = find_linears(tensors)
    shards = plan_shards(tensors, spec.slices, spec.group_size)
    blocks = 1 + max(linear.block for linear in linears)
    weights = [0] * blocks
    for linear in linears:
        weights[linear.block] += linear.out_features * linear.in_features

    calibration_tokens = spec.calibration.samples * spec.calibration.sequence_length
    # Forward and backward of two widths per pass, and a few forward passes around it.
    per_weight = calibration_tokens * (12.0 * spec.optimisation.passes + 2.0)
    streams = 1 + len(spec.optimisation.slice_counts) * (spec.propagation == "sequential")
    evaluation = spec.evaluation
    head = 2.0 * document.source.config["vocab_size"] * document.source.config["hidden_size"]
    evaluated = evaluation.tokens * (2.0 * sum(weights) + head) if evaluation else 0.0
    return Plan(
        captures=tuple(
            Task(
                "capture",
                f"{b:03d}",
                2.0 * calibration_tokens * streams * weights[b - 1] if b else 0,
            )
            for b in range(blocks)
        ),
        calibrations=tuple(
            Task("calibrate", f"{b:03d}", per_weight * weights[b]) for b in range(blocks)
        ),
        packs=tuple(
            Task("pack", shard.file, 200.0 * sum(e.size_bytes for e in shard.entries))
            for shard in shards
        ),
        evaluations=tuple(Task("evaluate", v, evaluated) for v in variants(spec)),
        shards=tuple(shards),
        linears=tuple(linears),
        sequential=spec.propagation == "sequential",
    )


def variants(spec: RunSpec) -> list[str]:
    """What the table of a run compares; nothing without an evaluation text."""
    if spec.evaluation is None:
        return []
    widths = [bits for bits in BITS if bits <= SLICE_BITS * spec.slices]
    return [FULL, *(f"{kind}-{bits}" for kind in (ROUNDED, PACKED) for bits in widths)]


def ready(plan: Plan, progress: Progress, workers: int) -> list[Task]:
    """Tasks that can start now, the most urgent first."""
    tasks = [
        task
        for task in plan.tasks
        if task not in progress.settled
        and task not in progress.busy
        and _is_ready(task, plan, progress, workers)
    ]
    return sorted(tasks, key=lambda task: _PRIORITY[task.kind])


def needed_captures(plan: Plan, settled: Set[Task]) -> int:
    """How long the chain of hidden states must be: up to the last block to calibrate."""
    return max((t.block + 1 for t in plan.calibrations if t not in settled), default=0)


def releasable(plan: Plan, progress: Progress) -> set[int]:
    """Blocks whose hidden states nobody needs any more."""
    last = needed_captures(plan, progress.settled) - 1
    return {
        block
        for block in progress.held
        if plan.calibrations[block] in progress.settled
        and (block >= last or plan.captures[block + 1] in progress.done)
    }


def remaining_flops(plan: Plan, done: Set[Task], fractions: Mapping[Task, float]) -> float:
    """Arithmetic that is still to do; captures that nobody needs any more count as done.

    Args:
        fractions: finished fraction of the running tasks.
    """
    needed = needed_captures(plan, done)
    open_tasks = [
        task
        for task in plan.tasks
        if task not in done and (task.kind != "capture" or task.block < needed)
    ]
    return sum(task.flops * (1.0 - fractions.get(task, 0.0)) for task in open_tasks)


def total_bits(linears: Sequence[Linear], group_size: int, variant: str) -> float:
    """Bits per quantized weight that a variant reads: codes, and what comes with them.

    Scale and zero are 32 bits a group for every variant; the packed checkpoint adds a gain and a
    bias, 32 bits an output channel.
    """
    kind, _, bits = variant.partition("-")
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    channels = sum(linear.out_features for linear in linears) if kind == PACKED else 0
    return int(bits) + 32 / group_size + 32 * channels / weights


def check_source(source: Source, spec: RunSpec) -> None:
    """Refuse what cannot be quantized, from config.json and tensor shapes alone.

    Raises:
        InputError: an unsupported architecture, a mixture of experts, or a group size that does
            not divide a layer.
    """
    if "quantization_config" in source.config:
        raise InputError(
            f"model.source: {source.location} is quantized already; give the original weights"
        )
    kind = source.config["model_type"]
    experts = [key for key in source.config if "expert" in key]
    if experts or "moe" in kind or kind == "mixtral":
        raise InputError(
            f"model.source: {source.location} is a mixture of experts ({kind}); only dense models "
            "are supported, because experts are not linears and would stay unquantized"
        )
    if kind not in ARCHITECTURES:
        raise InputError(
            f"model.source: model_type {kind} is not supported; use one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    linears = find_linears(source.tensors)
    blocks = {linear.block for linear in linears}
    if blocks != set(range(source.config["num_hidden_layers"])):
        raise InputError(
            f"model.source: config.json promises {source.config['num_hidden_layers']} blocks, the "
            f"weights hold {len(blocks)}; fetch the model again"
        )
    _check_shapes(source)
    for linear in linears:
        if linear.in_features % spec.group_size:
            fitting = [g for g in (256, 128, 64, 32) if not linear.in_features % g]
            raise InputError(
                f"group_size: {spec.group_size} does not divide the {linear.in_features} inputs of "
                f"{linear.name}; use {fitting[0] if fitting else 'another model: none does'}"
            )
    longest = source.config.get("max_position_embeddings")
    for field in ("calibration", "evaluation"):
        text = getattr(spec, field)
        if longest is not None and text is not None and text.sequence_length > longest:
            raise InputError(
                f"{field}.sequence_length: {text.sequence_length} is more than the model's "
                f"{longest} positions; use at most {longest}"
            )


def _check_shapes(source: Source) -> None:
    """Hold config.json against the weights, where a mistake would surface only in a task."""
    config = source.config
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        raise InputError(f"model.source: num_attention_heads is {heads!r}; fetch config.json again")
    width = heads * (config.get("head_dim") or config["hidden_size"] // heads)
    expected = {
        "model.embed_tokens.weight": (config["vocab_size"], config["hidden_size"]),
        "model.layers.0.self_attn.q_proj.weight": (width, config["hidden_size"]),
    }
    for name, shape in expected.items():
        entry = source.tensors.get(name)
        if entry is None or entry.shape != shape:
            raise InputError(
                f"model.source: config.json promises {list(shape)} for {name}, the weights hold "
                f"{list(entry.shape) if entry else 'none'}; fetch the model again"
            )


def task_memory_bytes(plan: Plan, spec: RunSpec, hidden_size: int) -> int:
    """Memory of one calibrate task: what the largest block and its training need.

    Weight, gradient and two moments in float32, the quantized copies of one forward and backward
    pass, hidden states in and out, and the activations of a microbatch.
    """
    weights: dict[int, int] = {}
    for linear in plan.linears:
        size = linear.out_features * linear.in_features
        weights[linear.block] = weights.get(linear.block, 0) + size
    item = 2 if spec.dtype == "bfloat16" else 4
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    streams = 2 + len(spec.optimisation.slice_counts) * (spec.propagation == "sequential")
    widest = max(linear.out_features + linear.in_features for linear in plan.linears)
    activations = 12 * spec.microbatch * spec.calibration.sequence_length * widest * item
    return (16 + 8) * max(weights.values()) + streams * tokens * hidden_size * item + activations


def _is_ready(task: Task, plan: Plan, progress: Progress, workers: int) -> bool:
    done = progress.done
    if task.kind == "capture":
        block = task.block
        if (
            block >= needed_captures(plan, progress.settled)
            or len(progress.held) >= workers + _LOOK_AHEAD
        ):
            return False
        if block == 0:
            return True
        calibrated = plan.calibrations[block - 1] in done
        return block - 1 in progress.held and (calibrated or not plan.sequential)
    if task.kind == "calibrate":
        return task.block in progress.held
    if task.kind == "pack":
        shard = next(shard for shard in plan.shards if shard.file == task.target)
        return all(plan.calibrations[block] in done for block in shard.blocks)
    return progress.published or not task.target.startswith(PACKED)
