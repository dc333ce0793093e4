"""What one task of a run takes, of nodes that offer so much; for the driver, and for `submit`."""

from collections.abc import Callable

from mbq.artifacts.documents import RunDocument
from mbq.artifacts.errors import ClusterError
from mbq.cluster.runner import TaskResources
from mbq.orchestrator.plan import Plan, task_memory_bytes


def choose_resources(
    document: RunDocument, slots_for: Callable[[TaskResources], int], plan: Plan
) -> tuple[TaskResources, int]:
    """What one task takes, and how many run at once.

    Args:
        slots_for: how many tasks that take so much the nodes can run at once.

    Raises:
        ClusterError: no node can hold one.
    """
    spec = document.spec
    hidden_size = document.source.config["hidden_size"]
    asked = spec.resources.memory_gib
    memory = int(asked * 1024**3) if asked else task_memory_bytes(plan, spec, hidden_size)
    on_cpu = TaskResources(cpus=spec.threads, memory_bytes=memory)
    # On a GPU the block lives in the GPU's memory; the host holds its hidden states, and what it
    # has room for is the user's to say.
    on_gpu = TaskResources(cpus=spec.threads, gpus=1, memory_bytes=memory if asked else None)
    chosen = {"cpu": [on_cpu], "cuda": [on_gpu], "auto": [on_gpu, on_cpu]}[spec.resources.device]
    for resources in chosen:
        slots = slots_for(resources)
        if slots:
            return resources, min(slots, spec.resources.workers or slots)
    if spec.resources.device == "cuda":
        raise ClusterError(
            f"no node offers a GPU and {spec.threads} CPUs for one task; set resources.device to "
            "cpu, lower threads, or add nodes with GPUs"
        )
    raise ClusterError(
        f"no node offers {spec.threads} CPUs and {memory / 1024**3:.1f} GiB for one task; lower "
        "threads or microbatch, set resources.memory_gib, or add nodes"
    )
