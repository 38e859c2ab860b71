"""Denoising diffusion (Ho et al., arXiv:2006.11239) with learned variances, as in DiT.

x_t = signal_t x_0 + noise_t noise, where signal_t² + noise_t² = 1 and t counts the steps from the
data to the noise. The network gives the noise, and in [-1, 1] where between its bounds the log
variance of each reverse step lies (Nichol & Dhariwal, arXiv:2102.09672).

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import samplers

# (x (B, ..., C), step (B,) int32) -> (B, ..., 2 C): the noise, then where the log variance lies.
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]

N_STEPS = 1000
PREDICTIONS = ("noise", "data")

# Below it, noise does not raise the weight of an error of predicted data any more.
_LEAST_NOISE = 0.05


class Schedule(NamedTuple):
    """What the formulas need at each of n steps, the first being the one next to the data.

    All are (n,) float32 but for `step`. As a step of its own (see `_at`), each is one number, or
    one for each example.
    """

    step: jax.Array  # int32, the number that the network knows it by
    signal: jax.Array
    noise: jax.Array
    signal_before: jax.Array  # of the step next to it, nearer to the data
    noise_before: jax.Array
    mean_data: jax.Array  # share of x_0 in the mean of what is before x_t, given both
    mean_noisy: jax.Array  # share of x_t
    log_variance_min: jax.Array  # of a reverse step, were x_0 known
    log_variance_max: jax.Array  # of the forward step


def linear_schedule(steps: np.ndarray | None = None, shift: float = 1.0) -> Schedule:
    """DiT's schedule: the variances added by 1000 steps grow linearly from 1e-4 to 0.02.

    Args:
      steps: ascending, those of the 1000 that a sampler takes; None: all.
      shift: what the noise is multiplied by, compared with the signal (arXiv:2301.11093), as
        `flow.shift_times` does.
    """
    steps = np.arange(N_STEPS) if steps is None else np.asarray(steps)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, N_STEPS))[steps]
    alpha_bar /= alpha_bar + shift**2 * (1 - alpha_bar)
    before = np.append(1.0, alpha_bar[:-1])
    beta = 1 - alpha_bar / before
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1] if len(steps) > 1 else beta[0]  # it is 0, which has no logarithm
    arrays = Schedule(
        step=steps,
        signal=np.sqrt(alpha_bar),
        noise=np.sqrt(1 - alpha_bar),
        signal_before=np.sqrt(before),
        noise_before=np.sqrt(1 - before),
        mean_data=beta * np.sqrt(before) / (1 - alpha_bar),
        mean_noisy=(1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar),
        log_variance_min=np.log(variance),
        log_variance_max=np.log(beta),
    )
    return Schedule(
        *(jnp.asarray(a, jnp.int32 if a is arrays.step else jnp.float32) for a in arrays)
    )


def even_steps(n: int) -> np.ndarray:
    """n of the 1000 steps, ascending, from the first to the last, as in DiT; one: the last.

    Raises:
      ValueError: more steps than there are.
    """
    if n > N_STEPS:
        raise ValueError(f"{n} steps: expected at most {N_STEPS}")
    return np.round(np.linspace(N_STEPS - 1, 0, n)).astype(np.int32)[::-1]


def _at(schedule: Schedule, t_B: jax.Array, x: jax.Array) -> Schedule:
    """Each example's step, its numbers shaped to go with x."""
    return Schedule(*(a[t_B].reshape(-1, *[1] * (x.ndim - 1)) for a in schedule))


def _mean(values: jax.Array) -> jax.Array:
    return jnp.mean(values, axis=range(1, values.ndim))


def to_data(at: Schedule, x_t: jax.Array, noise: jax.Array) -> jax.Array:
    """x_0 of x_t and its noise."""
    return (x_t - at.noise * noise) / at.signal


def noise_of_data(
    schedule: Schedule, t_B: jax.Array, x_t: jax.Array, output: jax.Array
) -> jax.Array:
    """A `Denoiser`'s output (B, ..., 2 C) of one that gives x_0 in the place of the noise.

    Args:
      schedule: of all steps.
    """
    at = _at(schedule, t_B, x_t)
    x_0, where = jnp.split(output, 2, axis=-1)
    return jnp.concatenate([(x_t - at.signal * x_0) / at.noise, jnp.clip(where, -1, 1)], axis=-1)


def data_weight(schedule: Schedule, t_B: jax.Array) -> jax.Array:
    """Of the mean squared errors of the noise (B,), those of the velocity signal noise - noise x_0
    (Salimans & Ho, arXiv:2202.00512) to those of the noise, which hardly asks what x_0 is where it
    is hidden; not above 400 times those of x_0."""
    at = _at(schedule, t_B, t_B)
    return jnp.minimum(1, (at.noise / _LEAST_NOISE) ** 2) / at.signal**2


def reverse_step(
    at: Schedule, x_t: jax.Array, output: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean, log variance, x_0) of the step before x_t, by the network's output, all as x_t."""
    noise, where = jnp.split(output, 2, axis=-1)
    x_0 = to_data(at, x_t, noise)
    share = (where + 1) / 2
    log_variance = share * at.log_variance_max + (1 - share) * at.log_variance_min
    return at.mean_data * x_0 + at.mean_noisy * x_t, log_variance, x_0


def loss(
    schedule: Schedule, denoise: Denoiser, x_0: jax.Array, noise: jax.Array, t_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean squared error of the noise, variational bound in bits a dimension), both (B,).

    DiT trains on their sum. The bound teaches the variance only: the noise is held fixed in it.

    Args:
      t_B: int32, the step of each example, from 0 to n - 1.
    """
    at = _at(schedule, t_B, x_0)
    x_t = at.signal * x_0 + at.noise * noise
    output = denoise(x_t, schedule.step[t_B])
    predicted, where = jnp.split(output, 2, axis=-1)
    fixed = jnp.concatenate([jax.lax.stop_gradient(predicted), where], axis=-1)
    mean, log_variance, _ = reverse_step(at, x_t, fixed)
    true_mean = at.mean_data * x_0 + at.mean_noisy * x_t
    divergence = _gaussian_kl(true_mean, at.log_variance_min, mean, log_variance)
    likelihood = _discretized_log_likelihood(x_0, mean, log_variance)
    is_first = (t_B == 0).reshape(at.signal.shape)
    bound = jnp.where(is_first, -likelihood, divergence)
    return _mean((predicted - noise) ** 2), _mean(bound) / math.log(2)


def _gaussian_kl(mean_p, log_variance_p, mean_q, log_variance_q):
    """KL(p || q) of normal distributions, in nats, one by one."""
    difference = log_variance_p - log_variance_q
    square = (mean_p - mean_q) ** 2 * jnp.exp(-log_variance_q)
    return 0.5 * (jnp.exp(difference) - difference - 1 + square)


def _discretized_log_likelihood(x, mean, log_variance):
    """Of x in a bin 2/255 wide, in nats, the outermost bins being open.

    Made for pixels in [-1, 1] (Ho et al., section 3.3). DiT keeps it for latents, and so do we.
    """
    scale = jnp.exp(-0.5 * log_variance)
    above = _normal_cdf(scale * (x - mean + 1 / 255))
    below = _normal_cdf(scale * (x - mean - 1 / 255))
    share = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(share, 1e-12))


def _normal_cdf(x):
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def ddim(
    schedule: Schedule,
    denoise: Denoiser,
    noise: jax.Array,
    eta: float = 0.0,
    draw: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """x_0 from noise (Song et al., arXiv:2010.02502, equations 12 and 16).

    Args:
      eta: share of the noise of a step that is drawn anew; 0: none, 1: as DDPM with the smaller
        variance.
      draw: as in `ancestral`, for an eta above 0.
    """

    def step(x_t, at_t):
        at, t = at_t
        output = denoise(x_t, jnp.broadcast_to(at.step, x_t.shape[:1]))
        predicted, _ = jnp.split(output, 2, axis=-1)
        x_0 = to_data(at, x_t, predicted)
        if not eta:
            return at.signal_before * x_0 + at.noise_before * predicted, None
        kept = at.signal / at.signal_before
        new = eta * at.noise_before / at.noise * jnp.sqrt(1 - kept**2)
        old = jnp.sqrt(jnp.maximum(at.noise_before**2 - new**2, 0))
        return at.signal_before * x_0 + old * predicted + new * draw(t), None

    steps = (schedule, jnp.arange(len(schedule.step)))
    return jax.lax.scan(step, noise, steps, reverse=True)[0]


def dpm_solver(schedule: Schedule, denoise: Denoiser, noise: jax.Array) -> jax.Array:
    """x_0 from noise by `samplers.dpm_solver`."""
    down = Schedule(*(x[::-1] for x in schedule))

    def x_0(x_t, i):
        at = Schedule(*(x[i] for x in down))
        predicted, _ = jnp.split(denoise(x_t, jnp.broadcast_to(at.step, x_t.shape[:1])), 2, axis=-1)
        return to_data(at, x_t, predicted)

    signal, share = jnp.append(down.signal, 1.0), jnp.append(down.noise, 0.0)
    return samplers.dpm_solver(x_0, noise, signal, share)


def ancestral(
    schedule: Schedule,
    denoise: Denoiser,
    noise: jax.Array,
    draw: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """x_0 from noise by drawing each reverse step.

    Args:
      draw: standard normal noise, of the shape of `noise`, for step t (a traced int32); the first
        step, t = 0, takes the mean.
    """

    def step(x_t, at_t):
        at, t = at_t
        output = denoise(x_t, jnp.broadcast_to(at.step, x_t.shape[:1]))
        mean, log_variance, _ = reverse_step(at, x_t, output)
        return mean + (t > 0) * jnp.exp(0.5 * log_variance) * draw(t), None

    steps = (schedule, jnp.arange(len(schedule.step)))
    return jax.lax.scan(step, noise, steps, reverse=True)[0]
