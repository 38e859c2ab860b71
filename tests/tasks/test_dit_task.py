"""The DiT's task with DDPM: its loss by hand, and what samples depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion.objectives import DDPM
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.models.dit import DiTConfig
from opensora_jax.models.fsq import FSQ
from opensora_jax.tasks.dit import DiTTask, Latents

CHANNELS, GRID, B = 4, (1, 2, 2), 4
rng = np.random.default_rng(0)
BATCH = {
    "codes": rng.integers(16, size=(B, *GRID)).astype(np.int32),
    "text": rng.normal(size=(B, 3, 6)).astype(np.float32),
    "text_length": np.array([3, 1, 2, 3], np.int32),
}


@pytest.fixture(scope="module")
def task():
    config = DiTConfig(
        depth=1,
        width=16,
        heads=1,
        channels=CHANNELS,
        out_channels=2 * CHANNELS,
        patch=2,
        text_width=6,
        text_mode="in_context",
    )
    table = np.random.default_rng(1).normal(size=(16, CHANNELS)).astype(np.float32)
    return DiTTask(config, Latents(table), DDPM(), caption_dropout=0.5)


@pytest.fixture(scope="module")
def params(task):
    """Random ones: a new DiT gives zeros."""
    shapes, _ = jax.eval_shape(task.init, jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def test_the_loss_is_error_and_bound_of_what_the_model_gives(task, params):
    key = jax.random.key(3)
    level_key, noise_key, drop_key = jax.random.split(key, 3)
    t = np.asarray(jax.random.randint(level_key, (B,), 0, 1000))
    noise = np.asarray(jax.random.normal(noise_key, (B, *GRID, CHANNELS)))
    drop = np.asarray(jax.random.uniform(drop_key, (B,))) < 0.5
    assert 0 < drop.sum() < B
    assert t.min() > 0  # the bound of the first step is another one
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    beta, now, before = (
        a[:, None, None, None, None] for a in (beta[t], alpha_bar[t], alpha_bar[t - 1])
    )
    x_0 = task.latents.table[BATCH["codes"]]
    x_t = np.sqrt(now) * x_0 + np.sqrt(1 - now) * noise

    @jax.jit
    def both(params, x_t, time):
        model = task.model(params)
        output = model(x_t, time, BATCH["text"], BATCH["text_length"], drop)
        return task.loss(params, {}, BATCH, key, 0)[0], output

    loss, output = both(params, x_t.astype(np.float32), t.astype(np.float32))
    epsilon, v = np.split(np.asarray(output, np.float64), 2, axis=-1)
    assert np.std(epsilon) > 0.1
    # Nichol & Dhariwal, equations 15 and 4, and the divergence of two normal distributions.
    posterior = beta * (1 - before) / (1 - now)
    variance = np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(posterior))
    mean_distance = beta / np.sqrt((1 - beta) * (1 - now)) * (epsilon - noise)
    divergence = 0.5 * (
        np.log(variance / posterior) - 1 + posterior / variance + mean_distance**2 / variance
    )
    expected = np.mean((epsilon - noise) ** 2) + np.mean(divergence) / np.log(2)
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_evaluation_is_the_same_in_microbatches_and_takes_less_memory(task, params):
    rng = np.random.default_rng(7)
    b = 32
    batch = {
        "codes": rng.integers(16, size=(b, 2, 16, 16)).astype(np.int32),
        "text": rng.normal(size=(b, 3, 6)).astype(np.float32),
        "text_length": rng.integers(1, 4, b).astype(np.int32),
    }
    step = jax.jit(task.eval_step, static_argnames="accumulate")
    compiled = [
        step.lower(params, batch, jax.random.key(0), accumulate=n).compile() for n in (1, 8)
    ]
    whole, parts = (run(params, batch, jax.random.key(0)) for run in compiled)
    assert whole.keys() == parts.keys()
    assert len(set(map(float, whole.values()))) == len(whole)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5)
    memory = [run.memory_analysis().temp_size_in_bytes for run in compiled]
    assert memory[1] < memory[0] / 4


def test_ancestral_samples_depend_on_their_own_keys(task, params):
    noise = jax.random.normal(jax.random.key(4), (B, *GRID, CHANNELS))
    keys = jax.random.split(jax.random.key(5), B)
    sample = jax.jit(task.sample, static_argnames="sampling")

    def draw(order, keys):
        given = (jnp.asarray(a)[order] for a in (BATCH["text"], BATCH["text_length"], noise))
        return np.asarray(
            sample(params, *given, keys, sampling=Sampling(20, 2.0, sampler="ancestral"))
        )

    same = np.arange(B)
    codes = draw(same, keys)
    assert codes.shape == (B, *GRID)
    np.testing.assert_array_equal(draw(same[::-1], keys[::-1]), codes[::-1])
    other = draw(same, jax.random.split(jax.random.key(6), B).at[0].set(keys[0]))
    np.testing.assert_array_equal(other[0], codes[0])
    assert (other[1:] != codes[1:]).any()


def test_without_guidance_the_null_text_is_not_seen(task, params):
    noise = jax.random.normal(jax.random.key(4), (B, *GRID, CHANNELS))
    given = (BATCH["text"], BATCH["text_length"], noise)
    sample = jax.jit(task.sample, static_argnames="sampling")
    broken = params | {"null_text": np.full_like(params["null_text"], np.nan)}
    codes = [sample(p, *given, sampling=Sampling(4, 1.0)) for p in (params, broken)]
    np.testing.assert_array_equal(*codes)
    assert len(np.unique(codes[0])) > 2


@pytest.mark.parametrize("components", [3, 2])
def test_codes_of_a_grid_are_found_by_rounding(components):
    """As nearest neighbours are, where no dimension was dropped; else every code finds itself."""
    levels = (5, 4, 3)
    grid = np.asarray(FSQ(levels).codebook())
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 100, len(grid))
    whole = Latents.normalized(grid, counts, levels)
    x = whole.table + 0.4 * rng.standard_normal(whole.table.shape).astype(np.float32)
    by_search = Latents(whole.table).to_codes(jnp.asarray(x))
    np.testing.assert_array_equal(whole.to_codes(jnp.asarray(x)), by_search)
    turned = whole.principal(counts, components)
    codes = np.asarray(turned.to_codes(jnp.asarray(turned.table)))
    assert turned.levels == levels
    if components == 3:
        np.testing.assert_array_equal(codes, np.arange(len(grid)))
    else:
        assert codes.shape == (len(grid),)
        assert codes.max() < len(grid)


def test_what_the_data_never_shows_is_not_blown_up():
    """A bit of a grid that all of the data has alike: codes of noise have the other."""
    levels = (4, 2)
    grid = np.asarray(FSQ(levels).codebook())
    counts = np.array([5, 3, 2, 4, 0, 0, 0, 0])
    table = Latents.normalized(grid, counts, levels).table
    np.testing.assert_allclose(np.ptp(table[:, 1]), 4, rtol=1e-5)
    share = counts / counts.sum()
    np.testing.assert_allclose(share @ table, 0, atol=1e-6)
    np.testing.assert_allclose(share @ table[:, 0] ** 2, 1, rtol=1e-5)
