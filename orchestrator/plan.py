"""What a run consists of, and what of it can start now: pure functions on small frozen data.

    capture 0 -> capture 1 -> ... -> capture n-1      the chain of hidden states
        |            |                   |
    calibrate 0  calibrate 1    ...  calibrate n-1    each needs its capture, and sensitivity
        \\____________|___________________/    \\
           pack <file> ...                  settle <method> ...
                     |                             |
                     |                           route            the routers of the method chosen
                     \\___________________________/
                 publish                              index, config, tokenizer, manifest
                     |
      evaluate mbq-<bits>, routed-<bits>, sample      evaluate full and rtn-<bits> need nothing,
      validate <shape> ...                            rivals need every settle, too

`sensitivity` needs nothing. A checkpoint of one slice has nothing to share: no sensitivity, settle,
route or sample.

With sequential propagation, the default, capture i + 1 also needs calibrate i, so blocks are
calibrated one after the other; with full precision they are in parallel. Hidden states are bounded:
the chain runs at most `workers + 2` blocks ahead of calibration.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Literal

from mbq.artifacts.checkpoint import (
    ROUTING_FILE,
    Linear,
    Shard,
    find_linears,
    plan_shards,
)
from mbq.artifacts.documents import RunDocument
from mbq.artifacts.spec import RunSpec
from mbq.orchestrator.comparison import candidates, settled_methods, variants
from mbq.workers.variants import PACKED, ROUTED, of_source, parse

Kind = Literal[
    "capture",
    "sensitivity",
    "calibrate",
    "settle",
    "pack",
    "route",
    "validate",
    "evaluate",
    "sample",
]
# Evaluations of the source model need nothing and fill whatever is left idle, so they come last.
_PRIORITY: dict[Kind, int] = {
    "sensitivity": 0,
    "capture": 1,
    "calibrate": 2,
    "settle": 3,
    "pack": 4,
    "route": 4,
    "validate": 5,
    "evaluate": 5,
    "sample": 5,
}
_LOOK_AHEAD = 2
# Settling runs its tokens through the model this often: for 7 averages twice, for 5 whole widths,
# for a first look, and in full precision.
_SETTLE_PASSES = 21


@dataclass(frozen=True)
class Task:
    """One unit of work; `target` is the number, name, method, shape or variant it is about.

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
    sensitivities: tuple[Task, ...]
    calibrations: tuple[Task, ...]
    settles: tuple[Task, ...]
    packs: tuple[Task, ...]
    routes: tuple[Task, ...]
    validations: tuple[Task, ...]
    evaluations: tuple[Task, ...]
    samples: tuple[Task, ...]
    candidates: tuple[str, ...]
    shards: tuple[Shard, ...]
    linears: tuple[Linear, ...]
    sequential: bool

    @property
    def tasks(self) -> tuple[Task, ...]:
        return (
            self.captures
            + self.sensitivities
            + self.calibrations
            + self.settles
            + self.packs
            + self.routes
            + self.validations
            + self.evaluations
            + self.samples
        )

    @property
    def checkpoint(self) -> Set[Task]:
        """What must be done before the checkpoint is published."""
        return {*self.calibrations, *self.packs, *self.routes}


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
    def over(self) -> Set[Task]:
        """Tasks that will not run again."""
        return self.done | self.failed


@dataclass(frozen=True)
class _Flops:
    """Arithmetic of tasks, for each weight of the block (`capture`, `calibrate`) or in all."""

    capture: float
    calibrate: float
    sensitivity: float
    settle: float
    evaluate: float


def _flops(spec: RunSpec, forward: float) -> _Flops:
    """Two operations for a weight and token forward, four backward.

    Args:
        forward: operations for a token of the whole model.
    """
    length = spec.calibration.sequence_length
    tokens = spec.calibration.samples * length
    # Forward and backward of two widths per pass, in the last stage of one, and a few forward
    # passes around them, most of which add up Gram matrices.
    trained = 2 * len(spec.optimisation.widths) - 1
    sensed = length * min(spec.routing.sensitivity_samples, spec.calibration.samples)
    return _Flops(
        capture=2.0 * tokens * (1 + len(spec.streams)),
        calibrate=tokens * (6.0 * trained * spec.optimisation.passes + 6.0),
        sensitivity=3.0 * sensed * forward,
        settle=_SETTLE_PASSES * min(tokens, spec.routing.settle_tokens) * forward,
        evaluate=spec.evaluation.tokens * forward if spec.evaluation else 0.0,
    )


def build_plan(document: RunDocument) -> Plan:
    """The plan of a resolved run."""
    spec = document.spec
    tensors = document.source.tensors
    linears = find_linears(tensors)
    shards = plan_shards(tensors, spec.slices, spec.group_size)
    blocks = 1 + max(linear.block for linear in linears)
    weights = [0] * blocks
    for linear in linears:
        weights[linear.block] += linear.weights

    head = 2.0 * document.source.config["vocab_size"] * document.source.config["hidden_size"]
    flops = _flops(spec, 2.0 * sum(weights) + head)
    shared = spec.slices > 1
    return Plan(
        captures=tuple(
            Task("capture", f"{b:03d}", flops.capture * weights[b - 1] if b else 0.0)
            for b in range(blocks)
        ),
        sensitivities=(Task("sensitivity", "model", flops.sensitivity),) if shared else (),
        calibrations=tuple(
            Task("calibrate", f"{b:03d}", flops.calibrate * weights[b]) for b in range(blocks)
        ),
        settles=tuple(Task("settle", method, flops.settle) for method in settled_methods(spec)),
        routes=(Task("route", ROUTING_FILE, 0.0),) if shared else (),
        packs=tuple(
            Task("pack", shard.file, 200.0 * sum(e.size_bytes for e in shard.entries))
            for shard in shards
        ),
        validations=tuple(Task("validate", shape, 0.0) for shape in shapes_of(document)),
        evaluations=tuple(Task("evaluate", v, flops.evaluate) for v in variants(spec)),
        samples=(Task("sample", "text", 0.0),) if document.sample_tokens else (),
        candidates=candidates(spec),
        shards=tuple(shards),
        linears=tuple(linears),
        sequential=spec.propagation == "sequential",
    )


def shapes_of(document: RunDocument) -> list[str]:
    """Every shape of a quantized linear, `<N>x<K>`."""
    linears = find_linears(document.source.tensors)
    return list(dict.fromkeys(f"{x.out_features}x{x.in_features}" for x in linears))


def ready(plan: Plan, progress: Progress, workers: int) -> list[Task]:
    """Tasks that can start now, the most urgent first."""
    tasks = [
        task
        for task in plan.tasks
        if task not in progress.over
        and task not in progress.busy
        and _is_ready(task, plan, progress, workers)
    ]
    return sorted(tasks, key=lambda task: _PRIORITY[task.kind])


def needed_captures(plan: Plan, over: Set[Task]) -> int:
    """How long the chain of hidden states must be: up to the last block to calibrate."""
    return max((t.block + 1 for t in plan.calibrations if t not in over), default=0)


def releasable(plan: Plan, progress: Progress) -> set[int]:
    """Blocks whose hidden states nobody needs any more."""
    last = needed_captures(plan, progress.over) - 1
    return {
        block
        for block in progress.held
        if plan.calibrations[block] in progress.over
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


def task_memory_bytes(plan: Plan, spec: RunSpec, hidden_size: int) -> int:
    """Memory of one calibrate task: what the largest block and its training need.

    The source's weight; weight, gradient, two moments and two limits in float32; the quantized
    copies of one forward and backward pass, hidden states in and out, the activations of a
    microbatch, and the Gram matrices of what enters the linears, one of them in float64 while it
    is inverted.
    """
    weights: dict[int, int] = {}
    grams: dict[int, int] = {}
    for linear in plan.linears:
        weights[linear.block] = weights.get(linear.block, 0) + linear.weights
        grams[linear.block] = grams.get(linear.block, 0) + linear.in_features**2
    item = spec.element_bytes
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    quantized = len(spec.streams)
    hidden = (2 + quantized) * tokens * hidden_size * item
    widest = max(linear.out_features + linear.in_features for linear in plan.linears)
    activations = 12 * spec.microbatch * spec.calibration.sequence_length * widest * item
    inverted = 24 * max(linear.in_features for linear in plan.linears) ** 2
    gram = 4 * (1 + quantized) * max(grams.values()) + inverted
    return (item + 24 + 8) * max(weights.values()) + hidden + activations + gram


def _is_ready(task: Task, plan: Plan, progress: Progress, workers: int) -> bool:
    done = progress.done
    if task.kind == "capture":
        block = task.block
        if (
            progress.failed & {*plan.sensitivities}
            or block >= needed_captures(plan, progress.over)
            or len(progress.held) >= workers + _LOOK_AHEAD
        ):
            return False
        if block == 0:
            return True
        calibrated = plan.calibrations[block - 1] in done
        return block - 1 in progress.held and (calibrated or not plan.sequential)
    if task.kind == "calibrate":
        return task.block in progress.held and done >= {*plan.sensitivities}
    if task.kind == "sensitivity":
        return True
    if task.kind == "settle":
        return done >= {*plan.sensitivities, *plan.calibrations}
    if task.kind == "route":
        return done >= {task for task in plan.settles if task.target in plan.candidates}
    if task.kind == "pack":
        shard = next(shard for shard in plan.shards if shard.file == task.target)
        return all(plan.calibrations[block] in done for block in shard.blocks)
    if task.kind == "evaluate" and of_source(task.target):
        return True
    rival = task.kind == "evaluate" and parse(task.target)[0] not in (PACKED, ROUTED)
    return progress.published and (not rival or done >= {*plan.settles})
