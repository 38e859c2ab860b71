"""Attention against its formula, written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax.models import attention as attention_lib
from opensora_jax.models.attention import attention


def by_formula(q, k, v, lengths):
    scores = jnp.einsum("bnhk,bshk->bhns", q, k) / np.sqrt(q.shape[-1])
    if lengths is not None:
        masked = jnp.arange(k.shape[1]) >= lengths[:, None, None, None]
        scores = jnp.where(masked, -jnp.inf, scores)
    return jnp.einsum("bhns,bshk->bnhk", jax.nn.softmax(scores, axis=-1), v)


@pytest.fixture(scope="module")
def arrays():
    """Queries, more keys and values than queries, and the gradient of the result."""
    shapes = ((3, 5, 3, 4), (3, 7, 3, 4), (3, 7, 3, 4), (3, 5, 3, 4))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True)]


def value_and_gradients(f, lengths, q, k, v, d_out):
    out, vjp = jax.vjp(lambda q, k, v: f(q, k, v, lengths), q, k, v)
    return out, *vjp(d_out)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("lengths", [None, (7, 1, 2), (3, 6, 7)])
def test_value_and_gradients_are_the_formula_s(arrays, lengths, batch):
    arrays = [x[:batch] for x in arrays]
    lengths = None if lengths is None else jnp.array(lengths[:batch], jnp.int32)
    found = value_and_gradients(attention, lengths, *arrays)
    expected = value_and_gradients(by_formula, lengths, *arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_large_scores_do_not_overflow(arrays):
    q, k, v, d_out = arrays
    for x in value_and_gradients(attention, None, 100 * q, 100 * k, v, d_out):
        assert np.isfinite(x).all()


def test_bfloat16_stays_bfloat16_and_close(arrays):
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    lengths = jnp.array([3, 6, 7], jnp.int32)
    found = value_and_gradients(attention, lengths, *halves)
    expected = value_and_gradients(by_formula, lengths, *(x.astype(jnp.float32) for x in halves))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        error = np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
        assert error < 0.02


@pytest.mark.parametrize(("n", "s"), [(6, 5), (5, 6), (5, 5), (4, 4)])
@pytest.mark.parametrize("with_lengths", [True, False])
def test_cudnn_gets_even_numbers_of_tokens_for_the_same_attention(n, s, with_lengths, monkeypatch):
    """Where there is no GPU, XLA computes what cuDNN is given."""
    q, k, v = (jax.random.normal(jax.random.key(i), (2, m, 3, 8)) for i, m in enumerate((n, s, s)))
    lengths = jnp.array([2, s], jnp.int32) if with_lengths else None
    given = []
    product = jax.nn.dot_product_attention

    def spy(q, k, v, **options):
        given.extend([q.shape[1], k.shape[1], v.shape[1]])
        return product(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    out = attention_lib._cudnn(q, k, v, lengths, implementation="xla")
    assert not any(size % 2 for size in given)
    np.testing.assert_allclose(out, attention(q, k, v, lengths), atol=1e-5)
