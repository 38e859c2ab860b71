"""The two objectives behind one interface: levels, losses, ways of sampling."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import ddpm, flow, objectives
from opensora_jax.diffusion.objectives import DDPM, RectifiedFlow
from opensora_jax.diffusion.sampling import Sampling


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_ddpm_trains_on_error_and_bound_at_a_thousandth_of_a_level():
    x_0, noise, output = normal(0, 5, 2, 3), normal(1, 5, 2, 3), normal(2, 5, 2, 6)
    seen = []

    def network(x, time_B):
        seen.append(time_B)
        return output

    loss = DDPM().error(network, x_0, noise, jnp.array([0.1, 0.3, 0.5, 0.7, 0.9]))
    assert seen[0].tolist() == [100, 300, 500, 700, 900]
    steps = jnp.array([100, 300, 500, 700, 900])
    both = ddpm.loss(ddpm.linear_schedule(), lambda *_: output, x_0, noise, steps)
    np.testing.assert_allclose(loss, sum(both), rtol=1e-6)


def test_ddpm_by_predicted_data_trains_on_the_error_of_the_velocity():
    x_0, noise, output = normal(0, 5, 2, 3), normal(1, 5, 2, 3), normal(2, 5, 2, 6)
    levels = jnp.array([0.1, 0.3, 0.5, 0.7, 0.999])
    loss = DDPM(prediction="data").error(lambda *_: output, x_0, noise, levels)
    schedule = ddpm.linear_schedule()
    step_B = jnp.round(1000 * levels).astype(int)
    signal, sigma = (a[step_B][:, None, None] for a in (schedule.signal, schedule.noise))
    said = (signal * x_0 + sigma * noise - signal * output[..., :3]) / sigma
    velocity = [signal * e - sigma * x for e, x in ((said, output[..., :3]), (noise, x_0))]
    error = np.mean((velocity[0] - velocity[1]) ** 2, axis=(1, 2))
    there = np.concatenate([said, output[..., 3:]], axis=-1)
    _, bound = ddpm.loss(schedule, lambda *_: there, x_0, noise, step_B)
    np.testing.assert_allclose(loss, error + bound, rtol=1e-4)
    # Next to the data, where noise is 0.01, an error counts 400 times, and not 10,000.
    assert ddpm.data_weight(schedule, jnp.zeros(1, int)) == pytest.approx(0.04, rel=0.01)


def test_ddpm_trains_on_all_steps_alike():
    levels = DDPM().sample_levels(jax.random.key(0), 100_000)
    steps = np.asarray(levels * ddpm.N_STEPS)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    counts = np.bincount(steps.round().astype(int), minlength=1000)
    assert len(counts) == 1000
    # Of a Poisson distribution with mean 100, to five standard deviations.
    assert 50 < counts.min() < counts.max() < 150


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
def test_ddpm_samples_what_an_exact_network_knows(prediction):
    # All data is one point, so x_t tells its noise.
    point = normal(0, 2, 3)
    schedule = ddpm.linear_schedule()

    def network(x, time_B):
        t = time_B.astype(jnp.int32)[:, None, None]
        noise = (x - schedule.signal[t] * point) / schedule.noise[t]
        known = noise if prediction == "noise" else jnp.broadcast_to(point, x.shape)
        return jnp.concatenate([known, jnp.zeros_like(x)], axis=-1)

    noise = normal(1, 4, 2, 3)
    draws = jnp.asarray(normal(2, 10, 4, 2, 3))
    for name in DDPM.samplers:
        sampling = Sampling(steps=10, sampler=name)
        x = DDPM(prediction).denoise(network, noise, sampling, lambda step: draws[step])
        np.testing.assert_allclose(x, np.broadcast_to(point, x.shape), atol=1e-3)


def test_descriptions_of_ddpm_from_before_it_had_predictions_stay_true():
    older = {"objective": "ddpm", "time_shift": 1.0, "prediction": "velocity"}
    assert objectives.from_fields(older) == DDPM(prediction="noise")
    assert objectives.from_fields(objectives.to_fields(DDPM("data"))) == DDPM("data")


def test_flow_shifts_the_levels_of_training_and_of_sampling():
    key = jax.random.key(0)
    levels = RectifiedFlow(time_shift=3.0).sample_levels(key, 8)
    np.testing.assert_array_equal(levels, flow.sample_times(key, 8, 3.0))
    # With a constant velocity of one, samples see every time; the network sees thousandths.
    noise = jnp.zeros((1, 2, 3))
    x = RectifiedFlow(time_shift=3.0).denoise(
        lambda x, time_B: jnp.broadcast_to(time_B[:, None, None] / 1000, x.shape),
        noise,
        Sampling(steps=2),
    )
    np.testing.assert_allclose(x, -(0.25 * 1.0 + 0.75 * 0.75), rtol=1e-5)


def test_each_objective_names_its_samplers():
    for objective, other in ((RectifiedFlow(), "ancestral"), (DDPM(), "heun")):
        known = ", ".join(objective.samplers)
        with pytest.raises(ValueError, match=rf"sampler='{other}': .*{re.escape(known)}, those of"):
            objective.denoise(lambda x, _: x, jnp.zeros((1, 2)), Sampling(2, sampler=other))


def test_a_shift_of_ddpm_multiplies_the_noise_by_the_signal():
    usual, shifted = ddpm.linear_schedule(), ddpm.linear_schedule(shift=3.0)
    ratio = shifted.noise / shifted.signal / (usual.noise / usual.signal)
    np.testing.assert_allclose(ratio, 3, rtol=1e-4)
    np.testing.assert_allclose(shifted.noise**2 + shifted.signal**2, 1, rtol=1e-6)


@pytest.mark.parametrize(("eta", "shift"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 2.0)])
def test_ddim_with_any_eta_keeps_a_gaussian(eta, shift):
    """Of data N(1, 0.5^2), by the noise that is known: E[noise | x_t]."""
    schedule = ddpm.linear_schedule(shift=shift)
    mean, variance = 1.0, 0.25

    def network(x, time_B):
        at = time_B.astype(jnp.int32)[:, None]
        signal, noise = schedule.signal[at], schedule.noise[at]
        expected = noise * (x - signal * mean) / (signal**2 * variance + noise**2)
        return jnp.concatenate([expected, jnp.zeros_like(x)], axis=-1)

    def draw(step):
        return jax.random.normal(jax.random.fold_in(jax.random.key(2), step), (20_000, 1))

    noise = jax.random.normal(jax.random.key(1), (20_000, 1))
    sampling = Sampling(steps=200, eta=eta)
    objective = DDPM(time_shift=shift)
    x = jax.jit(lambda z: objective.denoise(network, z, sampling, draw))(noise)
    assert float(x.mean()) == pytest.approx(mean, abs=0.02)
    assert float(x.std()) == pytest.approx(variance**0.5, rel=0.04)
    # Without new noise, and only then, the way is the noise's own.
    correlation = float(np.corrcoef(np.asarray(noise)[:, 0], np.asarray(x)[:, 0])[0, 1])
    assert (correlation > 0.999) == (eta == 0)
