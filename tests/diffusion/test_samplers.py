"""Integration of a known flow, and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import flow, samplers
from opensora_jax.diffusion.sampling import Sampling

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


# A mixture of two Gaussians in the plane, which no single straight flow gives.
CENTERS = np.array([[2.0, 1.0], [-1.0, -1.5]], np.float32)
WEIGHTS, SPREAD = np.array([0.3, 0.7], np.float32), 0.4


def mixture_data(x, t):
    """E[x_0 | x_t] of the mixture, t a scalar: that of each Gaussian, by its probability."""
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    away = x[:, None] - (1 - t) * CENTERS
    share = jax.nn.softmax(-(away**2).sum(-1) / (2 * variance) + jnp.log(WEIGHTS), axis=-1)
    each = CENTERS + (1 - t) * SPREAD**2 / variance * away
    return (share[..., None] * each).sum(1)


def mixture_velocity(x, t_B):
    return (x - mixture_data(x, t_B[0])) / t_B[0]


def mixture_samples(sampler, steps, n=20_000):
    noise = jax.random.normal(jax.random.key(1), (n, 2))
    times = flow.shift_times(jnp.linspace(1.0, 0.0, steps + 1), 1.5)
    if sampler == "dpm++":

        def to_data(x, i):
            return mixture_data(x, times[i])

        return jax.jit(lambda z: samplers.dpm_solver(to_data, z, 1 - times, times))(noise)
    method = {"euler": samplers.euler, "heun": samplers.heun}[sampler]
    return jax.jit(lambda z: method(mixture_velocity, z, times))(noise)


@pytest.mark.parametrize(("sampler", "steps"), [("euler", 300), ("heun", 30), ("dpm++", 40)])
def test_samples_have_the_mixture_s_mean_and_covariance(sampler, steps):
    x = np.asarray(mixture_samples(sampler, steps))
    mean = WEIGHTS @ CENTERS
    away = CENTERS - mean
    covariance = SPREAD**2 * np.eye(2) + (WEIGHTS[:, None] * away).T @ away
    np.testing.assert_allclose(x.mean(0), mean, atol=0.05)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.1)
    assert (x @ [1, 1] > 0.5).mean() == pytest.approx(WEIGHTS[0], abs=0.02)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_the_error_falls_with_the_steps_at_the_order_of_the_method(sampler, order):
    with jax.enable_x64(True):
        exact = mixture_samples("heun", 4000, n=200)
        steps = (200, 400, 800)
        errors = [float(abs(mixture_samples(sampler, k, n=200) - exact).mean()) for k in steps]
    rates = np.log2(np.divide(errors[:-1], errors[1:]))
    assert (rates > order - 0.3).all(), (errors, rates)
    assert (rates < order + 0.8).all(), (errors, rates)


def test_with_one_step_all_say_what_the_network_says_of_noise():
    expected = np.asarray(mixture_data(jax.random.normal(jax.random.key(1), (5, 2)), 1.0))
    for sampler in ("euler", "heun", "dpm++"):
        np.testing.assert_allclose(mixture_samples(sampler, 1, n=5), expected, atol=1e-5)


def both_of(conditional, unconditional):
    return lambda x, t: (conditional(x, t), unconditional(x, t))


def guide(conditional, unconditional, n_guided=None, **fields):
    both = both_of(conditional, unconditional)
    return samplers.guide(conditional, both, Sampling(**fields), n_guided)


def test_guidance_goes_past_the_conditional():
    def conditional(x, t_B):
        return 3 * x

    def unconditional(x, t_B):
        return x + t_B[:, None]

    x, t = jnp.array([[1.0, 2.0]]), jnp.array([0.5])
    for scale in (0.0, 1.5, 4.0):
        guided = guide(conditional, unconditional, guidance=scale)
        expected = (x + 0.5) + scale * (3 * x - (x + 0.5))
        np.testing.assert_allclose(guided(x, t), expected, rtol=1e-6)


def test_learned_variances_are_not_guided():
    def conditional(x, t_B):
        return jnp.concatenate([3 * x, 5 * x], axis=-1)

    def unconditional(x, t_B):
        return jnp.concatenate([x, 7 * x], axis=-1)

    x = jnp.array([[1.0, 2.0]])
    guided = guide(conditional, unconditional, n_guided=2, guidance=4.0)
    np.testing.assert_allclose(guided(x, jnp.ones(1)), [[9, 18, 5, 10]])


def test_scale_one_does_not_call_the_unconditional():
    def never(x, t_B):
        pytest.fail("called")

    guided = guide(lambda x, t: 2 * x, never, guidance=1.0)
    assert guided(jnp.ones(3), jnp.ones(3)).tolist() == [2, 2, 2]


def test_guidance_is_between_its_levels():
    guided = guide(
        *(lambda x, t: 3 * x, lambda x, t: x), guidance=2.0, guidance_from=0.2, guidance_to=0.6
    )
    x = jnp.ones((2, 3))
    for level, expected in ((0.1, 3), (0.2, 5), (0.4, 5), (0.6, 5), (0.7, 3)):
        time_B = jnp.full(2, level * samplers.TIME_SCALE)
        np.testing.assert_allclose(guided(x, time_B), np.full((2, 3), expected))


def test_rescaled_guidance_has_the_conditional_s_deviation():
    def conditional(x, t_B):
        return 3 * x

    def unconditional(x, t_B):
        return x[..., ::-1]

    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    plain, half, whole = (
        guide(conditional, unconditional, guidance=6.0, guidance_rescale=share)(x, jnp.ones(2))
        for share in (0.0, 0.5, 1.0)
    )
    deviation = conditional(x, None).std((1, 2))
    assert (plain.std((1, 2)) > 2 * deviation).all()
    np.testing.assert_allclose(whole.std((1, 2)), deviation, rtol=1e-5)
    np.testing.assert_allclose(half, (plain + whole) / 2, rtol=1e-4)


def test_levels_that_nothing_is_between_are_told():
    with pytest.raises(ValueError, match=r"guidance_to=0\.2: expected at least guidance_from=0\.8"):
        Sampling(guidance_from=0.8, guidance_to=0.2)
