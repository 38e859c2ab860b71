"""Building blocks shared by the networks.

Every parameter is made by `param`, which writes its logical axes beside its initializer; the rule
table in `opensora_jax.mesh` turns them into shardings.

Shape suffixes: B batch, N tokens, D features in, F features out, K head size.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax import mesh
from opensora_jax.mesh import constrain
from opensora_jax.models.cpu import add_bias, kernel_gradient, matmul, mean_over_rows

Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype], jax.Array]
Axes = tuple[str | None, ...]

xavier = nnx.initializers.xavier_uniform()


def param(rngs: nnx.Rngs, init: Initializer, shape: Sequence[int], axes: Axes) -> nnx.Param:
    """A float32 parameter of `shape` with one logical axis name (or None) a dimension.

    Raises:
      ValueError: if there are not as many axes as dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes={axes}: expected one name for each dimension of shape {shape}")
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32), axes=axes)


class BatchNorm(nnx.Module):
    """Batch norm over all but the last dimension, across all devices; statistics in float32.

    Running averages move by a tenth a step and hold the unbiased variance, as in PyTorch.
    `train()` and `eval()` of the model choose between batch and running statistics.
    """

    def __init__(self, features: int, *, axes: Axes, rngs: nnx.Rngs, eps: float = 1e-5):
        self.scale = param(rngs, nnx.initializers.ones, (features,), axes)
        self.bias = param(rngs, nnx.initializers.zeros, (features,), axes)
        self.mean = nnx.BatchStat(jnp.zeros((features,)))
        self.var = nnx.BatchStat(jnp.ones((features,)))
        self.eps, self.use_running_average = eps, False

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        n = rows.shape[0]
        if self.use_running_average:
            mean, var = self.mean[...], self.var[...]
        else:
            mean = mean_over_rows(rows)
            var = mean_over_rows((rows - mean) ** 2)
            for average, new in ((self.mean, mean), (self.var, var * (n / max(n - 1, 1)))):
                average[...] = 0.9 * average[...] + 0.1 * jax.lax.stop_gradient(new)
        y = (rows - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...])
        return add_bias(y, self.bias[...]).reshape(x.shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul_for(x: jax.Array, weight_DF: jax.Array, kernel_DF: jax.Array, axes: Axes) -> jax.Array:
    """x @ weight, whose gradient goes to the kernel that the weight is of, in the kernel's dtype:
    devices that each have a part of it sum it in that."""
    return matmul(x, weight_DF)


def _matmul_for_backward(axes, saved, dy):
    x, weight_DF = saved
    dkernel_DF = kernel_gradient(x, dy, jnp.float32)
    return dy @ weight_DF.T, None, constrain(dkernel_DF, *axes, rules=mesh.PARAMETER_RULES)


_matmul_for.defvjp(
    lambda x, weight, kernel, axes: (matmul(x, weight), (x, weight)), _matmul_for_backward
)


class Dense(nnx.Module):
    """y = x @ kernel + bias over the last dimension.

    Args:
      reduce_dtype: in which gradients are summed over tokens and devices; None: `dtype`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: Axes,
        rngs: nnx.Rngs,
        init: Initializer = xavier,
        use_bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        reduce_dtype: jnp.dtype | None = None,
    ):
        self.kernel = param(rngs, init, (d_in, d_out), axes)
        zeros = nnx.initializers.zeros
        self.bias = param(rngs, zeros, (d_out,), axes[1:]) if use_bias else None
        self.axes, self.dtype, self.reduce_dtype = axes, dtype, reduce_dtype or dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        # Features are sharded as the kernel is over tensor.
        x = constrain(x.astype(self.dtype), ..., self.axes[0])
        weight = mesh.gather(self.kernel[...].astype(self.dtype), self.axes)
        if self.reduce_dtype == self.dtype:
            y = matmul(x, weight)
        else:
            y = _matmul_for(x, weight, self.kernel[...], self.axes)
        y = constrain(y, ..., self.axes[1])
        if self.bias is None:
            return y
        wide = self.reduce_dtype
        return add_bias(y.astype(wide), self.bias[...].astype(wide)).astype(self.dtype)


class MLP(nnx.Module):
    """Two dense layers with a GELU (tanh approximation) between."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, **dtypes: jnp.dtype | None):
        common = {"rngs": rngs, **dtypes}
        self.up = Dense(width, hidden, axes=("embed", "mlp"), **common)
        self.down = Dense(hidden, width, axes=("mlp", "embed"), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def rms_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x over its root mean square on the last dimension, computed in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


def layer_normalize(x: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Layer normalization without scale or shift, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization with a learned scale (arXiv:1910.07467).

    Args:
      reduce_dtype: in which gradients are summed over tokens and devices; None: that of x.
    """

    def __init__(
        self,
        features: int,
        *,
        axes: Axes,
        rngs: nnx.Rngs,
        reduce_dtype: jnp.dtype | None = None,
    ):
        self.scale = param(rngs, nnx.initializers.ones, (features,), axes)
        self.reduce_dtype = reduce_dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = self.reduce_dtype or x.dtype
        return (rms_normalize(x).astype(wide) * self.scale[...].astype(wide)).astype(x.dtype)


def timestep_embedding(t_B: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal embedding (B, width), cosines first, float32 (facebookresearch/DiT, GLIDE)."""
    half = width // 2
    frequency = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = t_B.astype(jnp.float32)[:, None] * frequency
    embedding = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))


def sinusoidal_positions(
    grid: tuple[int, int, int], width: int, extent: tuple[int, int, int] | None = None
) -> jax.Array:
    """Fixed embedding (N, width) of absolute positions in a (T, H, W) grid of tokens, float32.

    Time, height and width get a third of the channels each, what is left over being zero.

    Args:
      extent: (T, H, W) that the grid is stretched to, so that the same place of a video is the same
        in any size; None: positions are as they are.
    """
    each = width // 6 * 2

    def centers(n, n_extent):
        positions = jnp.arange(n, dtype=jnp.float32)
        return positions if n == n_extent else (positions + 0.5) * (n_extent / n) - 0.5

    along = [centers(*sizes) for sizes in zip(grid, extent or grid, strict=True)]
    positions = jnp.meshgrid(*along, indexing="ij")
    parts = [timestep_embedding(p.reshape(-1), each, max_period=100.0) for p in positions]
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width - 3 * each)))


def rotary_angles(grid: tuple[int, int, int], head_dim: int, base: float = 100.0) -> jax.Array:
    """Angles (N, head_dim // 2) of 3-D rotary positions for a (T, H, W) grid of tokens.

    The pairs of a head are sharded over time, height and width, what is left over going to time
    (RoFormer, arXiv:2104.09864, one axis at a time). `base` is small because grids are short.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    counts = (pairs - 2 * spatial, spatial, spatial)
    positions = jnp.meshgrid(*[jnp.arange(n, dtype=jnp.float32) for n in grid], indexing="ij")
    angles = [
        p.reshape(-1, 1) * base ** (-jnp.arange(c, dtype=jnp.float32) / max(c, 1))
        for p, c in zip(positions, counts, strict=True)
    ]
    return jnp.concatenate(angles, axis=-1)


def apply_rotary(x_BNHK: jax.Array, angles_NK: jax.Array) -> jax.Array:
    """Rotates each pair (x[i], x[i + K/2]) of the first len(angles) tokens; the rest are as is."""
    n = angles_NK.shape[0]
    cos, sin = jnp.cos(angles_NK)[:, None], jnp.sin(angles_NK)[:, None]
    rotated, rest = x_BNHK[:, :n].astype(jnp.float32), x_BNHK[:, n:]
    a, b = jnp.split(rotated, 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BNHK.dtype), rest], axis=1)


def to_patches(x_BTHWC: jax.Array, p: int) -> jax.Array:
    """(B, T, H, W, C) -> (B, N, p * p * C), tokens in the order time, height, width."""
    b, t, h, w, c = x_BTHWC.shape
    x = x_BTHWC.reshape(b, t, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t * (h // p) * (w // p), p * p * c)


def from_patches(x: jax.Array, grid: tuple[int, int, int], p: int) -> jax.Array:
    """The inverse of `to_patches`."""
    t, h, w = grid
    x = x.reshape(x.shape[0], t, h // p, w // p, p, p, -1)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(x.shape[0], t, h, w, x.shape[-1])
