"""The table of a state's parameters that a training prints at its start."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from opensora_jax.mesh import PyTree
from opensora_jax.train.state import TrainState

# Arrays of at least this share of the parameters are listed one by one.
LARGE = 0.02


def table(state: TrainState) -> str:
    """Parameters and bytes on a device by module, and how each large array is sharded.

    Args:
      state: of arrays, or of shapes, with shardings.
    """
    leaves = jax.tree.leaves_with_path(state.params)
    total = sum(x.size for _, x in leaves)
    modules: dict[str, list[tuple[str, Any]]] = {}
    for path, x in leaves:
        *module, name = [str(entry.key) for entry in path]
        # The blocks of a stack in one line each kind, the rest by their first names.
        modules.setdefault(".".join(module[:2]) or name, []).append(
            (".".join([*module[2:], name]), x)
        )
    rows = [("module", "parameters", "a device", "large arrays: shape, mesh axes of dimensions")]
    for module, arrays in modules.items():
        large: dict[str, list[str]] = {}
        for name, x in arrays:
            if x.size >= LARGE * total:
                large.setdefault(_sharding(x), []).append(name)
        described = [f"{', '.join(names)}: {sharding}" for sharding, names in large.items()]
        n = sum(x.size for _, x in arrays)
        held = device_bytes([x for _, x in arrays])
        rows.append((module, f"{n:,}", _size(held), *described[:1]))
        rows += [("", "", "", line) for line in described[1:]]
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(3)]
    lines = []
    for module, n, held, *described in rows:
        columns = [module.ljust(widths[0]), n.rjust(widths[1]), held.rjust(widths[2]), *described]
        lines.append("  ".join(columns).rstrip())
    parts = {
        "parameters": state.params,
        "their average": state.ema,
        "optimizer": state.opt_state,
        "the rest": state.extra,
    }
    held = ", ".join(f"{name} {_size(device_bytes(tree))}" for name, tree in parts.items())
    return "\n".join([f"{total:,} parameters; a device holds: {held}", *lines])


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _sharding(x: jax.Array) -> str:
    axes = ["-"] * x.ndim
    if isinstance(x.sharding, NamedSharding):
        for i, part in enumerate(x.sharding.spec):
            names = (part,) if isinstance(part, str) else part or ()
            axes[i] = "+".join(a for a in names if x.sharding.mesh.shape[a] > 1) or "-"
    return f"{' x '.join(map(str, x.shape))} ({', '.join(axes)})"


def _size(n: int) -> str:
    power = max(0, min(4, int(math.log(max(n, 1), 1000))))
    return f"{n / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
