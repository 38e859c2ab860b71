"""DiT's Gaussian diffusion: its schedule, loss, gradients and samplers, by its own numbers."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.diffusion import ddpm

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion.npz"


@pytest.fixture(scope="module")
def golden():
    """The arrays, with channels last."""
    arrays = dict(np.load(GOLDEN))
    return {k: np.moveaxis(a, -3, -1) if a.ndim > 3 else a for k, a in arrays.items()}


def assert_close(a, b, **given):
    np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-5} | given)


def test_schedule(golden):
    schedule = ddpm.linear_schedule()
    np.testing.assert_array_equal(schedule.step, np.arange(1000))
    assert_close(np.exp(schedule.log_variance_max), golden["betas"])
    assert_close(schedule.signal**2, golden["alphas_cumprod"])
    assert_close(schedule.noise**2, 1 - golden["alphas_cumprod"], atol=0)


def test_the_steps_of_samplers(golden):
    np.testing.assert_array_equal(ddpm.even_steps(25), golden["timesteps25"])
    np.testing.assert_array_equal(ddpm.even_steps(1000), np.arange(1000))
    np.testing.assert_array_equal(ddpm.even_steps(1), [999])
    with pytest.raises(ValueError, match="1001 steps: expected at most 1000"):
        ddpm.even_steps(1001)
    some = ddpm.linear_schedule(ddpm.even_steps(25))
    everything = ddpm.linear_schedule()
    for name in ("signal", "noise"):
        np.testing.assert_array_equal(
            getattr(some, name), getattr(everything, name)[golden["timesteps25"]]
        )


def test_loss_and_reverse_steps(golden):
    schedule = ddpm.linear_schedule()
    seen = []

    def denoise(x_t, step_B):
        seen.append((x_t, step_B))
        return golden["model_out"]

    mse, bound = ddpm.loss(schedule, denoise, golden["x0"], golden["eps"], golden["t"])
    assert_close(mse, golden["mse"])
    assert_close(bound, golden["vb"])
    assert_close(mse + bound, golden["loss"])
    [(x_t, step_B)] = seen
    assert_close(x_t, golden["xt"])
    np.testing.assert_array_equal(step_B, golden["t"])
    at = ddpm._at(schedule, golden["t"], x_t)
    mean, log_variance, x_0 = ddpm.reverse_step(at, golden["xt"], golden["model_out"])
    assert_close(mean, golden["p_mean"])
    assert_close(log_variance, golden["p_logvar"])
    assert_close(x_0, golden["pred_xstart"])


def test_the_bound_teaches_the_variance_only(golden):
    def bound(output):
        schedule = ddpm.linear_schedule()
        x_0, noise = golden["x0"], golden["eps"]
        return ddpm.loss(schedule, lambda *_: output, x_0, noise, golden["t"])[1].sum()

    noise, variance = jnp.split(jax.grad(bound)(jnp.asarray(golden["model_out"])), 2, axis=-1)
    np.testing.assert_array_equal(noise, 0)
    assert np.isfinite(variance).all()
    assert (np.abs(variance).max(axis=(1, 2, 3)) > 0).all()


def network(x, step_B):
    """The one that the golden samples were made with."""
    t = step_B.reshape(-1, 1, 1, 1) / 1000
    return jnp.concatenate([jnp.tanh(0.5 * x + t), 0.3 * jnp.sin(x)], axis=-1)


def test_ddim(golden):
    schedule = ddpm.linear_schedule(golden["timesteps_ddim25"])
    out = jax.jit(lambda z: ddpm.ddim(schedule, network, z))(golden["ddim_z"])
    assert_close(out, golden["ddim25_out"])


def test_ancestral_sampling(golden):
    schedule = ddpm.linear_schedule(golden["timesteps25"])
    noises = jnp.asarray(golden["ddpm25_noises"])[::-1]  # theirs are in the order drawn
    out = jax.jit(lambda z: ddpm.ancestral(schedule, network, z, lambda t: noises[t]))(
        golden["ddim_z"]
    )
    assert_close(out, golden["ddpm25_out"])
