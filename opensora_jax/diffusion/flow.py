"""Rectified flow (Liu et al., arXiv:2209.03003): straight paths from data to noise.

x_t = (1 - t) x_0 + t noise for t in [0, 1]; the velocity is noise - x_0. A network gives it as it
is, or by way of x_0: velocity = (x_t - x_0) / t. The way by x_0 is for tokens with as many numbers
as the network is wide: noise, which has no structure, need not pass through it (arXiv:2511.13720).

Shape suffixes: B batch; "..." the dimensions of a latent video.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def shift_times(t: jax.Array, shift: float) -> jax.Array:
    """Moves times in [0, 1] towards noise: s t / (1 + (s - 1) t) (arXiv:2403.03206, eq. 23).

    The more numbers describe one thing, the more noise it takes to hide it: large grids of latents
    and large patches want a shift above 1.
    """
    return shift * t / (1 + (shift - 1) * t)


def sample_times(key: jax.Array, n: int, shift: float = 1.0) -> jax.Array:
    """Logit-normal times (n,) in (0, 1), most in the middle (arXiv:2403.03206), then shifted."""
    return shift_times(jax.nn.sigmoid(jax.random.normal(key, (n,))), shift)


def _like(t_B: jax.Array, x: jax.Array) -> jax.Array:
    return t_B.reshape(-1, *[1] * (x.ndim - 1))


def interpolate(x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t of shape (B, ...)."""
    t = _like(t_B, x_0)
    return (1 - t) * x_0 + t * noise


PREDICTIONS = ("velocity", "data")

# The least t that a predicted x_0 is divided by.
_LEAST_TIME = 0.05


def to_velocity(output: jax.Array, x_t: jax.Array, t_B: jax.Array, prediction: str) -> jax.Array:
    """The velocity (B, ...) that a network's `output` of one of `PREDICTIONS` stands for."""
    if prediction == "velocity":
        return output
    return (x_t - output) / jnp.maximum(_like(t_B, x_t), _LEAST_TIME)


def loss(
    velocity: Callable[[jax.Array, jax.Array], jax.Array],
    x_0: jax.Array,
    noise: jax.Array,
    t_B: jax.Array,
) -> jax.Array:
    """Mean squared error (B,) of velocity(x_t, t) against noise - x_0."""
    predicted = velocity(interpolate(x_0, noise, t_B), t_B)
    return jnp.mean((predicted - (noise - x_0)) ** 2, axis=range(1, x_0.ndim))
