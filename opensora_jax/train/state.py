"""The train state: everything that resumes, in one pytree."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from opensora_jax import mesh as mesh_lib
from opensora_jax.mesh import PyTree

# The item of a checkpoint that holds the step and the counts of skipped ones: Orbax takes trees,
# not single arrays, and writes some ten files for each.
_COUNTERS = "counters"


class Task(Protocol):
    """One kind of training. All methods are pure; `params` and `extra` are nested dicts."""

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        """Parameters and the rest of the model's state (statistics, averages)."""

    def param_shardings(self, mesh: Mesh) -> PyTree:
        """A sharding for each parameter."""

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        batch: dict[str, jax.Array],
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        """Scalar loss, and (new extra, scalars to log)."""


@struct.dataclass
class TrainState:
    step: jax.Array  # int32, steps taken
    params: PyTree  # float32
    ema: PyTree  # exponential moving average of params
    opt_state: PyTree
    extra: PyTree  # batch statistics, codebook averages
    skipped: dict[str, jax.Array]  # int32: steps that were not finite, in total and in a row


def to_items(state: TrainState) -> dict[str, PyTree]:
    """The named items of a checkpoint: the fields that hold anything."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields[_COUNTERS] = {name: fields.pop(name) for name in ("step", "skipped")}
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def from_items(like: TrainState, items: Mapping[str, PyTree]) -> TrainState:
    """The state that `to_items` made `items` of; its empty fields are those of `like`."""
    fields = {name: tree for name, tree in items.items() if name != _COUNTERS}
    return like.replace(**fields, **items[_COUNTERS])


def new(task: Task, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """A new state, not yet sharded."""
    params, extra = task.init(key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        extra=extra,
        skipped={"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)},
    )


def abstract(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The shapes of a state, with its shardings.

    EMA and optimizer moments are sharded as their parameter is; the rest is replicated.
    """
    shapes = jax.eval_shape(lambda: new(task, tx, jax.random.key(0)))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(task, tx, mesh, shapes),
    )


def create(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    key: jax.Array,
    start_from: Mapping[str, Any] | None = None,
) -> tuple[TrainState, TrainState]:
    """A new state, made where it is to live, and its shardings.

    Args:
      start_from: a part of the tree of parameters, of numpy arrays that take the place of random
        ones; the average starts there too.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract(task, tx, mesh))
    state = jax.jit(functools.partial(new, task, tx), out_shardings=shardings)(key)
    if start_from:
        params, ema = (_with_values(tree, start_from) for tree in (state.params, state.ema))
        state = state.replace(params=params, ema=ema)
    return state, shardings


def _with_values(tree: PyTree, values: PyTree) -> PyTree:
    """`tree` with the arrays that `values` has at the same place, sharded as those they replace."""
    by_path = dict(jax.tree.leaves_with_path(values))

    def choose(path, leaf):
        if path not in by_path:
            return leaf
        # Not device_put, which would send every process's array to all of its devices.
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: by_path[path][index]
        )

    return jax.tree.map_with_path(choose, tree)


def state_shardings(
    task: Task, tx: optax.GradientTransformation, mesh: Mesh, shapes: TrainState
) -> TrainState:
    """Shardings of a state of these (abstract) shapes."""
    whole = mesh_lib.replicated(mesh)
    params = task.param_shardings(mesh)
    by_path = {path: sharding for path, sharding in jax.tree.leaves_with_path(params)}

    def like_its_parameter(path, leaf):
        # An optimizer keeps its moments in trees like the parameters', somewhere within its state.
        for start in range(len(path)):
            sharding = by_path.get(path[start:])
            if sharding is not None and len(sharding.spec) <= len(leaf.shape):
                return sharding
        return whole

    return TrainState(
        step=whole,
        params=params,
        ema=params,
        opt_state=jax.tree.map_with_path(like_its_parameter, shapes.opt_state),
        extra=jax.tree.map(lambda _: whole, shapes.extra),
        skipped=jax.tree.map(lambda _: whole, shapes.skipped),
    )
