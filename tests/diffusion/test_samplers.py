"""Integration of a known flow, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import samplers

MEAN, STD = np.array([2.0, -1.0, 0.0], np.float32), np.array([0.5, 1.0, 0.1], np.float32)


def gaussian_velocity(x, t_B):
    """E[noise - x_0 | x_t] for x_0 ~ N(MEAN, STD^2): linear in x_t, by conditioning Gaussians.

    x_t = (1 - t) x_0 + t noise has mean (1 - t) MEAN and variance (1 - t)^2 STD^2 + t^2; its
    covariance with noise - x_0 is t - (1 - t) STD^2.
    """
    t = t_B[:, None]
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def sample(steps, n=4096):
    noise = jax.random.normal(jax.random.key(0), (n, 3))
    times = jnp.linspace(1.0, 0.0, steps + 1)
    return noise, jax.jit(samplers.euler, static_argnums=0)(gaussian_velocity, noise, times)


def test_euler_carries_noise_to_the_data_s_distribution():
    _, x = sample(200)
    np.testing.assert_allclose(x.mean(0), MEAN, atol=0.05)
    np.testing.assert_allclose(x.std(0), STD, rtol=0.05)


def test_euler_converges_at_first_order():
    # The exact flow map of this Gaussian is x_0 = MEAN + STD noise.
    errors = []
    for steps in (50, 100, 200):
        noise, x = sample(steps, n=64)
        errors.append(float(jnp.abs(x - (MEAN + STD * noise)).max()))
    assert errors[0] > 1.8 * errors[1] > 1.8 * 1.8 * errors[2]
    assert errors[2] < 0.05


def test_steps_are_taken_at_the_times_given():
    noise = jnp.arange(6.0).reshape(2, 3)

    def velocity(x, t_B):
        return x - t_B[:, None]

    x = np.asarray(noise)
    for now, after in ((1.0, 0.7), (0.7, 0.0)):
        x = x + (after - now) * (x - now)
    times = jnp.array([1.0, 0.7, 0.0])
    np.testing.assert_allclose(samplers.euler(velocity, noise, times), x, atol=1e-6)


def test_guidance_goes_past_the_conditional():
    def conditional(x, t_B):
        return 3 * x

    def unconditional(x, t_B):
        return x + t_B[:, None]

    x, t = jnp.array([[1.0, 2.0]]), jnp.array([0.5])
    for scale in (0.0, 1.5, 4.0):
        guided = samplers.classifier_free_guidance(conditional, unconditional, scale)
        expected = (x + 0.5) + scale * (3 * x - (x + 0.5))
        np.testing.assert_allclose(guided(x, t), expected, rtol=1e-6)


def test_learned_variances_are_not_guided():
    def conditional(x, t_B):
        return jnp.concatenate([3 * x, 5 * x], axis=-1)

    def unconditional(x, t_B):
        return jnp.concatenate([x, 7 * x], axis=-1)

    x = jnp.array([[1.0, 2.0]])
    guided = samplers.classifier_free_guidance(conditional, unconditional, 4.0)
    np.testing.assert_allclose(guided(x, jnp.ones(1)), [[9, 18, 5, 10]])


def test_scale_one_does_not_call_the_unconditional():
    def never(x, t_B):
        pytest.fail("called")

    guided = samplers.classifier_free_guidance(lambda x, t: 2 * x, never, 1.0)
    assert guided(jnp.ones(3), jnp.ones(3)).tolist() == [2, 2, 2]
