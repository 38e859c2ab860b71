"""The device mesh, and the one table that maps logical axes of arrays onto it."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any  # nested containers of arrays
MeshAxes = tuple[str, ...]

AXES = ("data", "fsdp", "context", "tensor")

# Logical axis of a parameter -> mesh axes, for each model. Every name used beside a parameter has a
# rule here, and every rule that divides anything has a user: `param_shardings` sees to both.
DIT_RULES: Mapping[str, MeshAxes] = {
    "embed": ("fsdp",),  # width of the residual stream
    "heads": ("tensor",),  # heads x head size of attention
    "mlp": ("tensor",),  # hidden width of the MLP
    "modulation": ("tensor",),  # adaLN's shifts, scales and gates
    "text": (),  # width of the text features
    "latent": (),  # channels of a patch of code embeddings
    "code": (),  # logits of all codes
    "frequency": (),  # sinusoidal embedding of time
    "norm": (),  # one head's features
}
VQVAE_RULES: Mapping[str, MeshAxes] = {
    "conv_in": ("fsdp",),  # input channels of convolutions
    "conv_out": ("tensor",),  # output channels of convolutions
}
PARAMETER_RULES = DIT_RULES | VQVAE_RULES

# Logical axis of an activation -> mesh axes, beside the names of parameters, for `constrain`.
# Parameters' axes leave out fsdp there: weights are gathered where they are used, while examples
# are sharded over it.
ACTIVATION_RULES: Mapping[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "clip": ("data", "fsdp", "context"),  # examples without a sequence to divide
    "sequence": ("context",),  # tokens
    "swapped_heads": ("tensor", "context"),  # heads, while every device has whole sequences
} | {
    name: tuple(axis for axis in mesh_axes if axis != "fsdp")
    for name, mesh_axes in PARAMETER_RULES.items()
}

# How a batch arrives from the host.
BATCH = PartitionSpec(ACTIVATION_RULES["batch"])


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; `sizes` gives each axis of `AXES` a size, -1 meaning the rest.

    It may be the configuration's part `mesh`, which holds more.

    Where the devices are several slices, joined by a slower network, `data` goes over them, and
    `fsdp` where data alone does not reach.

    Args:
      devices: others than those of this run, to compile for them.

    Raises:
      ValueError: if an axis is missing, the sizes do not multiply to the number of
        devices, or slices do not divide data x fsdp.
    """
    devices = jax.devices() if devices is None else devices
    n = len(devices)
    if not set(AXES) <= set(sizes):
        raise ValueError(f"mesh={dict(sizes)}: expected the axes {', '.join(AXES)}")
    sizes = {axis: sizes[axis] for axis in AXES}
    shape = list(sizes.values())
    if shape.count(-1) > 1 or any(s < 1 and s != -1 for s in shape):
        raise ValueError(f"mesh={dict(sizes)}: expected positive sizes, at most one of them -1")
    known = math.prod(s for s in shape if s != -1)
    if n % known or (-1 not in shape and known != n):
        raise ValueError(f"mesh={dict(sizes)}: the sizes do not divide the {n} devices evenly")
    shape = [n // known if s == -1 else s for s in shape]
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    data, fsdp, *rest = shape
    over_data = math.gcd(data, slices)
    over_fsdp = slices // over_data
    if fsdp % over_fsdp:
        raise ValueError(
            f"mesh.data={data}, mesh.fsdp={fsdp}: the {slices} slices do not divide them"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // over_data, fsdp // over_fsdp, *rest), (over_data, over_fsdp, 1, 1), devices
    )
    return Mesh(grid, AXES, axis_types=types)


def partition_spec(
    shape: tuple[int, ...],
    axes: Iterable[str | None],
    rules: Mapping[str, MeshAxes],
    mesh: Mesh | AbstractMesh,
) -> PartitionSpec:
    """Mesh axes of an array by its logical `axes`; leading dimensions without a name are stacked.

    A dimension is sharded over as many of its mesh axes, from the first on, as divide it evenly;
    three output channels over four devices, say, stay whole.

    Raises:
      ValueError: for a logical axis without a rule.
    """
    axes = tuple(axes)
    axes = (None,) * (len(shape) - len(axes)) + axes
    spec: list[MeshAxes | str | None] = []
    for size, name in zip(shape, axes, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r}: no rule; known are {', '.join(rules)}")
        mesh_axes = rules[name] if name else ()
        while size % math.prod(mesh.shape[axis] for axis in mesh_axes):
            mesh_axes = mesh_axes[:-1]
        spec.append(mesh_axes or None)
    return PartitionSpec(*spec)


def param_shardings(params: nnx.State, rules: Mapping[str, MeshAxes], mesh: Mesh) -> PyTree:
    """Shardings of a (possibly abstract) state of parameters, each made by `layers.param`.

    Raises:
      ValueError: for a logical axis without a rule, a rule without a parameter, and a mesh axis
        that is to divide parameters but divides none.
    """
    used: set[str | None] = set()

    def sharding(variable):
        axes = variable.get_metadata().get("axes", ())
        used.update(axes)
        return NamedSharding(mesh, partition_spec(variable.shape, axes, rules, mesh))

    shardings = jax.tree.map(sharding, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    unused = [name for name, mesh_axes in rules.items() if mesh_axes and name not in used]
    if unused:
        raise ValueError(f"logical axes {', '.join(unused)}: rules that no parameter uses")
    divide = {axis for sharding in jax.tree.leaves(shardings) for axis in sharding.spec}
    for axis in {axis for mesh_axes in rules.values() for axis in mesh_axes}:
        if axis not in divide:
            raise ValueError(f"mesh.{axis}={mesh.shape[axis]}: divides no parameter of this model")
    return shardings


def constrain(
    x: jax.Array,
    *axes: str | EllipsisType | None,
    rules: Mapping[str, MeshAxes] = ACTIVATION_RULES,
) -> jax.Array:
    """x sharded over the current mesh by one logical axis (or None: whole) a dimension.

    A leading `...` leaves the dimensions it stands for to the compiler. Without a mesh
    (`jax.set_mesh`) or with one device it is x itself.
    """
    if size() == 1:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    names = axes[1:] if axes[0] is ... else axes
    spec = partition_spec(x.shape, names, rules, mesh)
    if axes[0] is ...:
        n_free = x.ndim - len(names)
        spec = PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * n_free, *spec[n_free:])
    return jax.lax.with_sharding_constraint(x, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A parameter with logical `axes`, gathered over fsdp; its gradient is scattered over it.

    Left to itself the compiler may move activations instead, or multiply by one part of the weight
    at a time, which writes the product as often as there are parts.
    """
    return constrain(weight, *axes)


gather.defvjp(
    lambda weight, axes: (gather(weight, axes), None),
    lambda axes, _, gradient: (constrain(gradient, *axes, rules=PARAMETER_RULES),),
)


def shard_map(f: Callable[..., jax.Array], *axes: tuple[str | None, ...]) -> Callable:
    """f on each device's part of its arguments, one tuple of logical axes an argument.

    The result is sharded as the first argument is. Without a mesh or with one device it is f.
    """
    if size() == 1:
        return f
    mesh = jax.sharding.get_abstract_mesh()

    def call(*args: jax.Array) -> jax.Array:
        specs = tuple(
            partition_spec(x.shape, names, ACTIVATION_RULES, mesh)
            for x, names in zip(args, axes, strict=True)
        )
        # Pallas kernels do not say how their results vary over devices.
        return jax.shard_map(f, in_specs=specs, out_specs=specs[0], check_vma=False)(*args)

    return call


def size(axis: str | None = None) -> int:
    """Size of the current mesh, or of one axis of it; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return 1
    return mesh.size if axis is None else mesh.shape[axis]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def local_batch_indices(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The examples of a batch, sorted, that this process's devices hold: what it has to load.

    Processes whose devices divide no batch between them, but tokens or heads, hold the same.
    """
    places = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[place] for place in places]))


def microbatches(batch: PyTree, n: int) -> PyTree:
    """Arrays (B, ...) -> (n, B / n, ...), strided, so that each part is spread over all devices."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0), batch)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The `local_batch_indices` of a batch -> global arrays sharded over the data axes."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def shard_whole(batch: PyTree, mesh: Mesh) -> PyTree:
    """A batch that every process holds whole -> global arrays sharded over the data axes."""
    sharding = NamedSharding(mesh, BATCH)

    def shard(x):
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        host = np.asarray(jax.random.key_data(x) if is_key else x)
        array = jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
        return jax.random.wrap_key_data(array) if is_key else array

    return jax.tree.map(shard, batch)
