"""Vector quantization with a codebook learned by exponential moving averages.

Shape suffixes: N positions, K codes, B codes of a block, D embedding dimension.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class CodebookVariable(nnx.Variable):
    """State of the codebook: trained by averages, not by gradients."""


def nearest_codes(z_ND: jax.Array, codebook_KD: jax.Array, block: int = 256) -> jax.Array:
    """Index (N,) int32 of the nearest code in Euclidean distance, the first of equals.

    |z|^2 is left out, being the same for all codes. Codes go in blocks, so that only N x `block`
    distances are in memory at a time, and positions may be sharded over devices.
    """
    block = min(block, len(codebook_KD))
    z_ND, codebook_KD = z_ND.astype(jnp.float32), codebook_KD.astype(jnp.float32)
    half_norm_K = 0.5 * jnp.sum(codebook_KD**2, axis=-1)
    excess = -len(codebook_KD) % block
    blocks = (
        jnp.pad(codebook_KD, ((0, excess), (0, 0))).reshape(-1, block, codebook_KD.shape[1]),
        jnp.pad(half_norm_K, (0, excess), constant_values=jnp.inf).reshape(-1, block),
    )

    def search(carry, xs):
        start, best_N, code_N = carry
        codes_BD, half_norm_B = xs
        score_NB = jnp.dot(z_ND, codes_BD.T, precision=jax.lax.Precision.HIGHEST) - half_norm_B
        score_N = jnp.max(score_NB, axis=-1)
        index_N = start + jnp.argmax(score_NB, axis=-1).astype(jnp.int32)
        code_N = jnp.where(score_N > best_N, index_N, code_N)
        return (start + block, jnp.maximum(best_N, score_N), code_N), None

    n = len(z_ND)
    first = jnp.int32(0), jnp.full(n, -jnp.inf), jnp.zeros(n, jnp.int32)
    (_, _, code_N), _ = jax.lax.scan(search, first, blocks)
    return code_N


class Codebook(nnx.Module):
    """VideoGPT's codebook (arXiv:2104.10157, after VQ-VAE-2's averages, arXiv:1906.00446).

    In training, `__call__` moves the averages and restarts dead codes from random encoder outputs.
    A code is dead when its average use is under `restart_below` of the mean use; a restarted code
    gets the mean use, a grace of about log(1 / restart_below) / (1 - decay) steps. (VideoGPT
    leaves the averages of a restarted code as they are, so that it is dead again a step later.)

    The first training step takes the codes from the encoder's outputs.
    """

    def __init__(
        self,
        n_codes: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        decay: float = 0.99,
        restart_below: float = 0.03,
    ):
        self.n_codes, self.dim = n_codes, dim
        self.decay, self.restart_below = decay, restart_below
        embeddings = jax.random.normal(rngs.params(), (n_codes, dim))
        self.embeddings = CodebookVariable(embeddings)
        self.counts = CodebookVariable(jnp.zeros((n_codes,)))
        self.sums = CodebookVariable(embeddings)
        self.is_initialized = CodebookVariable(jnp.zeros((), jnp.bool_))

    def codes(self, z: jax.Array) -> jax.Array:
        """Nearest codes of z (..., D) -> (...) int32."""
        flat = nearest_codes(z.reshape(-1, self.dim), self.embeddings[...])
        return flat.reshape(z.shape[:-1])

    def nearest(self, embeddings: jax.Array) -> jax.Array:
        """The codes (...) int32 whose embeddings are nearest to these (..., D)."""
        return self.codes(embeddings)

    def codebook(self) -> jax.Array:
        """(K, D) float32."""
        return self.embeddings[...]

    def straight_through(
        self, z: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of encoder outputs z (..., D) the codes (...), what a decoder would see without and with
        quantization (..., D), through which the gradient passes as if there were none, and the loss
        that keeps outputs at their codes, a scalar. With a `key` it is a step of the averages.
        """
        if key is None:
            codes = self.codes(z)
        else:
            codes = self.update(z.reshape(-1, self.dim), key).reshape(z.shape[:-1])
        embeddings = jax.lax.stop_gradient(self.lookup(codes))
        commitment = 0.25 * jnp.mean((z - embeddings) ** 2)
        return codes, z, z + jax.lax.stop_gradient(embeddings - z), commitment

    def lookup(self, codes: jax.Array) -> jax.Array:
        """Embeddings (..., D) float32 of codes (...)."""
        return self.embeddings[...][codes]

    def update(self, z_ND: jax.Array, key: jax.Array) -> jax.Array:
        """One step of the averages with encoder outputs (N, D); the codes (N,) they were given."""
        z_ND = jax.lax.stop_gradient(z_ND.astype(jnp.float32))
        n = z_ND.shape[0]
        mean_use = n / self.n_codes
        order = jax.random.permutation(key, n)
        random_KD = z_ND[order[jnp.arange(self.n_codes) % n]]

        is_first = ~self.is_initialized[...]
        embeddings = jnp.where(is_first, random_KD, self.embeddings[...])
        counts = jnp.where(is_first, mean_use, self.counts[...])
        sums = jnp.where(is_first, random_KD * mean_use, self.sums[...])

        codes_N = nearest_codes(z_ND, embeddings)
        new_counts = jnp.zeros((self.n_codes,)).at[codes_N].add(1.0)
        new_sums = jnp.zeros((self.n_codes, self.dim)).at[codes_N].add(z_ND)
        counts = self.decay * counts + (1 - self.decay) * new_counts
        sums = self.decay * sums + (1 - self.decay) * new_sums

        is_dead = counts < self.restart_below * mean_use
        counts = jnp.where(is_dead, mean_use, counts)
        sums = jnp.where(is_dead[:, None], random_KD * mean_use, sums)

        self.embeddings[...] = sums / counts[:, None]
        self.counts[...] = counts
        self.sums[...] = sums
        self.is_initialized[...] = jnp.ones((), jnp.bool_)
        return codes_N


def perplexity(codes: jax.Array, n_codes: int) -> tuple[jax.Array, jax.Array]:
    """(perplexity in [1, n_codes], number of codes used) of an array of codes."""
    counts = jnp.zeros((n_codes,)).at[codes.reshape(-1)].add(1.0)
    p = counts / codes.size
    return jnp.exp(-jnp.sum(p * jnp.log(p + 1e-10))), jnp.sum(counts > 0)
