"""Attention over tokens, behind one function.

Shape suffixes: B batch, N query tokens, S key tokens, H heads, K head size.
"""

import jax


def attention(
    q_BNHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, lengths_B: jax.Array | None = None
) -> jax.Array:
    """softmax(q k / sqrt(K)) v, softmax in float32 -> (B, N, H, K).

    Args:
      lengths_B: int32, valid keys of each example (the first ones); None means all.
    """
    return jax.nn.dot_product_attention(q_BNHK, k_BSHK, v_BSHK, key_value_seq_lengths=lengths_B)
