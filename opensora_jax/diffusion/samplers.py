"""From noise to data: guidance and integration, for any denoiser; each a compiled loop.

Shape suffixes: B batch; "..." the dimensions of a latent video, the last of them channels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from opensora_jax.diffusion.sampling import Sampling

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
# A denoiser's outputs with and without the condition, computed together.
Both = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

# Levels run from 0 to 1; the network's embedding of time was made for DiT's 1000 steps.
TIME_SCALE = 1000.0


def guide(
    conditional: Denoiser, both: Both, sampling: Sampling, n_guided: int | None = None
) -> Denoiser:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans, arXiv:2207.12598).

    Outputs that end in learned variances have the conditional's, as in DiT. With a scale of 1 the
    unconditional is not computed, nor is it outside of the levels that are guided.

    Args:
      conditional, both: of x (B, ...) and times (B,), TIME_SCALE times the levels.
      n_guided: how many channels of the outputs are guided, the first; None: all.
    """

    def guided(x, time_B):
        there, base = both(x, time_B)
        n = n_guided or there.shape[-1]
        there, variance = jnp.split(there, [n], axis=-1)
        base = base[..., :n]
        out = base + sampling.guidance * (there - base)
        if sampling.guidance_rescale:
            axes = range(1, x.ndim)
            ratio = there.std(axes, keepdims=True) / out.std(axes, keepdims=True)
            out *= 1 + sampling.guidance_rescale * (ratio - 1)
        return jnp.concatenate([out, variance], axis=-1)

    def guided_between(x, time_B):
        level = time_B[0] / TIME_SCALE  # all examples have the same
        is_within = (level >= sampling.guidance_from) & (level <= sampling.guidance_to)
        return jax.lax.cond(is_within, guided, conditional, x, time_B)

    if sampling.guidance == 1.0:
        return conditional
    is_everywhere = sampling.guidance_from <= 0 and sampling.guidance_to >= 1
    return guided if is_everywhere else guided_between


def euler(velocity: Denoiser, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Integrates dx = velocity(x, t) dt along `times`, from 1 (noise) down to 0; first order."""

    def step(x, now_next):
        now, after = now_next
        t_B = jnp.full((x.shape[0],), now)
        return x + (after - now) * velocity(x, t_B), None

    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x


def heun(velocity: Denoiser, noise: jax.Array, times: jax.Array) -> jax.Array:
    """As `euler`, by Heun's method, of second order with two calls a step but the last."""

    def step(x, now_next):
        now, after = now_next
        slope = velocity(x, jnp.full((x.shape[0],), now))
        guess = x + (after - now) * slope
        end = velocity(guess, jnp.full((x.shape[0],), after))
        return x + (after - now) * (slope + end) / 2, None

    x, _ = jax.lax.scan(step, noise, (times[:-2], times[1:-1]))
    return euler(velocity, x, times[-2:])


def dpm_solver(
    to_data: Callable[[jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    signal: jax.Array,
    noise_share: jax.Array,
) -> jax.Array:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2): x_t = signal x_0 + noise_share noise.

    Of second order with one call a step; the first and the last step are of first order.

    Args:
      to_data: x_0 by x_t and the number of the step (traced).
      signal, noise_share: (steps + 1,), from noise down to data, where they are 1 and 0.
    """
    n = len(signal) - 1
    shrink = noise_share[1:] / noise_share[:-1]
    share = signal[1:] - shrink * signal[:-1]
    length = jnp.diff(jnp.log(signal) - jnp.log(noise_share))  # of steps, in log signal to noise
    before = jnp.concatenate([jnp.full((1,), jnp.inf), length[:-1]])
    is_inner = (jnp.arange(n) > 0) & (jnp.arange(n) < n - 1)
    weight = jnp.where(is_inner, jnp.where(is_inner, length, 0) / (2 * before), 0)

    def step(carry, at):
        x, last = carry
        i, shrink, share, weight = at
        x_0 = to_data(x, i)
        x = shrink * x + share * ((1 + weight) * x_0 - weight * last)
        return (x, x_0), None

    steps = (jnp.arange(n), shrink, share, weight)
    (x, _), _ = jax.lax.scan(step, (noise, jnp.zeros_like(noise)), steps)
    return x
