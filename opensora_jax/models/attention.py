"""Attention over tokens, behind one function.

Shape suffixes: B batch, N query tokens, S key tokens, H heads, K head size.
"""

import jax
import jax.numpy as jnp


def attention(
    q_BNHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, lengths_B: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(K)) v, softmax in float32 -> (B, N, H, K).

    Args:
      lengths_B: int32, valid keys of each example (the first ones), at least one; None means all.
    """
    return jax.lax.platform_dependent(
        q_BNHK, k_BSHK, v_BSHK, lengths_B, cpu=_attention_matmul, default=_attention_xla
    )


def _attention_xla(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def _attention_matmul(q, k, v, lengths):
    """Attention of which no matmul, backward neither, transposes an (N, S) matrix.

    XLA's CPU matmuls slow down by half on those; this takes half the time of `_attention_xla`.
    """
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return _heads_attention(*heads_first, lengths).swapaxes(1, 2)


@jax.custom_vjp
def _heads_attention(q_BHNK, k_BHSK, v_BHSK, lengths_B):
    return _forward(q_BHNK, k_BHSK, v_BHSK, lengths_B)[0]


def _transposed(x):
    return x.swapaxes(-1, -2)


def _matmul(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _forward(q, k, v, lengths):
    scores = _matmul(q, _transposed(k)) * q.shape[-1] ** -0.5
    if lengths is not None:
        valid = jnp.arange(k.shape[2]) < lengths[:, None, None, None]
        scores = jnp.where(valid, scores, -1e30)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = _matmul(weights.astype(v.dtype), v) / total
    return out.astype(q.dtype), (q, k, v, weights, total, out)


def _backward(saved, d_out):
    q, k, v, weights, total, out = saved
    scale = q.shape[-1] ** -0.5
    d_out = d_out / total
    # As for every softmax, d_scores = p (d_p - sum(p d_p)), and that sum is d_out . out.
    inner = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_scores = weights * (_matmul(d_out.astype(v.dtype), _transposed(v)) - inner) * scale
    d_scores = d_scores.astype(q.dtype)
    d_q = _matmul(d_scores, k)
    d_k = _transposed(_matmul(_transposed(q), d_scores))
    d_v = _transposed(_matmul(_transposed(d_out).astype(v.dtype), weights.astype(v.dtype)))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_heads_attention.defvjp(_forward, _backward)
