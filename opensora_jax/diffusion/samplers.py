"""From noise to data: guidance and integration, for any denoiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def classifier_free_guidance(
    conditional: Velocity, unconditional: Velocity, scale: float
) -> Velocity:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans, arXiv:2207.12598)."""

    def guided(x, t_B):
        base = unconditional(x, t_B)
        return base + scale * (conditional(x, t_B) - base)

    return conditional if scale == 1.0 else guided


def euler(velocity: Velocity, noise: jax.Array, times: jax.Array) -> jax.Array:
    """Integrates dx = velocity(x, t) dt along `times`, from 1 (noise) down to 0."""

    def step(x, now_next):
        now, after = now_next
        t_B = jnp.full((x.shape[0],), now)
        return x + (after - now) * velocity(x, t_B), None

    x, _ = jax.lax.scan(step, noise, (times[:-1], times[1:]))
    return x
