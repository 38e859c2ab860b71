"""The VQ-VAE of VideoGPT (Yan et al., arXiv:2104.10157): video <-> a (t, h, w) grid of codes.

The same function as the original, so that its checkpoints load (`opensora_jax.convert.videogpt`).

Shape suffixes: B batch, T frames, H height, W width, C channels; lower case: the code grid.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.mesh import constrain
from opensora_jax.models import layers
from opensora_jax.models.codebook import Codebook
from opensora_jax.models.conv import conv, fold, unfold
from opensora_jax.models.cpu import add_bias
from opensora_jax.models.fsq import FSQ
from opensora_jax.models.tokenizer import Size3, Tokenizer


def _same_padding(kernel: Size3, stride: Size3) -> list[tuple[int, int]]:
    return [((k - s + 1) // 2, (k - s) // 2) for k, s in zip(kernel, stride, strict=True)]


def _pad(x_BTHWC: jax.Array, padding: list[tuple[int, int]]) -> jax.Array:
    return jnp.pad(x_BTHWC, ((0, 0), *padding, (0, 0)))


class Conv(nnx.Module):
    """Same-padding 3-D convolution, strides 1 or 2.

    A strided axis is folded into channels first (space-to-depth): the same function as a stride-1
    convolution over cells, whose gradient XLA computes a hundred times faster on CPU and which
    fills a TPU's matrix unit better than three input channels do.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        kernel: int,
        stride: Size3 = (1, 1, 1),
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
    ):
        init = nnx.initializers.variance_scaling(
            scale, "fan_in", "truncated_normal", in_axis=(0, 1, 2, 3)
        )
        self.kernel = layers.param(
            rngs, init, (kernel,) * 3 + (d_in, d_out), (None, None, None, "conv_in", "conv_out")
        )
        zeros = nnx.initializers.zeros
        self.bias = layers.param(rngs, zeros, (d_out,), ("conv_out",)) if use_bias else None
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.kernel[...]
        x = _pad(x.astype(self.dtype), _same_padding(w.shape[:3], self.stride))
        for axis, s in enumerate(self.stride):
            if s == 2:
                x, w = fold(x, axis + 1, channel=4), fold(w, axis, channel=3)
        y = constrain(conv(constrain(x, ..., "conv_in"), w.astype(self.dtype)), ..., "conv_out")
        return y if self.bias is None else add_bias(y, self.bias[...].astype(self.dtype))


class ConvTranspose(nnx.Module):
    """Same-padding transposed 3-D convolution, kernel 4, strides 1 or 2.

    A strided axis is computed as a stride-1 convolution followed by depth-to-space.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        stride: Size3,
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        dtype: jnp.dtype = jnp.float32,
    ):
        # Each output is reached by 4 / stride taps an axis: that is the fan-in to scale by.
        taps = math.prod(4 // s for s in stride)
        init = nnx.initializers.truncated_normal(math.sqrt(scale / (taps * d_in)))
        axes = (None, None, None, "conv_in", "conv_out")
        self.kernel = layers.param(rngs, init, (4, 4, 4, d_in, d_out), axes)
        self.bias = layers.param(rngs, nnx.initializers.zeros, (d_out,), ("conv_out",))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.kernel[...]
        x = _pad(x.astype(self.dtype), _same_padding((4, 4, 4), self.stride))
        for axis, s in enumerate(self.stride):
            if s == 1:
                w = jnp.flip(w, axis)
            else:
                # Output 2q + r sees taps (3 - r, 1 - r) of two neighbouring inputs.
                pairs = w.reshape(*w.shape[:axis], 2, 2, *w.shape[axis + 1 :])
                w = fold(jnp.flip(pairs, axis).reshape(w.shape), axis, channel=4)
        y = constrain(conv(constrain(x, ..., "conv_in"), w.astype(self.dtype)), ..., "conv_out")
        for axis in reversed(range(3)):
            if self.stride[axis] == 2:
                y = unfold(y, axis + 1, channel=4)
                y = jax.lax.slice_in_dim(y, 1, y.shape[axis + 1] - 1, axis=axis + 1)
        return add_bias(y, self.bias[...].astype(self.dtype))


class AxialAttention(nnx.Module):
    """Two-head self-attention along one axis of (B, T, H, W, C)."""

    def __init__(self, width: int, axis: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        init = nnx.initializers.normal(width**-0.5)
        dense = {"init": init, "rngs": rngs, "dtype": dtype}
        self.query = layers.Dense(
            width, width, axes=("conv_in", "conv_out"), use_bias=False, **dense
        )
        self.key = layers.Dense(width, width, axes=("conv_in", "conv_out"), use_bias=False, **dense)
        self.value = layers.Dense(
            width, width, axes=("conv_in", "conv_out"), use_bias=False, **dense
        )
        self.out = layers.Dense(width, width, axes=("conv_out", "conv_in"), **dense)
        self.axis = axis

    def __call__(self, x: jax.Array) -> jax.Array:
        def heads(y):
            y = jnp.moveaxis(y, self.axis, 3)
            return y.reshape(-1, y.shape[3], 2, y.shape[4] // 2)

        q, k, v = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        out = jax.nn.dot_product_attention(q, k, v)
        shape = jnp.moveaxis(x, self.axis, 3).shape
        return self.out(jnp.moveaxis(out.reshape(shape), 3, self.axis))


class ResidualBlock(nnx.Module):
    """x + axial attention of a bottleneck convolution, each after batch norm and ReLU."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        conv = {"use_bias": False, "rngs": rngs, "dtype": dtype}
        self.norms = nnx.List(
            [layers.BatchNorm(c, axes=("conv_out",), rngs=rngs) for c in (width, width // 2, width)]
        )
        self.conv_3 = Conv(width, width // 2, 3, **conv)
        self.conv_1 = Conv(width // 2, width, 1, **conv)
        self.attention = nnx.List(
            [AxialAttention(width, axis, rngs=rngs, dtype=dtype) for axis in (1, 2, 3)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_3(jax.nn.relu(self.norms[0](x)))
        h = self.conv_1(jax.nn.relu(self.norms[1](h)))
        h = jax.nn.relu(self.norms[2](h))
        return x + sum(attention(h) for attention in self.attention)


class ResidualStack(nnx.Module):
    def __init__(self, width: int, depth: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.blocks = nnx.List([ResidualBlock(width, rngs=rngs, dtype=dtype) for _ in range(depth)])
        self.norm = layers.BatchNorm(width, axes=("conv_out",), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return jax.nn.relu(self.norm(x))


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    """Which VQ-VAE: what a checkpoint has to say of its weights.

    Attributes:
      n_codes: size of the codebook.
      embedding_dim: dimension of a code.
      n_hiddens: width of the networks.
      n_res_layers: residual blocks in the encoder and in the decoder.
      downsample: (T/t, H/h, W/w), powers of two.
      normalize_latents: scale the encoder's output to unit RMS at each position before it is
        quantized; keeps the codebook alive when training from scratch. VideoGPT has it off.
      n_frames: length of the videos it was trained on; longer ones are encoded in windows.
      levels: of each dimension of a code, for finite scalar quantization; (): a learned codebook.

    Raises:
      ValueError: a downsampling that is not made of strides of 2, or levels of other codes.
    """

    n_codes: int
    embedding_dim: int
    n_hiddens: int
    n_res_layers: int
    downsample: Size3
    normalize_latents: bool = False
    n_frames: int = 16
    levels: tuple[int, ...] = ()

    def __post_init__(self):
        # JSON knows no tuples.
        for name in ("downsample", "levels"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        d = self.downsample
        if len(d) != 3 or any(n < 1 or n & (n - 1) for n in d) or max(d) == 1:
            raise ValueError(f"downsample={d}: expected three powers of two, one of them above 1")
        if self.levels and (self.n_codes, self.embedding_dim) != (
            FSQ(self.levels).n_codes,
            len(self.levels),
        ):
            raise ValueError(
                f"levels={self.levels}: expected those of {self.n_codes} codes of "
                f"{self.embedding_dim} dimensions"
            )


class VQVAE(Tokenizer):
    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        n_hiddens, embedding_dim = config.n_hiddens, config.embedding_dim
        levels = [int(math.log2(d)) for d in config.downsample]
        strides = [tuple(2 if level > i else 1 for level in levels) for i in range(max(levels))]
        widths = [3] + [n_hiddens] * len(strides)
        common = {"rngs": rngs, "dtype": dtype}

        self.encoder_convs = nnx.List(
            [
                Conv(w_in, w_out, 4, stride, scale=2.0, **common)
                for w_in, w_out, stride in zip(widths, widths[1:], strides, strict=False)
            ]
        )
        self.encoder_last = Conv(n_hiddens, n_hiddens, 3, **common)
        self.encoder_stack = ResidualStack(n_hiddens, config.n_res_layers, **common)
        self.pre_vq = Conv(n_hiddens, embedding_dim, 1, **common)
        if config.levels:
            self.codebook_state = FSQ(config.levels)
        else:
            self.codebook_state = Codebook(config.n_codes, embedding_dim, rngs=rngs)
        self.post_vq = Conv(embedding_dim, n_hiddens, 1, **common)
        self.decoder_stack = ResidualStack(n_hiddens, config.n_res_layers, **common)
        # The original's decoder strides an axis in its first levels, not in its last.
        self.decoder_convs = nnx.List(
            [
                ConvTranspose(
                    n_hiddens,
                    3 if i == len(strides) - 1 else n_hiddens,
                    stride,
                    scale=0.02 if i == len(strides) - 1 else 2.0,
                    **common,
                )
                for i, stride in enumerate(strides)
            ]
        )

    @property
    def quantizer(self) -> Codebook | FSQ:
        return self.codebook_state

    def latents(self, video: jax.Array) -> jax.Array:
        """Encoder output before quantization, (B, t, h, w, embedding_dim) float32."""
        h = video
        for layer in self.encoder_convs:
            h = jax.nn.relu(layer(h))
        z = self.pre_vq(self.encoder_stack(self.encoder_last(h))).astype(jnp.float32)
        return layers.rms_normalize(z) if self.config.normalize_latents else z

    def reconstruct(self, embeddings: jax.Array) -> jax.Array:
        """(B, t, h, w, embedding_dim) -> video (B, T, H, W, 3) float32."""
        h = self.decoder_stack(self.post_vq(embeddings))
        for i, layer in enumerate(self.decoder_convs):
            h = layer(h if i == 0 else jax.nn.relu(h))
        return h.astype(jnp.float32)
