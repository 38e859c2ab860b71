"""What runs on a Ray cluster where, and how much of it at a time."""

from collections.abc import Callable
from typing import Any

import ray
import ray.data

# Tasks that write, or count, at a time: each holds a part.
MOST_TASKS = 32


def on_accelerators() -> dict[str, Any]:
    """How many actors there are at most, and what each holds: a GPU, the TPU chips of a host, or,
    where there are neither, a CPU, of which half are for decoding."""
    resources = ray.cluster_resources()
    if n_gpus := int(resources.get("GPU", 0)):
        held, most = {"num_gpus": 1}, n_gpus
    elif resources.get("TPU"):
        hosts = [node["Resources"].get("TPU", 0) for node in ray.nodes() if node["Alive"]]
        chips = [n for n in hosts if n]
        held, most = {"resources": {"TPU": min(chips)}}, len(chips)
    else:
        held, most = {"num_cpus": 1}, max(1, int(resources.get("CPU", 1)) // 2)
    return {**held, "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most)}


class Tasks:
    """Tasks under way whose results are noted as they come; not too many at a time."""

    def __init__(self, note: Callable[[str, dict], None]):
        self._note, self._names = note, {}

    def add(self, name: str, task: ray.ObjectRef) -> None:
        self._names[task] = name
        self._collect(timeout=0)
        while len(self._names) > MOST_TASKS:
            self._collect(timeout=None)

    def finish(self) -> None:
        while self._names:
            self._collect(timeout=None)

    def _collect(self, timeout: float | None) -> None:
        ended, _ = ray.wait(list(self._names), num_returns=1, timeout=timeout)
        for task in ended:
            self._note(self._names.pop(task), ray.get(task))
