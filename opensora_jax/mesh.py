"""The device mesh, and the one table that maps logical axes of arrays onto it."""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis of a parameter -> mesh axis. Every name used beside a parameter has a rule here, and
# every rule a user (tests/test_mesh.py).
RULES: Mapping[str, str | None] = {
    "embed": "fsdp",  # width of the DiT's residual stream
    "heads": "tensor",  # heads x head size of attention
    "mlp": "tensor",  # hidden width of the DiT's MLP
    "modulation": "tensor",  # adaLN's shifts, scales and gates
    "text": None,  # width of the text features
    "latent": None,  # channels of a patch of code embeddings
    "frequency": None,  # sinusoidal embedding of time
    "norm": None,  # one head's features
    "conv_in": "fsdp",  # input channels of the VQ-VAE's convolutions
    "conv_out": "tensor",  # output channels of the VQ-VAE's convolutions
}

# A batch is divided over both data axes: fsdp shards parameters and examples alike.
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; `sizes` gives each axis of `AXES` a size, -1 meaning the rest.

    Args:
      devices: others than those of this run, to compile for them.

    Raises:
      ValueError: if an axis is unknown or missing, or the sizes do not multiply to the number of
        devices.
    """
    n = jax.device_count() if devices is None else len(devices)
    if set(sizes) != set(AXES):
        raise ValueError(f"mesh={dict(sizes)}: expected the axes {', '.join(AXES)}")
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise ValueError(f"mesh={dict(sizes)}: expected positive sizes, at most one of them -1")
    known = math.prod(s for s in shape if s != -1)
    if n % known or (-1 not in shape and known != n):
        raise ValueError(f"mesh={dict(sizes)}: the sizes do not divide the {n} devices evenly")
    shape = [n // known if s == -1 else s for s in shape]
    axis_types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)


def partition_spec(shape: tuple[int, ...], axes: Iterable[str | None], mesh: Mesh) -> PartitionSpec:
    """Mesh axes of an array by its logical `axes`; leading dimensions without a name are stacked.

    A dimension that its mesh axis does not divide stays whole (three output channels over four
    devices, say).

    Raises:
      ValueError: for a logical axis without a rule.
    """
    axes = tuple(axes)
    axes = (None,) * (len(shape) - len(axes)) + axes
    spec: list[str | None] = []
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r}: no rule; known are {', '.join(RULES)}")
        mesh_axis = RULES[name] if name else None
        taken = mesh_axis is None or mesh_axis in spec or size % mesh.shape[mesh_axis]
        spec.append(None if taken else mesh_axis)
    return PartitionSpec(*spec)


def param_shardings(params: nnx.State, mesh: Mesh):
    """Shardings of a (possibly abstract) state of parameters, each made by `layers.param`."""

    def sharding(variable):
        axes = variable.get_metadata().get("axes", ())
        return NamedSharding(mesh, partition_spec(variable.shape, axes, mesh))

    return jax.tree.map(sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch -> global arrays divided over the data axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
