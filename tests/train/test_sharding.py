"""Both tasks train to the same losses on one device as on eight, with their state divided."""

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

STEPS, BATCH = 3, 8
ALL_AXES = {"data": 2, "fsdp": 2, "tensor": 2}
SINGLE_AXES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}]


class Examples:
    def __init__(self, **arrays):
        self._arrays = arrays

    def __repr__(self):
        return f"Examples({', '.join(self._arrays)})"

    def __len__(self):
        return 2 * BATCH

    def __getitem__(self, i):
        return {name: array[i] for name, array in self._arrays.items()}


def dit_task():
    rng = np.random.default_rng(0)
    codebook = rng.normal(size=(16, 4)).astype(np.float32)
    task = DiTTask(
        partial_model(
            DiT, depth=2, width=32, heads=2, channels=4, out_channels=4, patch=2, text_width=6
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


def vqvae_task():
    make = partial_model(
        VQVAE,
        n_codes=16,
        embedding_dim=4,
        n_hiddens=8,
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


def train(folder, make_task, optimizer, mesh):
    task, examples = make_task()
    schedule = optim.schedule(1e-2, 1, STEPS)
    tx = optim.make(optimizer, schedule, b1=0.9, b2=0.99, weight_decay=0.0, clip_norm=1.0)
    data = grain.MapDataset.source(examples).repeat().batch(BATCH).to_iter_dataset()
    state = loop.fit(
        task,
        tx,
        schedule,
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


def share(array):
    """Share of an array that lies on one device."""
    return array.addressable_shards[0].data.size / array.size


@pytest.mark.parametrize(
    ("make_task", "optimizer", "meshes"),
    [
        (dit_task, "muon", [ALL_AXES]),
        (vqvae_task, "adamw", [ALL_AXES]),
        pytest.param(dit_task, "adamw", SINGLE_AXES, marks=pytest.mark.slow),
        pytest.param(vqvae_task, "adamw", SINGLE_AXES, marks=pytest.mark.slow),
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
        assert share(largest) == 1 / parts
        # Moments and averages lie where their parameter does.
        moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == largest.shape]
        averages = [x for x in jax.tree.leaves(state.ema) if x.shape == largest.shape]
        assert len(moments) >= len(averages) > 0
        assert {share(x) for x in (*moments, *averages)} == {1 / parts}
        # All in all a device holds little more than its part.
        held = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params))
        assert held <= 2 / parts * sum(x.size for x in jax.tree.leaves(state.params))
