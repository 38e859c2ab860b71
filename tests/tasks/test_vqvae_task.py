"""What a tokenizer is trained on beside the distance of pixels."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opensora_jax.models import discriminator
from opensora_jax.models.cosmos import CosmosConfig
from opensora_jax.models.vqvae import VQVAEConfig
from opensora_jax.tasks.vqvae import Adversarial, VQVAETask, describe, from_description
from opensora_jax.train import state as states
from opensora_jax.train.settings import StepSettings
from opensora_jax.train.step import train_step

VIDEOGPT = VQVAEConfig(
    n_codes=16, embedding_dim=4, n_hiddens=8, n_res_layers=1, downsample=(2, 2, 2), n_frames=4
)
COSMOS = CosmosConfig(
    downsample=(2, 2, 2), levels=(5, 5), channels=8, multipliers=(1, 1), n_res_blocks=1, patch=2
)
BATCH = {"video": np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), np.uint8)}


def batch_of(config):
    return {"video": BATCH["video"][:, : 4 if config is VIDEOGPT else 5]}


def trained(task, n_steps=2, start_from=None):
    """The states before and after so many steps, and what was logged."""
    tx = optax.sgd(1e-2)  # Adam makes steps of rounding
    before = start_from or states.new(task, tx, jax.random.key(0))
    settings = StepSettings(seed=0, ema_decay=0.9, accumulate=1)
    step = jax.jit(lambda s, b: train_step(task, tx, optax.constant_schedule(1.0), settings, s, b))
    after, logged = before, []
    for _ in range(n_steps):
        after, metrics = step(after, batch_of(task.config))
        logged.append(jax.tree.map(float, metrics))
    return before, after, logged


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.mark.parametrize("config", [VIDEOGPT, COSMOS], ids=["videogpt", "cosmos"])
def test_an_adversary_changes_nothing_before_its_time_and_both_sides_after(config):
    alone = trained(VQVAETask(config), 3)[1]
    task = VQVAETask(config, adversarial=Adversarial(4, weight=0.1, start=3))
    before, early, logged = trained(task, 3)
    assert early.params["discriminator"].keys() == {"convs", "out"}
    rest = {k: v for k, v in early.params.items() if k != "discriminator"}
    for (path, x), (_, y) in zip(
        jax.tree.leaves_with_path(rest), jax.tree.leaves_with_path(alone.params), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=str(path))
    assert same(early.params["discriminator"], before.params["discriminator"])
    assert [x["discriminator_loss"] for x in logged] == [0, 0, 0]
    _, late, (first, *_) = trained(task, 2, start_from=early)
    # Of a new adversary, which knows nothing, about 2: a hinge of 1 for each kind.
    assert first["discriminator_loss"] == pytest.approx(2, abs=0.5)
    assert not same(late.params["discriminator"], early.params["discriminator"])
    assert float(late.extra["logits"]["real"]) != 0


def test_gradients_of_the_contest_go_to_one_side_each():
    task = VQVAETask(VIDEOGPT, adversarial=Adversarial(4, weight=0.1))
    averages = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
    params, _ = task.init(jax.random.key(0))
    real, recon = jax.random.uniform(jax.random.key(1), (2, 1, 4, 16, 16, 3)) - 0.5

    def added(adversary, recon, weight):
        contest = VQVAETask(VIDEOGPT, adversarial=Adversarial(4, weight=weight))._contest
        return contest(adversary, averages, real, recon)[0]

    grad = jax.grad(added, argnums=(0, 1))
    adversary, video = grad(params["discriminator"], recon, 0.0)
    assert not np.any(video)  # the adversary's own loss pulls at no video
    other, video = grad(params["discriminator"], recon, 5.0)
    assert same(adversary, other)  # what the tokenizer wants does not move the adversary
    assert np.any(video)


def test_the_hinge_loss_and_its_regularization_by_hand():
    real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 0.0])
    averages = {"real": jnp.array(1.0), "fake": jnp.array(-1.0)}
    # Hinge: (0 + 0.5) / 2 + (0 + 1) / 2; apart: (9 + 2.25) / 2 + (16 + 1) / 2.
    expected = 0.25 + 0.5 + 0.01 * (5.625 + 8.5)
    assert discriminator.loss(real, fake, averages, 0.01) == pytest.approx(expected)


def test_an_adversary_learns_to_tell_real_from_blurred():
    task = VQVAETask(VIDEOGPT, adversarial=Adversarial(4))
    params, _ = task.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    real = rng.uniform(-0.5, 0.5, (8, 4, 16, 16, 3)).astype(np.float32)
    fake = np.broadcast_to(real.mean(axis=(2, 3), keepdims=True), real.shape)
    averages = {"real": jnp.zeros(()), "fake": jnp.zeros(())}
    tx = optax.adam(3e-3)

    @jax.jit
    def step(adversary, moments):
        def tells(adversary):
            return task._contest(adversary, averages, real, jnp.asarray(fake))[0]

        loss, grads = jax.value_and_grad(tells)(adversary)
        updates, moments = tx.update(grads, moments)
        return optax.apply_updates(adversary, updates), moments, loss

    adversary, moments = params["discriminator"], tx.init(params["discriminator"])
    losses = []
    for _ in range(40):
        adversary, moments, loss = step(adversary, moments)
        losses.append(float(loss))
    assert losses[0] > 1.5
    assert losses[-1] < 0.2


@pytest.mark.parametrize("config", [VIDEOGPT, COSMOS], ids=["videogpt", "cosmos"])
def test_the_decoder_alone_learns_and_codes_stay(config):
    plain = VQVAETask(config)
    params, extra = plain.init(jax.random.key(5))
    begun = plain.model(params, extra)
    task = VQVAETask(config, trains_encoder=False, start_from=begun)
    before, after, logged = trained(task, 4)
    assert same(before.params, params)
    assert same(after.extra, extra)
    video = task_video(config)
    codes = [plain.model(s.params, s.extra).encode(video) for s in (before, after)]
    np.testing.assert_array_equal(*codes)
    moved = {
        jax.tree_util.keystr(path[:1])
        for path, x in jax.tree.leaves_with_path(after.params)
        if not np.array_equal(x, leaf_at(before.params, path))
    }
    assert moved <= (
        {"['post_quant']", "['decoder']"}
        if config is COSMOS
        else {name for name in map("['{}']".format, params) if "decoder" in name or "post" in name}
    )
    assert moved
    assert logged[-1]["recon_loss"] < logged[0]["recon_loss"]


def task_video(config):
    return batch_of(config)["video"].astype(np.float32) / 255 - 0.5


def leaf_at(tree, path):
    for key in path:
        tree = tree[getattr(key, "key", getattr(key, "idx", None))]
    return tree


def test_a_perceptual_distance_is_of_one_frame_and_weighed():
    seen = []

    def distance(a, b):
        seen.append(a.shape)
        return jnp.mean(abs(a - b))

    plain, added = (
        VQVAETask(VIDEOGPT, perceptual=p, quantize_between=(-1, 0)) for p in (None, (distance, 3.0))
    )
    params, extra = plain.init(jax.random.key(0))
    totals = [
        task.loss(params, extra, batch_of(VIDEOGPT), jax.random.key(1), jnp.array(0))
        for task in (plain, added)
    ]
    assert seen == [(2, 16, 16, 3)]
    perceptual = totals[1][1][1]["perceptual_loss"]
    assert float(totals[1][0] - totals[0][0]) == pytest.approx(3 * float(perceptual), rel=1e-4)


def test_what_a_folder_says_of_its_adversary_is_read_back():
    described = describe(VIDEOGPT, Adversarial(4, weight=0.1))
    assert described["discriminator"] == 4
    params, _ = from_description(described).init(jax.random.key(0))
    assert params.keys() > {"discriminator"}
    assert "discriminator" not in describe(VIDEOGPT)
