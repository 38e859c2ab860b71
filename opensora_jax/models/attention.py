"""Attention over tokens, behind one function.

Shape suffixes: B batch, N query tokens, S key tokens, H heads, K head size.
"""

import math

import jax
import jax.numpy as jnp

from opensora_jax import mesh

# The kind of device that each runs on; None: any.
BACKENDS = {"xla": None, "cudnn": "gpu", "splash": "tpu"}
NAMES = ("auto", *BACKENDS)


def choose(name: str, backend: str, *, head_size: int, dtype: jnp.dtype) -> str:
    """The implementation, a key of `BACKENDS`, that one of `NAMES` means for these heads.

    "auto" is the fastest that the backend (as of `jax.default_backend`) has: cuDNN's on GPUs,
    splash attention on TPUs, else plain XLA.

    Raises:
      ValueError: for an unknown name, or heads that cuDNN cannot do.
    """
    if name not in NAMES:
        raise ValueError(f"attention={name!r}: expected one of {', '.join(NAMES)}")
    cudnn_can = dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128
    if name == "cudnn" and not cudnn_can:
        raise ValueError(
            f"attention='cudnn': expected bfloat16 or float16 and a head size that is a multiple "
            f"of 8 up to 128, not {jnp.dtype(dtype).name} and {head_size}"
        )
    if name != "auto":
        return name
    if backend == "gpu" and cudnn_can:
        return "cudnn"
    return "splash" if backend == "tpu" else "xla"


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
    are sharded as well, heads and tokens swap places around the attention, so that every device has
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
        # The compiler cannot divide these kernels itself.
        kernel = {"cudnn": _cudnn, "splash": _splash}[implementation]
        out_BNHK = mesh.shard_map(kernel, *axes)(*args)
    out_BNHK = mesh.constrain(out_BNHK, *q_axes)
    return mesh.constrain(out_BNHK, *sharded)


def _cudnn(q, k, v, lengths=None):
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


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
    pad = -x_BNHK.shape[1] % block
    return jnp.pad(x_BNHK, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _xla(q, k, v, lengths=None):
    return jax.lax.platform_dependent(
        q, k, v, lengths, cpu=_attention_matmul, default=_attention_xla
    )


def _attention_xla(q, k, v, lengths):
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths)


def _attention_matmul(q_BNHK, k_BSHK, v_BSHK, lengths_B):
    """Attention of which no matmul, backward neither, transposes an (N, S) matrix.

    XLA's CPU matmuls slow down by half on those; this takes half the time of `_attention_xla`.
    The halves of a batch need nothing of each other, so that one's softmax runs beside the other's
    matmuls: 3% to 6% of a train step. A batch that is sharded over devices stays as it is.
    """
    n = min(2, len(q_BNHK)) if mesh.size() == 1 else 1

    def split(x_B):
        return [None] * n if x_B is None else jnp.array_split(x_B, n)

    parts = zip(*(split(x) for x in (q_BNHK, k_BSHK, v_BSHK, lengths_B)), strict=True)
    return jnp.concatenate(
        [
            _heads_attention(*(x.swapaxes(1, 2) for x in qkv), lengths).swapaxes(1, 2)
            for *qkv, lengths in parts
        ]
    )


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
