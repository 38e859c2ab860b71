"""What only tunes CPUs, behind the names of what it computes; other devices get the plain form.

On CPUs XLA's reductions over rows are slow, a weight's gradient that contracts examples and tokens
runs at half the speed of one flat matmul, and batches of small products leave a core idle.

Shape suffixes: B batch, N tokens (queries), S key tokens, H heads, K head size, D features in, F
features out; of convolutions T, H, W positions, C features in.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax import mesh


def _by_platform(*args: jax.Array, cpu: Callable, default: Callable) -> jax.Array:
    # Examples and tokens that are both sharded would have to be gathered to lie flat.
    is_flat = mesh.size("context") == 1
    return jax.lax.platform_dependent(*args, cpu=cpu if is_flat else default, default=default)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _leading_axes(x: jax.Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


def _sum_by_matmul(rows_NF: jax.Array) -> jax.Array:
    ones_N = jnp.ones((rows_NF.shape[0],), rows_NF.dtype)
    return jnp.dot(ones_N, rows_NF, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def matmul(x: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    """x @ kernel over the last dimension of x."""
    return x @ kernel_DF


def kernel_gradient(x: jax.Array, dy: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The gradient (D, F) in `dtype` of the kernel of y = x @ kernel."""

    def contract(x, dy):
        axes = (_leading_axes(x), _leading_axes(dy))
        return jnp.tensordot(x, dy, axes, preferred_element_type=dtype)

    return _by_platform(
        x,
        dy,
        cpu=lambda x, dy: jnp.matmul(_flat(x).T, _flat(dy), preferred_element_type=dtype),
        default=contract,
    )


matmul.defvjp(
    lambda x, kernel: (matmul(x, kernel), (x, kernel)),
    lambda saved, dy: (dy @ saved[1].T, kernel_gradient(saved[0], dy, saved[1].dtype)),
)


@jax.custom_vjp
def add_bias(x: jax.Array, bias_F: jax.Array) -> jax.Array:
    """x + bias over the last dimension."""
    return x + bias_F


def _add_bias_backward(_, dy):
    dbias_F = _by_platform(
        dy,
        cpu=lambda dy: _sum_by_matmul(_flat(dy)),
        default=lambda dy: jnp.sum(dy, axis=_leading_axes(dy)),
    )
    return dy, dbias_F


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


@jax.custom_vjp
def mean_over_rows(x_NF: jax.Array) -> jax.Array:
    """Mean (F,) over the first dimension."""
    return _by_platform(
        x_NF,
        cpu=lambda x_NF: _sum_by_matmul(x_NF) / x_NF.shape[0],
        default=lambda x_NF: jnp.mean(x_NF, axis=0),
    )


mean_over_rows.defvjp(
    lambda x_NF: (mean_over_rows(x_NF), x_NF),
    lambda x_NF, dy_F: (jnp.broadcast_to(dy_F / x_NF.shape[0], x_NF.shape),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def broadcast_to_tokens(x_BD: jax.Array, n: int) -> jax.Array:
    """x for each of n tokens, (B, n, D)."""
    return jnp.broadcast_to(x_BD[:, None], (x_BD.shape[0], n, x_BD.shape[1]))


def _broadcast_to_tokens_backward(n, _, dy_BND):
    def sum_by_matmul(dy_BND):
        ones = jnp.ones((dy_BND.shape[0], 1, n), dy_BND.dtype)
        dx = jnp.matmul(ones, dy_BND, preferred_element_type=jnp.float32)
        return dx[:, 0].astype(dy_BND.dtype)

    return (
        jax.lax.platform_dependent(
            dy_BND, cpu=sum_by_matmul, default=lambda dy_BND: jnp.sum(dy_BND, axis=1)
        ),
    )


broadcast_to_tokens.defvjp(
    lambda x_BD, n: (broadcast_to_tokens(x_BD, n), None), _broadcast_to_tokens_backward
)


def attention(
    q_BNHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, lengths_B: jax.Array | None
) -> jax.Array:
    """softmax(q k / sqrt(K)) v of which no matmul, backward neither, transposes an (N, S) matrix.

    XLA's CPU matmuls slow down by half on those; this takes half the time of
    `jax.nn.dot_product_attention`. The halves of a batch need nothing of each other, so that one's
    softmax runs beside the other's matmuls: 3% to 6% of a train step. A batch that is sharded over
    devices stays as it is.
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
    return _attend(q_BHNK, k_BHSK, v_BHSK, lengths_B)[0]


def _transposed(x):
    return x.swapaxes(-1, -2)


def _product(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _attend(q, k, v, lengths):
    scores = _product(q, _transposed(k)) * q.shape[-1] ** -0.5
    if lengths is not None:
        valid = jnp.arange(k.shape[2]) < lengths[:, None, None, None]
        scores = jnp.where(valid, scores, -1e30)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    out = _product(weights.astype(v.dtype), v) / total
    return out.astype(q.dtype), (q, k, v, weights, total, out)


def _attend_backward(saved, d_out):
    q, k, v, weights, total, out = saved
    scale = q.shape[-1] ** -0.5
    d_out = d_out / total
    # As for every softmax, d_scores = p (d_p - sum(p d_p)), and that sum is d_out . out.
    inner = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_scores = weights * (_product(d_out.astype(v.dtype), _transposed(v)) - inner) * scale
    d_scores = d_scores.astype(q.dtype)
    d_q = _product(d_scores, k)
    d_k = _transposed(_product(_transposed(q), d_scores))
    d_v = _transposed(_product(_transposed(d_out).astype(v.dtype), weights.astype(v.dtype)))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_heads_attention.defvjp(_attend, _attend_backward)


class _Tile(NamedTuple):
    """Matrices that give neighbouring outputs along an axis: outputs @ (inputs @ x * taps @ w)."""

    outputs: list[list[float]]
    inputs: list[list[float]]
    taps: list[list[float]]


# By the number of taps: the outputs of a tile take one product for each input that they see.
_TILES = {
    1: _Tile([[1]], [[1]], [[1]]),
    2: _Tile(
        [[1, 1, 0], [0, 1, 1]],
        [[1, -1, 0], [0, 1, 0], [0, -1, 1]],
        [[1, 0], [1, 1], [0, 1]],
    ),
    3: _Tile(
        [[1, 1, 1, 0], [0, 1, -1, -1]],
        [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
        [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    ),
}


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Stride-1 correlation of x (B, T, H, W, C) with a kernel (kt, kh, kw, C, F), without padding.

    A batch of matmuls between the transforms of Winograd's minimal filtering (Lavin and Gray,
    arXiv:1509.09308): in float32 no less exact than XLA's convolution, with 2.4 to 3.4 times fewer
    multiplications, and two to five times as fast, gradients included.
    """
    dtype = x.dtype
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    c, f = kernel.shape[3:]
    for axis in range(3):
        # Of outputs far wider than the inputs the transforms would take most of the time.
        if kernel.shape[axis] not in _TILES or f > 4 * c:
            x, kernel = _taps_to_channels(x, kernel, axis)
    tiles = [_TILES[k] for k in kernel.shape[:3]]
    sizes = [len(tile.outputs) for tile in tiles]
    shape = [n - k + 1 for n, k in zip(x.shape[1:4], kernel.shape[:3], strict=True)]
    counts = [-(-n // size) for n, size in zip(shape, sizes, strict=True)]
    whole = [n * size for n, size in zip(counts, sizes, strict=True)]
    excess = [(0, n - m) for n, m in zip(whole, shape, strict=True)]
    x = jnp.pad(x, ((0, 0), *excess, (0, 0)))
    # Positions become (terms of T, of H, of W, B, tiles in T, in H, in W).
    for axis, (tile, count) in enumerate(zip(tiles, counts, strict=True)):
        seen = [_every(len(tile.outputs), x, i, count, axis - 4) for i in range(len(tile.inputs))]
        sums = [sum(a * y for a, y in zip(row, seen, strict=True) if a) for row in tile.inputs]
        x = jnp.stack(sums, axis)
    x = x.reshape(-1, *x.shape[3:])
    kernel = kernel.reshape(-1, *kernel.shape[3:])
    kernel = jnp.tensordot(_kron(*(tile.taps for tile in tiles)), kernel, 1)
    y = jnp.einsum("sbthwc,scf->sbthwf", x, kernel)
    y = jnp.tensordot(_kron(*(tile.outputs for tile in tiles)), y, 1)
    y = y.reshape(*sizes, *y.shape[1:]).transpose(3, 4, 0, 5, 1, 6, 2, 7)
    y = y.reshape(len(y), *whole, f)
    return y[:, : shape[0], : shape[1], : shape[2]].astype(dtype)


def _taps_to_channels(x, kernel, axis):
    """The same convolution with one tap along `axis`."""
    k = kernel.shape[axis]
    n = x.shape[axis + 1] - k + 1
    windows = [jax.lax.slice_in_dim(x, i, i + n, axis=axis + 1) for i in range(k)]
    kernel = jnp.concatenate(jnp.split(kernel, k, axis), axis=3)
    return jnp.concatenate(windows, axis=4), kernel


def _every(stride, x, start, count, axis):
    """`count` elements along `axis` from `start` on."""
    end = start + stride * (count - 1) + 1
    return jax.lax.slice_in_dim(x, start, end, stride, axis)


def _kron(*matrices):
    """What does to all axes, flattened, as each matrix does to its own."""
    return functools.reduce(np.kron, matrices).astype(np.float32)
