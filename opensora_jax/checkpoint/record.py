"""What a checkpoint says of the run that made it, for one that reads it."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide about numbers, and the devices."""
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return {"python": platform.python_version(), **packages, "devices": devices}


def arrays(tree: Any) -> dict[str, str]:
    """Types and shapes by path: {"params/head/kernel": "float32[8,4]"}."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{x.dtype}[{','.join(map(str, x.shape))}]"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it comes back from a JSON file: tuples are lists."""
    return json.loads(json.dumps(value))
