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

from opensora_jax.models.causal import (
    CausalConv,
    Downsample,
    FactorizedConv,
    FrameNorm,
    Level,
    Middle,
    Upsample,
)
from opensora_jax.models.fsq import FSQ
from opensora_jax.models.past import Past
from opensora_jax.models.tokenizer import Size3, Tokenizer


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

    @property
    def n_codes(self) -> int:
        return math.prod(self.levels)

    @property
    def embedding_dim(self) -> int:
        return len(self.levels)

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

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.conv_in(x, past)
        for level in self.levels:
            x = level(x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(self.middle(x, past))), past)


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

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.middle(self.conv_in(x, past), past)
        for level in reversed(list(self.levels)):
            x = level(x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class Cosmos(Tokenizer):
    causal = True

    def __init__(self, config: CosmosConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        dim, common = len(config.levels), {"rngs": rngs, "dtype": dtype}
        self.encoder = Encoder(config, **common)
        self.pre_quant = CausalConv(config.encoder_latents, dim, (1, 1, 1), **common)
        self.post_quant = CausalConv(dim, config.decoder_latents, (1, 1, 1), **common)
        self.decoder = Decoder(config, **common)

    @property
    def quantizer(self) -> FSQ:
        return FSQ(self.config.levels)

    def latents(self, video: jax.Array, past: Past | None = None) -> jax.Array:
        """Encoder output before quantization, (B, t, h, w, dim) float32.

        A first chunk is of 1 + n * downsample[0] frames, the others of n * downsample[0].
        """
        past = past or Past()
        x = past.to_groups(2.0 * video, self.config.patch)  # theirs are in [-1, 1]
        for _ in range(int(math.log2(self.config.patch))):
            x = _haar(x)
        return self.pre_quant(self.encoder(x, past), past).astype(jnp.float32)

    def reconstruct(self, embeddings: jax.Array, past: Past | None = None) -> jax.Array:
        """(B, t, h, w, dim) -> video (B, T, H, W, 3) float32.

        A first chunk is of 1 + n latents, the others of n.
        """
        past = past or Past()
        x = self.decoder(self.post_quant(embeddings, past), past).astype(jnp.float32)
        for _ in range(int(math.log2(self.config.patch))):
            x = _inverse_haar(x)
        return 0.5 * past.from_groups(x, self.config.patch)


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
