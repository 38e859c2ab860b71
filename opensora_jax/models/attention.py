"""Attention over tokens, behind one function.

Shape suffixes: B batch, N query tokens, S key tokens, H heads, K head size.
"""

import math

import jax
import jax.numpy as jnp

from opensora_jax import mesh
from opensora_jax.models import cpu

# The kind of device that each implementation runs on; None: any.
BACKENDS = {"xla": None, "cudnn": "gpu", "splash": "tpu"}
# What a configuration may say; auto: the fastest that there is.
NAMES = ("auto", *BACKENDS)


def cudnn_lacks(head_size: int, dtype: jnp.dtype, capability: str | None) -> str | None:
    """What cuDNN's attention would need, and does not get; None: nothing, it can be used.

    Args:
      capability: the GPU's compute capability, such as "8.0"; None: not known, taken for enough.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_size % 8 or head_size > 128:
        return f"a head size that is a multiple of 8 up to 128, not {head_size}"
    if capability is None:
        return None
    try:
        is_enough = float(capability) >= 8.0
    except ValueError:  # AMD's, gfx942 for instance
        is_enough = False
    if is_enough:
        return None
    return f"a GPU of compute capability 8.0 (Ampere) or more, not {capability}"


def attention(
    q_BNHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    lengths_B: jax.Array | None = None,
    *,
    implementation: str = "xla",
    sharded_keys: bool = False,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v, softmax in float32 -> (B, N, H, K).

    Queries come, and the result leaves, with tokens sharded over the mesh's context axis. If keys
    are sharded as well, heads and tokens swap axes around the attention, so that every device has
    whole sequences of some heads (DeepSpeed-Ulysses, arXiv:2309.14509).

    Args:
      lengths_B: int32, valid keys of each example (the first ones), at least one; None means all.
      implementation: a key of `BACKENDS`.
      sharded_keys: whether the keys' tokens are sharded as the queries' are.
    """
    sharded = ("batch", "sequence", "heads", None)
    if sharded_keys:
        q_BNHK, k_BSHK, v_BSHK = (mesh.constrain(x, *sharded) for x in (q_BNHK, k_BSHK, v_BSHK))
        q_axes = k_axes = ("batch", None, "swapped_heads", None)
    else:
        q_axes, k_axes = sharded, ("batch", None, "heads", None)
    args, axes = [q_BNHK, k_BSHK, v_BSHK], [q_axes, k_axes, k_axes]
    args = [mesh.constrain(x, *names) for x, names in zip(args, axes, strict=True)]
    if lengths_B is not None:
        args.append(lengths_B)
        axes.append(("batch",))
    if implementation == "xla":
        out_BNHK = _xla(*args)
    else:
        # The compiler cannot shard these kernels itself.
        kernel = {"cudnn": _cudnn, "splash": _splash}[implementation]
        out_BNHK = mesh.shard_map(kernel, *axes)(*args)
    out_BNHK = mesh.constrain(out_BNHK, *q_axes)
    return mesh.constrain(out_BNHK, *sharded)


def _cudnn(q_BNHK, k_BSHK, v_BSHK, lengths_B=None, implementation="cudnn"):
    (b, n), s = q_BNHK.shape[:2], k_BSHK.shape[1]
    if lengths_B is None and s % 2:
        lengths_B = jnp.full((b,), s, jnp.int32)
    # In training it takes even numbers of tokens only.
    q_BNHK, k_BSHK, v_BSHK = (_padded(x, 2) for x in (q_BNHK, k_BSHK, v_BSHK))
    out_BNHK = jax.nn.dot_product_attention(
        q_BNHK, k_BSHK, v_BSHK, key_value_seq_lengths=lengths_B, implementation=implementation
    )
    return out_BNHK[:, :n]


def _splash(q_BNHK, k_BSHK, v_BSHK, lengths_B=None, interpret=False):
    from jax.experimental.pallas.ops.tpu import splash_attention  # slow to import, TPUs only

    b, n, h, size = q_BNHK.shape
    s = k_BSHK.shape[1]
    block_q, block_kv = _block(n), _block(s)
    q_BHNK = _heads_first(q_BNHK * size**-0.5, block_q)
    k_BHSK, v_BHSK = _heads_first(k_BSHK, block_kv), _heads_first(v_BSHK, block_kv)
    padded_n, padded_s = q_BHNK.shape[2], k_BHSK.shape[2]
    if lengths_B is None and padded_s > s:
        lengths_B = jnp.full((b,), s, jnp.int32)
    segments = None
    if lengths_B is not None:
        # Queries see keys of their own segment, which only valid keys are in.
        segments = splash_attention.SegmentIds(
            q=jnp.ones((b, padded_n), jnp.int32),
            kv=(jnp.arange(padded_s) < lengths_B[:, None]).astype(jnp.int32),
        )
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([splash_attention.FullMask((padded_n, padded_s))] * h),
        block_sizes=splash_attention.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    out_BHNK = jax.vmap(kernel)(q_BHNK, k_BHSK, v_BHSK, segments)
    return out_BHNK[:, :, :n].transpose(0, 2, 1, 3)


def _block(n: int) -> int:
    """Tokens a block: as few blocks of at most 512 as cover n, in whole 128-lane registers."""
    return 128 * math.ceil(n / math.ceil(n / 512) / 128)


def _heads_first(x_BNHK: jax.Array, block: int) -> jax.Array:
    """(B, H, N, K) with N padded to a multiple of `block`."""
    return _padded(x_BNHK, block).transpose(0, 2, 1, 3)


def _padded(x_BNHK: jax.Array, multiple: int) -> jax.Array:
    """With zeros after the last token, so that there are a multiple of so many."""
    pad = -x_BNHK.shape[1] % multiple
    return jnp.pad(x_BNHK, ((0, 0), (0, pad), (0, 0), (0, 0))) if pad else x_BNHK


def _xla(q, k, v, lengths=None):
    return jax.lax.platform_dependent(q, k, v, lengths, cpu=cpu.attention, default=_attention_xla)


def _attention_xla(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)
