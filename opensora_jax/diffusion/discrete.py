"""Noise and samples of codes themselves: masks, and paths along which distances shrink.

A code is one index of a codebook, or, where the codebook is a grid (FSQ), an index of each of its
dimensions. Each such index is a digit, and a path goes through each digit by itself: the squared
distance of embeddings is a sum over the dimensions of a grid, so that
softmax(-beta d(x, x_1)) over all codes is the product of one over each digit's values.

Shape suffixes: B batch, K values of a digit; "..." positions, (B, T, H, W) unless said otherwise.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Of an array of positions x values, the numbers an example that are in memory at a time.
_MOST_NUMBERS = 2**20


def to_digits(codes: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """The digits (...) int32 of codes (...), the first being the least significant."""
    bases = np.cumprod([1, *sizes[:-1]])
    return [codes // int(base) % n for base, n in zip(bases, sizes, strict=True)]


def from_digits(digits: Sequence[jax.Array], sizes: Sequence[int]) -> jax.Array:
    """The inverse of `to_digits`."""
    bases = np.cumprod([1, *sizes[:-1]])
    return sum(digit * int(base) for digit, base in zip(digits, bases, strict=True))


def at_random(uniform: jax.Array, n: int) -> jax.Array:
    """Of numbers (...) in [0, 1) values 0 to n - 1, all alike, int32."""
    return jnp.minimum((uniform * n).astype(jnp.int32), n - 1)


def choose(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Of weights (..., K) one of the K values in their proportion, by numbers (...) in [0, 1)."""
    total = jnp.cumsum(weights, axis=-1)
    # The last is never passed, however numbers are rounded.
    passed = uniform[..., None] * total[..., -1:] >= total[..., :-1]
    return jnp.sum(passed, axis=-1, dtype=jnp.int32)


def distances(table: jax.Array, x_1: jax.Array) -> jax.Array:
    """Squared distances (..., K) of values, embeddings (K, channels), from the values x_1 (...)."""
    table = jnp.asarray(table)
    if table.shape[1] == 1:
        return (table[x_1] - table[:, 0]) ** 2
    squared = jnp.sum(table**2, axis=-1)
    product = jnp.matmul(table[x_1], table.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(squared[x_1][..., None] + squared - 2 * product, 0)


def on_path(table: jax.Array, x_1: jax.Array, beta: jax.Array, uniform: jax.Array) -> jax.Array:
    """x_t (...) of softmax(-beta d(x, x_1)) over a digit's values.

    Args:
      table: (K, channels), embeddings of the values.
      beta, uniform: (...), the second in [0, 1).
    """
    return choose(jax.nn.softmax(-beta[..., None] * distances(table, x_1)), uniform)


def jump(
    table: jax.Array,
    x_t: jax.Array,
    x_1: jax.Array,
    beta: jax.Array,
    increase: jax.Array,
    uniform: jax.Array,
) -> jax.Array:
    """One step (...) of the jump process whose marginals are those of `on_path`.

    Its rate from x_t to x is softmax(-beta d(x, x_1)) relu(d(x_t, x_1) - d(x, x_1)) for each unit
    by which beta grows (Shaul et al., arXiv:2412.03487; URSA, arXiv:2510.24717): it may
    revise every position, and only towards x_1. Beta's growth is an argument, not a step of time,
    in which it may grow infinitely fast. Of first order in `increase`.
    """
    away = distances(table, x_1)
    now = jnp.take_along_axis(away, x_t[..., None], axis=-1)
    rates = jax.nn.softmax(-beta[..., None] * away) * jax.nn.relu(now - away)
    moves = -jnp.expm1(-increase * jnp.sum(rates, axis=-1))
    # What is left of the number below `moves` is as uniform as it was.
    target = choose(rates, uniform / jnp.maximum(moves, jnp.finfo(jnp.float32).tiny))
    return jnp.where(uniform < moves, target, x_t)


def share_hidden(level: jax.Array) -> jax.Array:
    """The share of positions that are masked at a noise level: MaskGIT's cosine of what is done."""
    return jnp.sin(jnp.pi / 2 * level)


def hide_least(confidence: jax.Array, is_hidden: jax.Array, n: jax.Array) -> jax.Array:
    """Of the positions (B, T, H, W) that are hidden, the n of least confidence in each example.

    Args:
      n: a number, or one for each example, (B, 1, 1, 1).
    """
    flat = jnp.where(is_hidden, confidence, jnp.inf).reshape(len(confidence), -1)
    rank = jnp.argsort(jnp.argsort(flat, axis=-1), axis=-1).reshape(confidence.shape)
    return is_hidden & (rank < n)


def cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """In nats (...), of logits (..., K) for values (...)."""
    chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def draw(
    logits: jax.Array, uniform: jax.Array, temperature: float, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Values (...) drawn of logits (..., K), and the logarithms of their probabilities (...).

    Args:
      temperature: logits are divided by it before they are drawn of; probabilities are without it.
      top_p: the share of the probability that the likeliest values hold, of which alone is drawn.
    """
    weights = jax.nn.softmax(logits / temperature)
    if top_p < 1:
        down = -jnp.sort(-weights, axis=-1)
        n_kept = jnp.sum(jnp.cumsum(down, axis=-1) - down < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(down, n_kept - 1, axis=-1)
        weights = jnp.where(weights >= least, weights, 0)
    values = choose(weights, uniform)
    return values, -cross_entropy(logits, values)


def in_parts(
    function: Callable[..., jax.Array | tuple[jax.Array, ...]], n_values: int, *arrays: jax.Array
) -> jax.Array | tuple[jax.Array, ...]:
    """function(*arrays), of arrays (B, T, H, W, ...) that it treats position by position.

    A few positions of each example at a time where all would make arrays of more than 2^20 numbers
    an example, each position having `n_values`; the backward pass makes them again.
    """
    shape = arrays[0].shape[:4]
    n = math.prod(shape[1:])
    most = max(_MOST_NUMBERS // n_values, 1)
    if n <= most:
        return function(*arrays)
    size = next(k for k in range(most, 0, -1) if n % k == 0)

    def split(x):
        return x.reshape(shape[0], n // size, size, *x.shape[4:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(*shape, *x.shape[3:])

    parts = jax.lax.map(jax.checkpoint(lambda xs: function(*xs)), tuple(map(split, arrays)))
    return jax.tree.map(join, parts)
