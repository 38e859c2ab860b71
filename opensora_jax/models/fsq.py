"""Finite scalar quantization (Mentzer et al., arXiv:2309.15505): a codebook that is a grid.

Each dimension of a latent is bounded and rounded to one of a few levels. A code is the number whose
digits are the levels, the first dimension being the least significant.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class FSQ:
    """The grid of `levels` values a dimension; embeddings reach from -1 to at most 1.

    Raises:
      ValueError: a dimension of fewer than 2 levels, or more codes than int32 numbers.
    """

    levels: tuple[int, ...]

    def __post_init__(self):
        levels = tuple(int(n) for n in self.levels)  # JSON knows no tuples
        object.__setattr__(self, "levels", levels)
        if not levels or min(levels) < 2 or math.prod(levels) >= 2**31:
            raise ValueError(
                f"levels={levels}: expected at least 2 each, and fewer than 2**31 codes in all"
            )

    @property
    def n_codes(self) -> int:
        return math.prod(self.levels)

    @property
    def _half_width(self) -> np.ndarray:
        return np.array(self.levels) // 2

    @property
    def _basis(self) -> np.ndarray:
        return np.cumprod([1, *self.levels[:-1]])

    def codebook(self) -> jax.Array:
        """The embedding (n_codes, dim) float32 of each code."""
        return self.lookup(jnp.arange(self.n_codes))

    def codes(self, z: jax.Array) -> jax.Array:
        """Latents (..., dim) of any size -> the codes (...) int32 that they are rounded to."""
        return self._from_digits(jnp.round(self._bound(z)) + self._half_width)

    def nearest(self, embeddings: jax.Array) -> jax.Array:
        """The codes (...) int32 whose embeddings are nearest to these (..., dim)."""
        digits = jnp.round(embeddings.astype(jnp.float32) * self._half_width) + self._half_width
        return self._from_digits(jnp.clip(digits, 0, np.array(self.levels) - 1))

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Embeddings (..., dim) float32 of codes (...)."""
        digits = codes[..., None] // self._basis % np.array(self.levels)
        return (digits - self._half_width).astype(jnp.float32) / self._half_width

    def straight_through(
        self, z: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """As `models.codebook.Codebook.straight_through`, with nothing to learn or to commit to."""
        x = self._bound(z)
        rounded = jax.lax.stop_gradient(jnp.round(x))
        quantized = x + jax.lax.stop_gradient(rounded - x)
        codes = self._from_digits(rounded + self._half_width)
        return codes, x / self._half_width, quantized / self._half_width, jnp.float32(0)

    def _bound(self, z):
        """z squashed to just beyond the outermost levels (the paper's appendix A.1)."""
        levels = np.array(self.levels)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2 == 0, 0.5, 0.0)
        shift = np.arctanh(offset / half).astype(np.float32)
        half, offset = half.astype(np.float32), offset.astype(np.float32)
        return jnp.tanh(z.astype(jnp.float32) + shift) * half - offset

    def _from_digits(self, digits):
        return jnp.sum(digits.astype(jnp.int32) * self._basis, axis=-1, dtype=jnp.int32)
