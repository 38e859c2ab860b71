"""Known frames: which are drawn, what they change in the loss, and that they come out as given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion.on_codes import Masked, Metric
from opensora_jax.diffusion.on_embeddings import DDPM, RectifiedFlow
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.models.dit import DiTConfig
from opensora_jax.tasks import frames
from opensora_jax.tasks.dit import DiTTask, Latents

B, GRID, CHANNELS = 4, (4, 2, 2), 3
CONFIG = DiTConfig(
    depth=1,
    width=16,
    heads=1,
    channels=CHANNELS,
    out_channels=CHANNELS,
    patch=2,
    text_width=6,
    conditioning="frames",
)
TABLE = np.random.default_rng(1).normal(size=(16, CHANNELS)).astype(np.float32)
rng = np.random.default_rng(0)
BATCH = {
    "codes": rng.integers(16, size=(B, *GRID)).astype(np.int32),
    "text": rng.normal(size=(B, 3, 6)).astype(np.float32),
    "text_length": np.array([3, 1, 2, 3], np.int32),
}
TEXT = (BATCH["text"], BATCH["text_length"])


def make_task(objective, **changes):
    latents = Latents(TABLE)
    sizes = objective.sizes(latents)
    changes |= {"channels": sizes.n_in, "out_channels": sizes.n_out, "n_codes": sizes.n_codes}
    return DiTTask(dataclasses.replace(CONFIG, **changes), latents, objective)


def random_params(task):
    """A new DiT gives zeros."""
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def draw(n, t):
    return np.asarray(jax.jit(frames.draw, static_argnums=(1, 2))(jax.random.key(0), n, t))


def kinds_of(known_T):
    """Which kinds of masks this one is: a begin, an end, both, or every n-th frame, ..."""
    t, index = len(known_T), np.flatnonzero(known_T)
    first, last = np.argmin(known_T), np.argmin(known_T[::-1])
    middle = index[(index >= first) & (index < t - last)]
    found = {"none"} if not len(index) else set()
    found |= {"first"} if first == len(index) else set()
    found |= {"last"} if last == len(index) else set()
    found |= {"ends"} if first and last and not len(middle) else set()
    for n in range(2, t // 2 + 1):
        for place in range(n):
            nth = np.arange(t) % n == place
            if (known_T == (nth | (np.arange(t) < first))).all():
                found.add("every")
    return found - {"first", "last"} if "none" in found else found


def test_what_is_known_is_a_begin_an_end_both_or_every_nth():
    n, t = 4000, 8
    known = draw(n, t)
    found = [kinds_of(known_T) for known_T in known]
    assert all(found)
    assert not known.all(axis=1).any()
    shares = {kind: np.mean([kind in f for f in found]) for f in found for kind in f}
    assert set(shares) == {"none", "first", "last", "ends", "every"}
    assert frames.NONE_SHARE - 0.03 < shares.pop("none") < frames.NONE_SHARE + 0.05
    assert min(shares.values()) > 0.1
    lengths = {int(known_T.sum()) for known_T, f in zip(known, found, strict=True) if "first" in f}
    assert lengths == set(range(1, t))


@pytest.mark.parametrize(("t", "most"), [(1, 0), (2, 1)])
def test_of_few_frames_one_stays_unknown(t, most):
    known = draw(500, t)
    assert known.sum(axis=1).max() == most


@pytest.mark.parametrize(
    "objective", [RectifiedFlow(prediction="data"), DDPM(), DDPM("data"), Masked(), Metric()]
)
def test_noise_and_predictions_of_known_frames_do_not_count(objective):
    task = make_task(objective)
    params = random_params(task)
    level = jnp.full(B, 0.5)
    known = np.zeros((B, GRID[0]), bool)
    known[:, [0, 2]] = True
    loss = jax.jit(
        lambda codes, noise: task._loss(
            params, {**BATCH, "codes": codes}, level, noise, None, jnp.asarray(known)
        )
    )
    noise = np.asarray(task.noise(jax.random.key(0), (B, *GRID)))
    base = float(loss(BATCH["codes"], noise))
    other = np.where(known[:, :, None, None, None], 0.1, noise)
    assert float(loss(BATCH["codes"], other)) == base
    # But what is known is seen, and noise elsewhere counts.
    codes = BATCH["codes"].copy()
    codes[:, 2] = (codes[:, 2] + 1) % 16
    assert abs(float(loss(codes, noise)) - base) > 1e-4
    other = np.where(known[:, :, None, None, None], noise, 0.1)
    assert abs(float(loss(BATCH["codes"], other)) - base) > 1e-3


def test_the_loss_is_the_mean_over_what_is_not_known():
    """With a network that says zero the velocity's error is that of zero itself."""
    task = make_task(RectifiedFlow())
    params = jax.tree.map(np.zeros_like, random_params(task))
    known = np.array([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0]], bool)
    noise = rng.normal(size=(B, *GRID, CHANNELS)).astype(np.float32)
    loss = jax.jit(task._loss)(params, BATCH, jnp.full(B, 0.5), noise, None, known)
    error = (noise - TABLE[BATCH["codes"]]) ** 2
    expected = np.mean([e[~k].mean() for e, k in zip(error, known, strict=True)])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_evaluation_is_with_none_known():
    task = make_task(RectifiedFlow())
    params = random_params(task)
    parts = jax.jit(task.eval_step)(params, BATCH, jax.random.key(0))
    # Weights of what is known can be anything.
    kernel = params["patch_embedding"]["kernel"].reshape(4, 2 * CHANNELS + 1, -1).copy()
    kernel[:, CHANNELS:] = 9.0
    other = params | {
        "patch_embedding": params["patch_embedding"] | {"kernel": kernel.reshape(-1, 16)}
    }
    same = jax.jit(task.eval_step)(other, BATCH, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, same, parts)


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        (RectifiedFlow(prediction="data"), "dpm++"),
        (DDPM(), "ancestral"),
        (Masked(), "confidence"),
        (Metric(), "jumps"),
    ],
)
def test_known_frames_come_out_as_given_and_change_the_others(objective, sampler):
    task = make_task(objective)
    params = random_params(task)
    noise = task.noise(jax.random.key(4), (B, *GRID))
    keys = jax.random.split(jax.random.key(5), B)
    known = np.zeros((B, GRID[0]), bool)
    known[:, 1] = True
    sample = jax.jit(task.sample, static_argnames="sampling")

    def drawn(codes, known):
        how = Sampling(8, 2.0, sampler=sampler, guidance_rescale=0.3)
        given = None if codes is None else (codes, known)
        return np.asarray(sample(params, *TEXT, noise, keys, given, sampling=how))

    one, two = drawn(BATCH["codes"], known), drawn((BATCH["codes"] + 5) % 16, known)
    np.testing.assert_array_equal(one[:, 1], BATCH["codes"][:, 1])
    assert (one[:, [0, 2, 3]] != two[:, [0, 2, 3]]).any()
    assert len(np.unique(one)) > 2
    # Codes that are not said to be known are not looked at.
    other = np.where(known[:, :, None, None], BATCH["codes"], 3)
    np.testing.assert_array_equal(drawn(other, known), one)
    np.testing.assert_array_equal(drawn(other, ~known & known), drawn(None, None))


def test_text_alone_trains_and_samples_as_it_did():
    """Golden numbers, of the version before frames could be known."""
    task = make_task(RectifiedFlow(), conditioning="text")
    params = random_params(task)
    loss, _ = jax.jit(task.loss)(params, {}, BATCH, jax.random.key(3), 0)
    noise = jax.random.normal(jax.random.key(4), (B, *GRID, CHANNELS))
    codes = jax.jit(task.sample, static_argnames="sampling")(
        params, *TEXT, noise, sampling=Sampling(4, 2.0)
    )
    np.testing.assert_allclose(loss, 4.3329124, rtol=1e-5)
    expected = [15, 11, 6, 6, 4, 1, 6, 15, 11, 15, 14, 1, 5, 5, 0, 15]
    np.testing.assert_array_equal(codes[0].ravel(), expected)
