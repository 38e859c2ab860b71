"""The codebook: nearest codes, and averages that start, move and revive codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax import mesh as mesh_lib
from opensora_jax.models.codebook import Codebook, nearest_codes, perplexity

KEY = jax.random.key(3)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def brute_force(z, codebook):
    return ((z[:, None] - codebook[None]) ** 2).sum(-1).argmin(-1)


def make(embeddings, counts, decay=0.99):
    """A codebook in the middle of training."""
    codebook = Codebook(*embeddings.shape, decay=decay, rngs=nnx.Rngs(0))
    codebook.embeddings[...] = jnp.asarray(embeddings)
    codebook.counts[...] = jnp.asarray(counts)
    codebook.sums[...] = jnp.asarray(embeddings * counts[:, None])
    codebook.is_initialized[...] = jnp.ones((), bool)
    return codebook


@pytest.mark.parametrize("n", [1, 16, 50])
def test_nearest_codes_whole_and_in_blocks(n):
    z, codebook = normal(0, n, 5), 2 * normal(1, 12, 5)
    codebook[7] = codebook[2]  # of equals the first counts
    expected = brute_force(z, codebook)
    for block in (64, 12, 5, 4):
        codes = nearest_codes(jnp.asarray(z), jnp.asarray(codebook), block)
        assert codes.dtype == jnp.int32
        np.testing.assert_array_equal(codes, expected)


def test_the_distances_of_a_long_video_are_never_all_in_memory():
    n, k, d = 100_000, 2048, 256
    z, codebook = (
        jax.ShapeDtypeStruct((n, d), jnp.float32),
        jax.ShapeDtypeStruct((k, d), jnp.float32),
    )
    compiled = jax.jit(nearest_codes).lower(z, codebook).compile()
    # No more than the latents themselves, by and large.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 4 * n * d


def test_codes_and_lookup_keep_leading_dimensions():
    codebook = make(normal(1, 12, 5), np.ones(12, np.float32))
    z = normal(0, 2, 3, 5)
    codes = codebook.codes(jnp.asarray(z))
    np.testing.assert_array_equal(
        codes.reshape(-1), brute_force(z.reshape(-1, 5), normal(1, 12, 5))
    )
    np.testing.assert_array_equal(codebook.lookup(codes), normal(1, 12, 5)[np.asarray(codes)])


def test_a_step_of_the_averages():
    embeddings, counts = normal(1, 4, 3), np.array([8, 9, 10, 11], np.float32)
    z = normal(0, 40, 3)
    codebook = make(embeddings, counts, decay=0.9)
    codes = np.asarray(codebook.update(jnp.asarray(z), KEY))

    np.testing.assert_array_equal(codes, brute_force(z, embeddings))
    new_counts = 0.9 * counts + 0.1 * np.bincount(codes, minlength=4)
    new_sums = 0.9 * embeddings * counts[:, None] + 0.1 * np.stack(
        [z[codes == k].sum(axis=0) for k in range(4)]
    )
    np.testing.assert_allclose(codebook.counts[...], new_counts, rtol=1e-5)
    np.testing.assert_allclose(codebook.sums[...], new_sums, rtol=1e-4, atol=1e-5)
    expected = new_sums / new_counts[:, None]
    np.testing.assert_allclose(codebook.embeddings[...], expected, rtol=1e-4, atol=1e-5)


def is_row_of(rows, z):
    return (np.abs(np.asarray(rows)[:, None] - z[None]) < 1e-5).all(-1).any(-1)


def test_the_first_step_takes_codes_from_the_encoder_outputs():
    z = 10 + normal(0, 40, 3)  # far from the initial codes
    codebook = Codebook(16, 3, decay=1.0, rngs=nnx.Rngs(0))
    codes = codebook.update(jnp.asarray(z), KEY)
    rows = np.asarray(codebook.embeddings[...])
    np.testing.assert_array_equal(codes, brute_force(z, rows))
    np.testing.assert_allclose(
        np.abs(rows[:, None] - z[None]).max(-1).min(-1), 0.0, atol=1e-4
    )  # each is one of them,
    assert len(np.unique(rows.round(3), axis=0)) == 16  # and all differ
    # The second step goes on from there.
    codebook.update(jnp.asarray(z + 50), KEY)
    np.testing.assert_array_equal(codebook.embeddings[...], rows)


def test_dead_codes_restart_with_a_grace():
    embeddings = np.concatenate([normal(1, 6, 3), np.full((2, 3), 1e3, np.float32)])
    counts = np.full(8, 5, np.float32)
    counts[6:] = 0.1  # under 0.03 of a mean use of 5 after the step
    codebook = make(embeddings, counts)
    z = normal(0, 40, 3)
    codebook.update(jnp.asarray(z), KEY)
    revived = np.asarray(codebook.embeddings[...])[6:]
    assert is_row_of(revived, z).all()
    np.testing.assert_allclose(codebook.counts[...][6:], 5.0)
    # Not used at all, they are the same codes a step later, moved by nothing.
    codebook.update(jnp.asarray(z[:1].repeat(40, axis=0) - 1e3), jax.random.key(4))
    np.testing.assert_allclose(codebook.embeddings[...][6:], revived, rtol=1e-5)
    np.testing.assert_allclose(codebook.counts[...][6:], 5.0 * 0.99, rtol=1e-5)


def test_more_codes_than_positions():
    codebook = Codebook(16, 3, rngs=nnx.Rngs(0))
    codebook.update(jnp.asarray(normal(0, 5, 3)), KEY)
    assert np.isfinite(codebook.embeddings[...]).all()
    assert (np.asarray(codebook.counts[...]) > 0).all()


def test_a_divided_batch_gives_the_same_codebook():
    z = normal(0, 64, 3)
    codebook = Codebook(8, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(codebook)

    @jax.jit
    def step(state, batch):
        codebook = nnx.merge(graph, state)
        for i in range(3):
            codes = codebook.update(batch["z"], jax.random.fold_in(KEY, i))
        return codes, nnx.to_pure_dict(nnx.state(codebook))

    mesh = mesh_lib.make_mesh({"data": 8, "fsdp": 1, "context": 1, "tensor": 1})
    one_codes, one = step(state, {"z": jnp.asarray(z)})
    batch = mesh_lib.shard_batch({"z": z}, mesh)
    assert len({s.device for s in batch["z"].addressable_shards}) == 8
    many_codes, many = step(state, batch)
    np.testing.assert_array_equal(one_codes, many_codes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, many)


def test_perplexity_from_one_code_to_all():
    assert perplexity(jnp.full((4, 5), 3), 8) == (pytest.approx(1.0), 1)
    assert perplexity(jnp.arange(16).reshape(4, 4) % 8, 8) == (pytest.approx(8.0), 8)
    value, used = perplexity(jnp.array([0, 0, 0, 1]), 8)
    assert float(value) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert used == 2
