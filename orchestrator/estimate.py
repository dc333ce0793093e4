"""What a run would take, from shapes alone: printed by `check` before any GPU is taken."""

from typing import Any

from mbq.artifacts.documents import RunDocument
from mbq.orchestrator.plan import build_plan, task_memory_bytes


def estimate(document: RunDocument) -> dict[str, Any]:
    """Sizes in bytes and arithmetic in floating point operations of a checked run."""
    plan = build_plan(document)
    spec = document.spec
    hidden_size = int(document.source.config["hidden_size"])
    tokens = spec.calibration.samples * spec.calibration.sequence_length
    files = [sum(entry.size_bytes for entry in shard.entries) for shard in plan.shards]
    codes = sum(linear.weights for linear in plan.linears)
    return {
        "run": document.run,
        "model": document.name,
        "model_digest": document.model_digest,
        "blocks": len(plan.calibrations),
        "tasks": len(plan.tasks),
        "quantized_weights": codes,
        "calibration_tokens": tokens,
        "task_memory_bytes": task_memory_bytes(plan, spec, hidden_size),
        "hidden_state_bytes": (1 + len(spec.streams)) * tokens * hidden_size * spec.element_bytes,
        "checkpoint_bytes": sum(files),
        "store_bytes": sum(files) + codes,
        "flops": sum(task.flops for task in plan.tasks),
    }


def to_text(found: dict[str, Any]) -> str:
    """The estimate in six lines."""
    return "\n".join(
        (
            f"run {found['run']}: {found['model']} ({found['model_digest']})",
            f"{found['blocks']} blocks, {found['quantized_weights']:,} weights to quantize, "
            f"{found['tasks']} tasks",
            f"{found['calibration_tokens']:,} calibration tokens, "
            f"{_size(found['hidden_state_bytes'])} of hidden states a block",
            f"{_size(found['task_memory_bytes'])} of memory for one calibrate task",
            f"{_size(found['checkpoint_bytes'])} checkpoint, "
            f"{_size(found['store_bytes'])} in the store",
            f"{found['flops'] / 1e12:,.1f} TFLOP in all",
        )
    )


def _size(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
