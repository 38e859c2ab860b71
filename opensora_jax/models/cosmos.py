"""The causal discrete video tokenizer of Cosmos-Tokenizer ("DV"): video <-> a grid of FSQ codes.

The same function as NVIDIA's (https://github.com/NVIDIA/Cosmos-Tokenizer, arXiv:2501.03575), so
that its checkpoints load (`opensora_jax.convert.cosmos`). No frame sees a later one: the first
frame stands alone, then latents stand for as many frames each as time is downsampled by, and an
image is a video of one frame.

Shape suffixes: B batch, T frames, H height, W width, C channels; lower case: the code grid.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.mesh import constrain
from opensora_jax.models import layers
from opensora_jax.models.conv import conv, fold
from opensora_jax.models.cpu import add_bias
from opensora_jax.models.fsq import FSQ

Size3 = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class CosmosConfig:
    """Which tokenizer: what a checkpoint has to say of its weights.

    Attributes:
      downsample: (frames a latent after the first, H/h, W/w), powers of two.
      levels: of the quantization, one number a dimension.
      channels: width of the first level.
      multipliers: width of each level over `channels`.
      n_res_blocks: residual blocks a level in the encoder; the decoder has one more.
      encoder_latents, decoder_latents: width of the encoder's output and of the decoder's input.
      patch: pixels and frames that the wavelets fold into channels, a power of two.
      attention_levels: the levels with attention after each block.
      n_frames: frames of the windows that long videos are cut into.

    Raises:
      ValueError: a downsampling that these levels and patches do not give.
    """

    downsample: Size3
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    channels: int = 128
    multipliers: tuple[int, ...] = (2, 4, 4)
    n_res_blocks: int = 2
    encoder_latents: int = 16
    decoder_latents: int = 16
    patch: int = 4
    attention_levels: tuple[int, ...] = ()
    n_frames: int = 17

    def __post_init__(self):
        for name in ("downsample", "levels", "multipliers", "attention_levels"):
            # JSON knows no tuples.
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        d, patch, n_levels = self.downsample, self.patch, len(self.multipliers)
        if patch < 1 or patch & (patch - 1):
            raise ValueError(f"patch={patch}: expected a power of two")
        if len(d) != 3 or any(n < 1 or n & (n - 1) for n in d) or d[1] != d[2]:
            raise ValueError(
                f"downsample={d}: expected three powers of two, height and width alike"
            )
        down, up = self._strides(), self._upsampling()
        expected = tuple(int(math.log2(n // patch)) if n >= patch else -1 for n in d[:2])
        for n in (down, up):
            if (sum(t for t, _ in n), sum(s for _, s in n)) != expected:
                raise ValueError(
                    f"downsample={d}: not what patches of {patch} and {n_levels} levels can give"
                )
        if (self.n_frames - 1) % d[0] or self.n_frames < 1:
            raise ValueError(f"n_frames={self.n_frames}: expected 1 and a multiple of {d[0]}")

    def _strides(self) -> list[tuple[bool, bool]]:
        """(in time, in space) of the encoder's downsamplings: the first levels'."""
        time, space = (math.log2(n) - math.log2(self.patch) for n in self.downsample[:2])
        return [(i < time, i < space) for i in range(len(self.multipliers) - 1)]

    def _upsampling(self) -> list[tuple[bool, bool]]:
        """(in time, in space) of the decoder's upsamplings, in their order."""
        time, space = (math.log2(n) - math.log2(self.patch) for n in self.downsample[:2])
        return [
            (0 < i < time + 1, 0 < i < time + 1 or (i < space and space > time))
            for i in range(len(self.multipliers) - 1)
        ]


class CausalConv(nnx.Module):
    """3-D convolution that sees the past only: the first frame is repeated before the video.

    Of stride 1 with as much padding in space as keeps the size, or of stride 2 in the axes where
    `stride` says so, with one more pixel at the end. Strided axes are folded into channels, as in
    `models.vqvae.Conv`.
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

    def __call__(self, x: jax.Array) -> jax.Array:
        x, w = x.astype(self.dtype), self.kernel[...]
        x = _repeat_first(x, w.shape[0] - 1)
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


def _repeat_first(x_BTHWC, n):
    first = jnp.broadcast_to(x_BTHWC[:, :1], (len(x_BTHWC), n, *x_BTHWC.shape[2:]))
    return jnp.concatenate([first, x_BTHWC], axis=1)


class FactorizedConv(nnx.Module):
    """A 3 x 3 convolution in space, then one of 3 frames in time."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.space = CausalConv(d_in, d_out, (1, 3, 3), rngs=rngs, dtype=dtype)
        self.time = CausalConv(d_out, d_out, (3, 1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.time(self.space(x))


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

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_1(jax.nn.silu(self.norm_1(x)))
        h = self.conv_2(jax.nn.silu(self.norm_2(h)))
        return (x if self.shortcut is None else self.shortcut(x)) + h


class Attention(nnx.Module):
    """One head among the positions of a frame, or, causally, among the frames of a position."""

    def __init__(self, width: int, *, in_time: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.norm = FrameNorm(width, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            CausalConv(width, width, (1, 1, 1), rngs=rngs, dtype=dtype) for _ in range(4)
        )
        self.in_time = in_time

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(x)
        b, t, height, width, c = x.shape

        def sequences(y):
            if self.in_time:
                return y.reshape(b, t, -1, c).swapaxes(1, 2).reshape(-1, t, 1, c)
            return y.reshape(b * t, height * width, 1, c)

        q, k, v = sequences(self.query(h)), sequences(self.key(h)), sequences(self.value(h))
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.in_time)
        if self.in_time:
            out = out.reshape(b, height * width, t, c).swapaxes(1, 2)
        return x + self.out(out.reshape(x.shape))


class AttentionPair(nnx.Module):
    """Attention in space, then in time."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.space = Attention(width, in_time=False, rngs=rngs, dtype=dtype)
        self.time = Attention(width, in_time=True, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.time(self.space(x))


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

    def __call__(self, x: jax.Array) -> jax.Array:
        if not (self.in_time or self.in_space):
            return x
        if self.in_space:
            b, t, h, w, c = x.shape
            mean = x.reshape(b, t, h // 2, 2, w // 2, 2, c).mean(axis=(3, 5))
            x = self.space(x) + mean
        if self.in_time:
            pairs = _repeat_first(x, 1)
            b, t, *rest = pairs.shape
            x = self.time(x) + pairs.reshape(b, t // 2, 2, *rest).mean(axis=2)
        return self.out(x)


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

    def __call__(self, x: jax.Array) -> jax.Array:
        if not (self.in_time or self.in_space):
            return x
        if self.in_time:
            x = jnp.repeat(x, 2, axis=1)[:, 1:]
            x = self.time(x) + x
        if self.in_space:
            x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
            x = self.space(x) + x
        return self.out(x)


class Middle(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.block_1 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)
        self.attention = AttentionPair(width, rngs=rngs, dtype=dtype)
        self.block_2 = ResidualBlock(width, width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block_2(self.attention(self.block_1(x)))


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

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[i](x)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    def __init__(self, config: CosmosConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        common = {"rngs": rngs, "dtype": dtype}
        c, last = config.channels, len(config.multipliers) - 1
        widths = [c, *(c * m for m in config.multipliers)]
        self.conv_in = FactorizedConv(3 * config.patch**3, c, **common)
        self.levels = nnx.List()
        for i, (w_in, w_out) in enumerate(itertools.pairwise(widths)):
            resample = None
            if i < last:
                in_time, in_space = config._strides()[i]
                resample = Downsample(w_out, in_time=in_time, in_space=in_space, **common)
            self.levels.append(
                Level(
                    [w_in] + [w_out] * config.n_res_blocks,
                    has_attention=i in config.attention_levels,
                    resample=resample,
                    **common,
                )
            )
        self.middle = Middle(widths[-1], **common)
        self.norm_out = FrameNorm(widths[-1], rngs=rngs)
        self.conv_out = FactorizedConv(widths[-1], config.encoder_latents, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x))))


class Decoder(nnx.Module):
    """Its levels are numbered as the encoder's, and run from the last to the first."""

    def __init__(self, config: CosmosConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        common = {"rngs": rngs, "dtype": dtype}
        widths = [config.channels * m for m in config.multipliers]
        self.conv_in = FactorizedConv(config.decoder_latents, widths[-1], **common)
        self.middle = Middle(widths[-1], **common)
        self.levels = nnx.List()
        for i, width in enumerate(widths):
            above = widths[min(i + 1, len(widths) - 1)]
            resample = None
            if i > 0:
                in_time, in_space = config._upsampling()[len(widths) - 1 - i]
                resample = Upsample(width, in_time=in_time, in_space=in_space, **common)
            self.levels.append(
                Level(
                    [above] + [width] * (config.n_res_blocks + 1),
                    has_attention=i in config.attention_levels,
                    resample=resample,
                    **common,
                )
            )
        self.norm_out = FrameNorm(widths[0], rngs=rngs)
        self.conv_out = FactorizedConv(widths[0], 3 * config.patch**3, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.middle(self.conv_in(x))
        for level in reversed(list(self.levels)):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Cosmos(nnx.Module):
    """Video (B, T, H, W, 3) in [-0.5, 0.5] <-> codes (B, t, h, w) int32, T = 1 + (t - 1) * k."""

    causal = True

    def __init__(self, config: CosmosConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        dim, common = len(config.levels), {"rngs": rngs, "dtype": dtype}
        self.encoder = Encoder(config, **common)
        self.pre_quant = CausalConv(config.encoder_latents, dim, (1, 1, 1), **common)
        self.post_quant = CausalConv(dim, config.decoder_latents, (1, 1, 1), **common)
        self.decoder = Decoder(config, **common)

    @property
    def downsample(self) -> Size3:
        """(frames a latent after the first, H/h, W/w)."""
        return self.config.downsample

    @property
    def n_frames(self) -> int:
        """Frames of the windows that long videos are cut into."""
        return self.config.n_frames

    @property
    def codebook(self) -> jax.Array:
        """(n_codes, dim) float32."""
        return self._fsq.codebook()

    @property
    def _fsq(self) -> FSQ:
        return FSQ(self.config.levels)

    def nearest(self, embeddings: jax.Array) -> jax.Array:
        """The codes (...) int32 whose embeddings are nearest to these (..., dim)."""
        return self._fsq.nearest(embeddings)

    def latents(self, video: jax.Array) -> jax.Array:
        """Encoder output before quantization, (B, t, h, w, dim) float32."""
        x = _repeat_first(2.0 * video, self.config.patch - 1)  # theirs are in [-1, 1]
        for _ in range(int(math.log2(self.config.patch))):
            x = _haar(x)
        return self.pre_quant(self.encoder(x)).astype(jnp.float32)

    def reconstruct(self, embeddings: jax.Array) -> jax.Array:
        """(B, t, h, w, dim) -> video (B, T, H, W, 3) float32."""
        x = self.decoder(self.post_quant(embeddings)).astype(jnp.float32)
        for _ in range(int(math.log2(self.config.patch))):
            x = _inverse_haar(x)
        return 0.5 * x[:, self.config.patch - 1 :]

    def encode(self, video: jax.Array) -> jax.Array:
        """Video (B, T, H, W, 3) in [-0.5, 0.5] -> codes (B, t, h, w) int32.

        Raises:
          ValueError: if T is not 1 + a multiple of its downsampling, or H or W not of theirs.
        """
        k, *space = self.downsample
        fits = video.ndim == 5 and video.shape[1] % k == 1 % k
        if not fits or any(n % d for n, d in zip(video.shape[2:4], space, strict=True)):
            raise ValueError(
                f"video of shape {video.shape}: expected (B, T, H, W, 3) with T 1 + a multiple of "
                f"{k}, and H, W multiples of {space}"
            )
        return self._fsq.quantize(self.latents(video))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Codes (B, t, h, w) -> video (B, T, H, W, 3) float32, about [-0.5, 0.5]."""
        return self.reconstruct(self._fsq.lookup(codes))


def _haar(x_BTHWC: jax.Array) -> jax.Array:
    """Means and half differences of pairs in time, height and width, as 8 C channels."""
    b, t, h, w, c = x_BTHWC.shape
    x = x_BTHWC.reshape(b, t // 2, 2, h // 2, 2, w // 2, 2, c)
    for axis in (2, 4, 6):
        first, second = jnp.split(x, 2, axis)
        x = jnp.concatenate([first + second, first - second], axis)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7) / 8.0
    return x.reshape(b, t // 2, h // 2, w // 2, 8 * c)


def _inverse_haar(x_BTHWC: jax.Array) -> jax.Array:
    """The inverse of `_haar`."""
    b, t, h, w, c = x_BTHWC.shape
    x = x_BTHWC.reshape(b, t, h, w, 2, 2, 2, c // 8).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    for axis in (2, 4, 6):
        low, high = jnp.split(x, 2, axis)
        x = jnp.concatenate([low + high, low - high], axis)
    return x.reshape(b, 2 * t, 2 * h, 2 * w, c // 8)
