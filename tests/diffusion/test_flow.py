"""Rectified flow: paths, targets and times."""

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import flow


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_paths_are_straight_from_data_to_noise():
    x, noise = normal(0, 4, 2, 3), normal(1, 4, 2, 3)
    t = np.array([0.0, 0.25, 0.5, 1.0], np.float32)
    x_t = np.asarray(flow.interpolate(jnp.asarray(x), jnp.asarray(noise), jnp.asarray(t)))
    np.testing.assert_array_equal(x_t[0], x[0])
    np.testing.assert_allclose(x_t[1], 0.75 * x[1] + 0.25 * noise[1], rtol=1e-6)
    np.testing.assert_array_equal(x_t[3], noise[3])


def test_loss_is_the_error_of_the_velocity():
    x, noise = jnp.asarray(normal(0, 3, 2, 5)), jnp.asarray(normal(1, 3, 2, 5))
    t = jnp.array([0.1, 0.5, 0.9])

    def exact(x_t, t_B):
        # On a straight path, x_t and x_0 give the velocity.
        return (x_t - x) / t_B[:, None, None]

    np.testing.assert_allclose(flow.loss(exact, x, noise, t), 0.0, atol=1e-10)
    seen = []

    def constant(x_t, t_B):
        seen.append((x_t, t_B))
        return jnp.ones_like(x_t)

    losses = flow.loss(constant, x, noise, t)
    expected = ((1 - (np.asarray(noise) - np.asarray(x))) ** 2).mean((1, 2))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(seen[0][0], flow.interpolate(x, noise, t))
    np.testing.assert_array_equal(seen[0][1], t)


def test_times_are_logit_normal():
    t = np.asarray(flow.sample_times(jax.random.key(0), 20_000))
    assert t.shape == (20_000,)
    assert 0 < t.min() < 0.05
    assert 0.95 < t.max() < 1
    logit = np.log(t / (1 - t))
    np.testing.assert_allclose([logit.mean(), logit.std()], [0, 1], atol=0.03)


def test_shifted_times_have_the_noise_of_a_larger_grid():
    t = np.linspace(0, 1, 11)
    s = 3.0
    shifted = np.asarray(flow.shift_times(jnp.asarray(t), s))
    np.testing.assert_allclose(shifted[[0, -1]], [0, 1], atol=1e-6)
    # Noise over signal grows by the factor of the shift.
    inner, shifted = t[1:-1], shifted[1:-1]
    np.testing.assert_allclose(shifted / (1 - shifted), s * inner / (1 - inner), rtol=1e-4)
    np.testing.assert_allclose(flow.shift_times(jnp.asarray(t), 1.0), t, rtol=1e-6)
    key = jax.random.key(0)
    np.testing.assert_allclose(
        flow.sample_times(key, 9, s), flow.shift_times(flow.sample_times(key, 9), s), rtol=1e-6
    )


def test_velocity_from_a_prediction_of_the_data():
    x, noise = jnp.asarray(normal(0, 3, 2, 5)), jnp.asarray(normal(1, 3, 2, 5))
    t = jnp.array([0.1, 0.5, 1.0])
    x_t = flow.interpolate(x, noise, t)
    np.testing.assert_allclose(flow.to_velocity(x, x_t, t, "data"), noise - x, atol=1e-5)
    np.testing.assert_array_equal(flow.to_velocity(noise - x, x_t, t, "velocity"), noise - x)
    # At t = 0, where data tells nothing of the noise, it stays finite.
    assert np.isfinite(flow.to_velocity(x + 1, x, jnp.zeros(3), "data")).all()
