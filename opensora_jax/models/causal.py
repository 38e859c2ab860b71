"""The blocks of causal video tokenizers (`models.cosmos`): no frame sees a later one.

All take a `Past`, so that a video can be computed in chunks, each going on where the last stopped.

Shape suffixes: B batch, T frames, H height, W width, C channels.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.mesh import constrain
from opensora_jax.models import layers
from opensora_jax.models.conv import conv, fold
from opensora_jax.models.cpu import add_bias
from opensora_jax.models.past import Past
from opensora_jax.models.tokenizer import Size3


class CausalConv(nnx.Module):
    """3-D convolution that sees the past only: the first frame is repeated before the video.

    Of stride 1 with as much padding in space as keeps the size, or of stride 2 in the axes where
    `stride` says so, with one more pixel at the end and frames in pairs. Strided axes are folded
    into channels, as in `models.vqvae.Conv`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: Size3,
        stride: Size3 = (1, 1, 1),
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        init = nnx.initializers.variance_scaling(
            1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2, 3)
        )
        axes = (None, None, None, "conv_in", "conv_out")
        self.kernel = layers.param(rngs, init, (*kernel, d_in, d_out), axes)
        self.bias = layers.param(rngs, nnx.initializers.zeros, (d_out,), ("conv_out",))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x, w = x.astype(self.dtype), self.kernel[...]
        x = past.extend(x, w.shape[0] - self.stride[0])
        for axis, s in enumerate(self.stride):
            k = w.shape[axis]
            before, after = (0, 0) if axis == 0 else ((k - 1) // 2, (k - 1) // 2)
            if s == 2:
                # A tap of nothing makes the kernel whole cells.
                w = _pad(w, axis, 0, 1)
                before, after = (0, 1) if axis == 0 else (0, 2)
            x = _pad(x, axis + 1, before, after)
            if s == 2:
                x, w = fold(x, axis + 1, channel=4), fold(w, axis, channel=3)
        y = constrain(conv(constrain(x, ..., "conv_in"), w.astype(self.dtype)), ..., "conv_out")
        return add_bias(y, self.bias[...].astype(self.dtype))


def _pad(x, axis, before, after):
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


class FactorizedConv(nnx.Module):
    """A 3 x 3 convolution in space, then one of 3 frames in time."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.space = CausalConv(d_in, d_out, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.time = CausalConv(d_out, d_out, (3, 1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        return self.time(self.space(x, past), past)


class FrameNorm(nnx.Module):
    """Each frame normalized over its positions and channels, then scaled and shifted."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.scale = layers.param(rngs, nnx.initializers.ones, (channels,), ("conv_out",))
        self.bias = layers.param(rngs, nnx.initializers.zeros, (channels,), ("conv_out",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=(2, 3, 4), keepdims=True)
        x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=(2, 3, 4), keepdims=True) + 1e-6)
        return (x32 * self.scale[...] + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm_1 = FrameNorm(d_in, rngs=rngs)
        self.conv_1 = FactorizedConv(d_in, d_out, rngs=rngs, dtype=dtype)
        self.norm_2 = FrameNorm(d_out, rngs=rngs)
        self.conv_2 = FactorizedConv(d_out, d_out, rngs=rngs, dtype=dtype)
        self.shortcut = (
            None if d_in == d_out else CausalConv(d_in, d_out, (1, 1, 1), rngs=rngs, dtype=dtype)
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)), past)
        h = self.conv_2(jax.nn.silu(self.norm_2(h)), past)
        return (x if self.shortcut is None else self.shortcut(x, past)) + h


class Attention(nnx.Module):
    """One head among the positions of a frame, or, causally, among the frames of a position."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = FrameNorm(width, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            CausalConv(width, width, (1, 1, 1), rngs=rngs, dtype=dtype) for _ in range(4)
        )
        self.in_time = in_time

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        h = self.norm(x)
        b, t, height, width, c = x.shape

        def sequences(y):
            if self.in_time:
                return y.reshape(b, t, -1, c).swapaxes(1, 2).reshape(-1, t, 1, c)
            return y.reshape(b * t, height * width, 1, c)

        q, k, v = (sequences(f(h, past)) for f in (self.query, self.key, self.value))
        seen = None
        if self.in_time:
            (k, start), (v, _) = past.gather(k), past.gather(v)
            seen = jnp.arange(k.shape[1]) <= start + jnp.arange(t)[:, None]
            seen = seen[None, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen)
        if self.in_time:
            out = out.reshape(b, height * width, t, c).swapaxes(1, 2)
        return x + self.out(out.reshape(x.shape), past)


class AttentionPair(nnx.Module):
    """Attention in space, then in time."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.space = Attention(width, in_time=False, rngs=rngs, dtype=dtype)
        self.time = Attention(width, in_time=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        return self.time(self.space(x, past), past)


class Downsample(nnx.Module):
    """Halves space, time, both or nothing: convolutions plus averages."""

    def __init__(
        self, width: int, *, in_time: bool, in_space: bool, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        common = {"rngs": rngs, "dtype": dtype}
        # All three have weights, used or not.
        self.space = CausalConv(width, width, (1, 3, 3), (1, 2, 2), **common)
        self.time = CausalConv(width, width, (3, 1, 1), (2, 1, 1), **common)
        self.out = CausalConv(width, width, (1, 1, 1), **common)
        self.in_time, self.in_space = in_time, in_space

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        if not (self.in_time or self.in_space):
            return x
        if self.in_space:
            b, t, h, w, c = x.shape
            mean = x.reshape(b, t, h // 2, 2, w // 2, 2, c).mean(axis=(3, 5))
            x = self.space(x, past) + mean
        if self.in_time:
            pairs = past.to_groups(x, 2)
            b, t, *rest = pairs.shape
            x = self.time(pairs, past) + pairs.reshape(b, t // 2, 2, *rest).mean(axis=2)
        return self.out(x, past)


class Upsample(nnx.Module):
    """Doubles time (but for the first frame), space, both or nothing."""

    def __init__(
        self, width: int, *, in_time: bool, in_space: bool, rngs: nnx.Rngs, dtype: jnp.dtype
    ):
        common = {"rngs": rngs, "dtype": dtype}
        self.time = CausalConv(width, width, (3, 1, 1), **common)
        self.space = CausalConv(width, width, (1, 3, 3), **common)
        self.out = CausalConv(width, width, (1, 1, 1), **common)
        self.in_time, self.in_space = in_time, in_space

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        if not (self.in_time or self.in_space):
            return x
        if self.in_time:
            x = past.from_groups(jnp.repeat(x, 2, axis=1), 2)
            x = self.time(x, past) + x
        if self.in_space:
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = self.space(x, past) + x
        return self.out(x, past)


class Middle(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.block_1 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)
        self.attention = AttentionPair(width, rngs=rngs, dtype=dtype)
        self.block_2 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x, past), past), past)


class Level(nnx.Module):
    """Residual blocks, each with attention where the level has it, then a change of size."""

    def __init__(
        self,
        widths: list[int],
        *,
        has_attention: bool,
        resample: nnx.Module | None,
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        pairs = list(itertools.pairwise(widths))
        self.blocks = nnx.List([ResidualBlock(*pair, rngs=rngs, dtype=dtype) for pair in pairs])
        self.attention = nnx.List(
            [AttentionPair(w, rngs=rngs, dtype=dtype) for _, w in pairs if has_attention]
        )
        self.resample = resample

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x = block(x, past)
            if self.attention:
                x = self.attention[i](x, past)
        return x if self.resample is None else self.resample(x, past)
