"""The formulas for FLOPs and parameters, against the compiler and against real models."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from opensora_jax.diffusion.objectives import RectifiedFlow
from opensora_jax.models import flops
from opensora_jax.models.dit import TEXT_MODES, DiT, DiTConfig
from opensora_jax.tasks.dit import DiTTask, Latents

GRID, TEXT_LENGTH, BATCH = (2, 8, 8), 8, 2


CONFIG = DiTConfig(
    depth=1, width=256, heads=4, channels=16, out_channels=16, patch=2, text_width=64
)


@pytest.mark.parametrize("text_mode", TEXT_MODES)
def test_flops_are_what_the_compiler_counts(text_mode):
    dit = dataclasses.replace(CONFIG, text_mode=text_mode)
    latents = Latents(np.zeros((32, 16), np.float32))
    task = DiTTask(dit, latents, RectifiedFlow(), caption_dropout=0.1)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, extra = jax.eval_shape(task.init, key)
    batch = {
        "codes": jax.ShapeDtypeStruct((BATCH, *GRID), np.int32),
        "text": jax.ShapeDtypeStruct((BATCH, TEXT_LENGTH, 64), np.float32),
        "text_length": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    gradient = jax.jit(jax.grad(task.loss, has_aux=True))
    lowered = gradient.lower(params, extra, batch, key, np.int32(0))
    fast = {"xla_backend_optimization_level": 0}  # to compile; it is not run
    counted = lowered.compile(fast).cost_analysis()
    formula = flops.dit_step_flops(dit, grid=GRID, text_length=TEXT_LENGTH, batch_size=BATCH)
    assert formula == pytest.approx(counted["flops"], rel=0.04)


@pytest.mark.parametrize("text_mode", TEXT_MODES)
def test_parameters_are_those_of_the_model(text_mode):
    dit = dataclasses.replace(CONFIG, text_mode=text_mode, depth=3, out_channels=32)
    model = nnx.eval_shape(lambda: DiT(dit, rngs=nnx.Rngs(0)))
    n = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert flops.dit_parameters(dit) == n
