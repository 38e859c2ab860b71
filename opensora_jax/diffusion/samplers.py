"""From noise to data: guidance and integration, for any denoiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free_guidance(
    conditional: Denoiser, unconditional: Denoiser, scale: float
) -> Denoiser:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans, arXiv:2207.12598).

    Outputs with more channels than x end in learned variances: those are the conditional's, as in
    DiT. With a scale of 1 the unconditional is not called.
    """

    def guided(x, t_B):
        there, base = conditional(x, t_B), unconditional(x, t_B)
        there, variance = jnp.split(there, [x.shape[-1]], axis=-1)
        base = base[..., : x.shape[-1]]
        return jnp.concatenate([base + scale * (there - base), variance], axis=-1)

    return conditional if scale == 1.0 else guided


def euler(velocity: Denoiser, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Integrates dx = velocity(x, t) dt along `times`, from 1 (noise) down to 0."""

    def step(x, now_next):
        now, after = now_next
        t_B = jnp.full((x.shape[0],), now)
        return x + (after - now) * velocity(x, t_B), None

    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x
