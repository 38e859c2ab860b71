"""Both tasks train to the same losses on one device as on eight, with their state divided."""

import math
from functools import partial

import grain
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from opensora_jax import mesh as mesh_lib
from opensora_jax.models.dit import DiT
from opensora_jax.models.vqvae import VQVAE
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.tasks.vqvae import VQVAETask
from opensora_jax.train import loop, optim, writer
from opensora_jax.train import state as state_lib
from opensora_jax.train.state import TrainState

STEPS, BATCH = 3, 8
ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
OTHER_AXES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}]


class Examples:
    def __init__(self, **arrays):
        self._arrays = arrays

    def __repr__(self):
        return f"Examples({', '.join(self._arrays)})"

    def __len__(self):
        return 2 * BATCH

    def __getitem__(self, i):
        return {name: array[i] for name, array in self._arrays.items()}


def dit_task(width=32):
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(16, 4)).astype(np.float32)
    task = DiTTask(
        partial_model(
            DiT, depth=2, width=width, heads=2, channels=4, out_channels=4, patch=2, text_width=6
        ),
        Latents(codebook, np.ones(16)),
        caption_dropout=0.3,
        time_shift=1.0,
        prediction="velocity",
    )
    n = 2 * BATCH
    return task, Examples(
        codes=rng.integers(16, size=(n, 2, 4, 4)).astype(np.int32),
        text=rng.normal(size=(n, 5, 6)).astype(np.float32),
        text_length=rng.integers(1, 6, size=n).astype(np.int32),
    )


def vqvae_task(width=8):
    make = partial_model(
        VQVAE,
        n_codes=16,
        embedding_dim=4,
        n_hiddens=width,
        n_res_layers=0,
        downsample=(1, 2, 2),
        normalize_latents=True,
        n_frames=2,
    )
    # Smooth videos, so that training has something to learn in three steps.
    video = np.random.default_rng(0).integers(256, size=(2 * BATCH, 2, 1, 1, 3))
    return VQVAETask(make, (1, 2)), Examples(
        video=np.broadcast_to(video, (2 * BATCH, 2, 8, 8, 3)).astype(np.uint8)
    )


def partial_model(kind, **arguments):
    make = partial(kind, **arguments)
    return lambda rngs: make(rngs=rngs)


def make_mesh(**sizes):
    """Over as many devices as the sizes say, unlike `mesh.make_mesh`, which takes all."""
    shape = [sizes.get(axis, 1) for axis in mesh_lib.AXES]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(
        shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices
    )


def make_optimizer(name):
    schedule = optim.schedule(1e-2, 1, STEPS)
    tx = optim.make(name, schedule, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0)
    return tx, schedule


def train(folder, make_task, optimizer, mesh):
    task, examples = make_task()
    data = grain.MapDataset.source(examples).repeat().batch(BATCH).to_iter_dataset()
    state = loop.fit(
        task,
        *make_optimizer(optimizer),
        iter(data),
        mesh=mesh,
        folder=folder,
        settings=loop.Settings(
            steps=STEPS,
            seed=0,
            ema_decay=0.9,
            accumulate=1,
            log_every=1,
            checkpoint_every=STEPS,
            tokens_per_step=1,
        ),
    )
    return state, writer.read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    ("make_task", "optimizer", "meshes"),
    [
        (dit_task, "adamw", [ALL_AXES]),
        pytest.param(dit_task, "muon", OTHER_AXES, marks=pytest.mark.slow),
        pytest.param(vqvae_task, "adamw", [ALL_AXES, *OTHER_AXES], marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_the_mesh(make_task, optimizer, meshes, tmp_path):
    _, one = train(tmp_path / "one", make_task, optimizer, make_mesh())
    assert len({line["loss"] for line in one}) == STEPS
    for sizes in meshes:
        mesh = make_mesh(**sizes)
        folder = tmp_path / "-".join(sizes)
        state, lines = train(folder, make_task, optimizer, mesh)
        for a, b in zip(one, lines, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
        parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
        largest = max(jax.tree.leaves(state.params), key=lambda x: x.size)
        assert largest.addressable_shards[0].data.size == largest.size / parts


@pytest.mark.parametrize("make_task", [dit_task, vqvae_task])
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_a_device_holds_its_part_of_the_state(make_task, optimizer):
    task, _ = make_task(width=128)
    mesh = make_mesh(fsdp=4, tensor=2)
    tx, _ = make_optimizer(optimizer)
    params, extra = jax.eval_shape(task.init, jax.random.key(0))
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), np.int32),
        params=params,
        ema=params,
        opt_state=jax.eval_shape(tx.init, params),
        extra=extra,
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
