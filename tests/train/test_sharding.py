"""Training gives the same numbers on every mesh, and communicates what it should."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from opensora_jax import mesh as mesh_lib
from opensora_jax.diffusion.objectives import RectifiedFlow
from opensora_jax.models.dit import DiTConfig
from opensora_jax.models.vqvae import VQVAEConfig
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.tasks.vqvae import VQVAETask
from opensora_jax.train import optim, step
from opensora_jax.train import state as state_lib
from opensora_jax.train.settings import StepSettings
from opensora_jax.train.state import TrainState

STEPS, BATCH = 20, 8
SETTINGS = StepSettings(seed=0, ema_decay=0.9)
WIDTH, TOKENS = 64, 12
# Sizes of AXES. By default one layout is compared with one device here; test_multiprocess.py
# compares 1x2x1x2, on two processes, with 8x1x1x1.
LAYOUT = "2x2x2x1"
LAYOUTS = ["1x8x1x1", LAYOUT, "1x2x2x2"]
MORE_LAYOUTS = ["8x1x1x1", "1x1x4x2", "1x1x1x4", "2x1x4x1", "4x2x1x1", "1x4x2x1"]


def dit_task(text_mode="cross_attention", width=WIDTH, conditioning="text"):
    codebook = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    config = DiTConfig(
        depth=2,
        width=width,
        heads=8,
        channels=4,
        out_channels=4,
        patch=2,
        text_width=10,
        text_mode=text_mode,
        conditioning=conditioning,
    )
    latents = Latents.normalized(codebook, np.ones(16))
    return DiTTask(config, latents, RectifiedFlow(), caption_dropout=0.3)


def in_context_task():
    return dit_task("in_context")


def frames_task():
    return dit_task(conditioning="frames")


def vqvae_task(width=8):
    config = VQVAEConfig(
        n_codes=16,
        embedding_dim=4,
        n_hiddens=width,
        n_res_layers=0,
        downsample=(1, 2, 2),
        normalize_latents=True,
        n_frames=2,
    )
    return VQVAETask(config, quantize_between=(5, 10))


def make_batch(i):
    """Batch i of either task."""
    rng = np.random.default_rng(i)
    # Smooth videos, so that a VQ-VAE has something to learn in a few steps.
    video = rng.integers(256, size=(BATCH, 2, 1, 1, 3)).astype(np.uint8)
    return {
        "codes": rng.integers(16, size=(BATCH, 3, 4, 4)).astype(np.int32),
        "text": rng.normal(size=(BATCH, 4, 10)).astype(np.float32),
        "text_length": rng.integers(1, 5, size=BATCH).astype(np.int32),
        "video": np.broadcast_to(video, (BATCH, 2, 8, 8, 3)),
    }


def make_mesh(layout):
    """Over as many devices as the layout says, unlike `mesh.make_mesh`, which takes all."""
    shape = [int(size) for size in layout.split("x")]
    types = (AxisType.Auto,) * len(shape)
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, mesh_lib.AXES, axis_types=types, devices=devices)


def make_optimizer(name="adamw"):
    schedule = optim.schedule(3e-3, 2, STEPS)
    tx = optim.make(name, schedule, b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0)
    return tx, schedule


class Training:
    """A task's train step, compiled for a layout."""

    def __init__(self, make_task, layout, optimizer):
        self.mesh, task = make_mesh(layout), make_task()
        tx, schedule = make_optimizer(optimizer)
        self._start = first_state(make_task, optimizer)
        self.shardings = state_lib.state_shardings(task, tx, self.mesh, self._start)
        update = step.jit_train_step(task, tx, schedule, SETTINGS, self.shardings)
        with jax.set_mesh(self.mesh):
            self._step = update.lower(self.start(), self._batch(0)).compile()

    def start(self):
        return jax.device_put(self._start, self.shardings)

    def run(self, state, steps):
        """The state after these steps, and each step's loss and gradient norm."""
        measured = []
        for i in steps:
            state, metrics = self._step(state, self._batch(i))
            measured.append([metrics["loss"], metrics["grad_norm"]])
        return state, np.array(jax.device_get(measured))

    def collectives(self):
        """(kind, shape without ones) of what each collective operation of the program makes."""
        pattern = r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
        return [
            (kind, tuple(int(n) for n in shape.split(",") if n not in ("", "1")))
            for shapes, kind in re.findall(pattern, self._step.as_text())
            for shape in re.findall(r"\w+\[([\d,]*)\]", shapes)
        ]

    def _batch(self, i):
        return mesh_lib.shard_batch(make_batch(i), self.mesh)


@functools.cache
def first_state(make_task, optimizer):
    """With random numbers for parameters, none of them zero, which takes no compiling."""
    task, (tx, _) = make_task(), make_optimizer(optimizer)
    state = state_lib.abstract(task, tx, make_mesh("1x1x1x1"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), state.params)
    extra = jax.jit(lambda key: task.init(key)[1])(jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    return zeros.replace(params=params, ema=params, extra=jax.device_get(extra))


@functools.cache
def training(make_task, layout, optimizer):
    return Training(make_task, layout, optimizer)


@functools.cache
def measured(make_task, layout, optimizer):
    """Loss and gradient norm of all steps."""
    trained = training(make_task, layout, optimizer)
    return trained.run(trained.start(), range(STEPS))[1]


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-4)


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("make_task", "optimizer", "layout"),
    [
        (dit_task, "adamw", LAYOUT),
        *[slow(dit_task, "adamw", layout) for layout in LAYOUTS + MORE_LAYOUTS if layout != LAYOUT],
        *[slow(in_context_task, "adamw", layout) for layout in LAYOUTS],
        slow(frames_task, "adamw", LAYOUT),
        *[slow(dit_task, "muon", layout) for layout in LAYOUTS],
        *[slow(vqvae_task, "adamw", layout) for layout in ["8x1x1x1", *LAYOUTS]],
    ],
)
def test_numbers_do_not_depend_on_the_mesh(make_task, optimizer, layout):
    one = measured(make_task, "1x1x1x1", optimizer)
    assert len(np.unique(one[:, 0])) == STEPS
    assert one[-5:, 0].mean() < one[:5, 0].mean()
    assert_close(measured(make_task, layout, optimizer), one)


KERNELS = {(WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)}


@pytest.mark.slow
def test_fsdp_gathers_weights_and_moves_no_activations():
    collectives = training(dit_task, "1x8x1x1", "adamw").collectives()
    assert {shape for kind, shape in collectives if kind == "all-gather"} >= KERNELS
    assert not [c for c in collectives if TOKENS in c[1]]


def test_fsdp_gathers_weights_and_context_swaps_heads_with_tokens_and_neither_moves_others():
    collectives = training(dit_task, LAYOUT, "adamw").collectives()
    assert {shape for kind, shape in collectives if kind == "all-gather"} >= KERNELS
    assert [shape for kind, shape in collectives if kind == "all-to-all" and TOKENS // 2 in shape]
    for kind, shape in collectives:
        activations = {TOKENS, TOKENS // 2} & set(shape) and {WIDTH, 4 * WIDTH} & set(shape)
        assert not activations or kind == "all-to-all", f"{kind} {shape}"


@pytest.mark.parametrize("make_task", [dit_task, vqvae_task])
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_a_device_holds_its_part_of_the_state(make_task, optimizer):
    task, mesh = make_task(width=128), make_mesh("1x4x1x2")
    tx, _ = make_optimizer(optimizer)
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), np.int32),
        params=params,
        ema=params,
        opt_state=jax.eval_shape(tx.init, params),
        extra=extra,
        skipped={},
    )
    shardings = state_lib.state_shardings(task, tx, mesh, shapes)

    def held(part: str) -> float:
        """Share of the numbers of a part of the state that a device holds."""
        arrays = jax.tree.leaves(getattr(shapes, part))
        theirs = jax.tree.leaves(getattr(shardings, part))
        n_held = [
            math.prod(sharding.shard_shape(x.shape))
            for x, sharding in zip(arrays, theirs, strict=True)
        ]
        return sum(n_held) / sum(x.size for x in arrays)

    # More than an eighth: what few numbers eight devices do not divide stay whole.
    assert held("params") < 0.2
    assert held("ema") == held("params")
    assert held("opt_state") < 0.2
