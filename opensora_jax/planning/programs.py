"""What runs between the steps of a DiT's training and has to fit beside its state."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from opensora_jax import mesh as mesh_lib
from opensora_jax import rngs
from opensora_jax.build import training as build
from opensora_jax.build.training import DiTTraining
from opensora_jax.planning import synthetic

N_SAMPLES = 8  # videos drawn at once, or one a device that takes part


class Program(NamedTuple):
    """A compiled function of (averaged weights, *args).

    Attributes:
      args: shapes of the others, with their shardings.
    """

    function: Any
    args: tuple[Any, ...]

    def lower(self, params: mesh_lib.PyTree) -> jax.stages.Lowered:
        return self.function.lower(params, *self.args)


def evaluation(config: ConfigDict, training: DiTTraining, mesh: Mesh) -> Program:
    """The validation losses of one batch, in the microbatches of the training."""
    step = functools.partial(training.task.eval_step, accumulate=config.dit.accumulate)
    batch = _sharded(synthetic.batch_shapes(config), mesh)
    # Its shape alone: the devices of the mesh may not be there to hold it.
    key = jax.eval_shape(lambda: rngs.key(0, "validation"))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh_lib.replicated(mesh))
    return Program(jax.jit(step), (batch, key))


def sampling(config: ConfigDict, training: DiTTraining, mesh: Mesh) -> Program:
    """Videos for a few prompts in two steps: the memory of any number of them."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    n = -(-N_SAMPLES // parts) * parts
    key = jax.eval_shape(lambda: rngs.key(0, "samples"))
    shape = (n, *synthetic.latent_grid(config))
    noise = jax.eval_shape(lambda key: training.task.noise(key, shape), key)
    shapes = {name: (n, *x.shape[1:]) for name, x in synthetic.batch_shapes(config).items()}
    args = (
        jax.ShapeDtypeStruct(shapes["text"], np.float32),
        jax.ShapeDtypeStruct(shapes["text_length"], np.int32),
        jax.ShapeDtypeStruct(noise.shape, noise.dtype),
        jax.ShapeDtypeStruct((n,), key.dtype),
    )
    sampling = build.sampling(config.sample, steps=2)
    sample = functools.partial(training.task.sample, sampling=sampling)
    return Program(jax.jit(sample, out_shardings=mesh_lib.replicated(mesh)), _sharded(args, mesh))


def _sharded(shapes: mesh_lib.PyTree, mesh: Mesh) -> mesh_lib.PyTree:
    sharding = NamedSharding(mesh, mesh_lib.BATCH)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
