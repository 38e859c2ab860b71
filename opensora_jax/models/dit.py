"""The Diffusion Transformer (Peebles & Xie, arXiv:2212.09748) over a grid of video latents.

adaLN-Zero conditions on time and pooled text; text tokens come in by cross-attention or, in the
other mode, as part of the sequence ("in context"); queries and keys are normalized
(arXiv:2302.05442). Positions are 3-D rotary and, at the input, sinusoidal: with rotary ones alone,
which only tell distances, the tokens of a sample took far longer to agree on one scene.

Shape suffixes: B batch, T frames, H height, W width of the latents, C their channels; N video
tokens, S text tokens, D width, E text width; in attention H heads and K head size.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.mesh import constrain
from opensora_jax.models import attention as attention_lib
from opensora_jax.models import layers

# name -> (depth, width, heads), as in the paper.
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
TEXT_MODES = ("cross_attention", "in_context")

# What the backward pass finds saved: everything, only the outputs of matmuls (offload: in the
# host's memory), or block inputs.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

_zeros = nnx.initializers.zeros


class Attention(nnx.Module):
    """Multi-head attention; keys and values from `context`, or from x itself.

    Args:
      zero_init: start the output at zero, for a branch without a gate.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        qk_norm: bool,
        implementation: str,
        dtype: jnp.dtype,
        zero_init: bool = False,
    ):
        self.heads, self.implementation = heads, implementation
        to_heads = functools.partial(
            layers.Dense, width, width, axes=("embed", "heads"), rngs=rngs, dtype=dtype
        )
        self.query, self.key, self.value = to_heads(), to_heads(), to_heads()
        out_init = {"init": _zeros} if zero_init else {}
        self.out = layers.Dense(
            width, width, axes=("heads", "embed"), rngs=rngs, dtype=dtype, **out_init
        )
        norm = functools.partial(layers.RMSNorm, width // heads, axes=("norm",), rngs=rngs)
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None

    def __call__(
        self,
        x_BND: jax.Array,
        context_BSD: jax.Array | None = None,
        *,
        angles_NK: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
    ) -> jax.Array:
        source = x_BND if context_BSD is None else context_BSD

        def split(y):
            return y.reshape(*y.shape[:-1], self.heads, -1)

        q, k, v = split(self.query(x_BND)), split(self.key(source)), split(self.value(source))
        # Or TPUs would write these in float32, as the normalization wants them, and not in dtype.
        q, k = jax.lax.optimization_barrier((q, k))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles_NK is not None:
            q, k = layers.apply_rotary(q, angles_NK), layers.apply_rotary(k, angles_NK)
        out_BNHK = attention_lib.attention(
            q,
            k,
            v,
            lengths_B,
            implementation=self.implementation,
            sharded_keys=context_BSD is None,
        )
        return self.out(out_BNHK.reshape(x_BND.shape))


class MLP(nnx.Module):
    """Two dense layers with a GELU (tanh approximation) between."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        common = {"rngs": rngs, "dtype": dtype}
        self.up = layers.Dense(width, hidden, axes=("embed", "mlp"), **common)
        self.down = layers.Dense(hidden, width, axes=("mlp", "embed"), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def modulate(x_BND: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """Layer normalization with shift and scale given by the condition."""
    n = x_BND.shape[1]
    scale_BND, shift_BND = (
        layers.broadcast_to_tokens(1 + scale_BD, n),
        layers.broadcast_to_tokens(shift_BD, n),
    )
    return shard_tokens(layers.layer_normalize(x_BND) * scale_BND + shift_BND)


def split_modulation(modulation_BM: jax.Array, n: int) -> list[jax.Array]:
    """n shifts, scales and gates (B, D), each whole on every device."""
    return [constrain(part_BD, "batch", None) for part_BD in jnp.split(modulation_BM, n, axis=-1)]


def shard_tokens(x_BND: jax.Array) -> jax.Array:
    """x with examples and tokens sharded over devices and features whole."""
    return constrain(x_BND, "batch", "sequence", None)


class Block(nnx.Module):
    """Transformer block with adaLN-Zero, and cross-attention to text if `cross_attention`."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        qk_norm: bool,
        cross_attention: bool,
        implementation: str,
        mlp_ratio: float = 4.0,
        dtype: jnp.dtype = jnp.float32,
    ):
        common = {"rngs": rngs, "dtype": dtype}
        heads = {"heads": heads, "qk_norm": qk_norm, "implementation": implementation}
        self.attention = Attention(width, **heads, **common)
        self.cross_attention = (
            Attention(width, **heads, zero_init=True, **common) if cross_attention else None
        )
        self.mlp = MLP(width, int(width * mlp_ratio), **common)
        self.modulation = layers.Dense(
            width, 6 * width, axes=("embed", "modulation"), init=_zeros, **common
        )

    def __call__(
        self,
        x_BND: jax.Array,
        condition_BD: jax.Array,
        text_BSD: jax.Array | None = None,
        *,
        text_lengths_B: jax.Array | None = None,
        angles_NK: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
    ) -> jax.Array:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = split_modulation(
            self.modulation(jax.nn.silu(condition_BD)), 6
        )
        h = self.attention(
            modulate(x_BND, shift_a, scale_a), angles_NK=angles_NK, lengths_B=lengths_B
        )
        n = x_BND.shape[1]
        x_BND = shard_tokens(x_BND + layers.broadcast_to_tokens(gate_a, n) * h)
        if self.cross_attention is not None:
            h = self.cross_attention(
                shard_tokens(layers.layer_normalize(x_BND)), text_BSD, lengths_B=text_lengths_B
            )
            x_BND = shard_tokens(x_BND + h)
        h = self.mlp(modulate(x_BND, shift_m, scale_m))
        return shard_tokens(x_BND + layers.broadcast_to_tokens(gate_m, n) * h)


class DiT(nnx.Module):
    """Predicts from noisy latents, time and text; the output has `out_channels` a latent.

    Args:
      channels: C, channels of a latent.
      out_channels: channels of the prediction (twice C where a variance is learned).
      patch: p; a token is a (1, p, p) patch of latents.
      text_width: E, width of the text features.
      text_mode: one of `TEXT_MODES`.
      rotary, qk_norm: off only to reproduce facebookresearch/DiT's block.
      attention: one of `models.attention.NAMES`.
      remat: one of `REMAT_POLICIES`.
      unroll: blocks in a row that are compiled as one piece; more run faster and compile slower.
      dtype: compute; parameters are float32.
    """

    def __init__(
        self,
        *,
        depth: int,
        width: int,
        heads: int,
        channels: int,
        out_channels: int,
        patch: int,
        text_width: int,
        text_mode: str = "cross_attention",
        rotary: bool = True,
        qk_norm: bool = True,
        attention: str = "auto",
        remat: str = "none",
        unroll: int = 1,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        if text_mode not in TEXT_MODES:
            raise ValueError(f"text_mode={text_mode!r}: expected one of {', '.join(TEXT_MODES)}")
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat={remat!r}: expected one of {', '.join(REMAT_POLICIES)}")
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width={width}: expected an even multiple of heads={heads}")
        self.patch, self.heads, self.out_channels = patch, heads, out_channels
        self.text_mode, self.rotary, self.dtype = text_mode, rotary, dtype
        self.remat, self.unroll = remat, unroll
        implementation = attention_lib.choose(
            attention, jax.default_backend(), head_size=width // heads, dtype=dtype
        )
        common = {"rngs": rngs, "dtype": dtype}
        tokens = patch * patch
        normal = nnx.initializers.normal(0.02)
        self.patch_embedding = layers.Dense(
            tokens * channels, width, axes=("latent", "embed"), **common
        )
        self.time_in = layers.Dense(256, width, axes=("frequency", "embed"), init=normal, **common)
        self.time_out = layers.Dense(width, width, axes=(None, "embed"), init=normal, **common)
        self.null_text = layers.param(rngs, normal, (text_width,), ("text",))
        self.text_in = layers.Dense(text_width, width, axes=("text", "embed"), **common)
        self.pooled_in = layers.Dense(text_width, width, axes=("text", "embed"), **common)
        self.pooled_out = layers.Dense(width, width, axes=(None, "embed"), init=normal, **common)

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(
                width,
                heads,
                rngs=rngs,
                qk_norm=qk_norm,
                cross_attention=text_mode == "cross_attention",
                implementation=implementation,
                dtype=dtype,
            )

        self.blocks = stack(rngs)
        self.final_modulation = layers.Dense(
            width, 2 * width, axes=("embed", "modulation"), init=_zeros, **common
        )
        self.final = layers.Dense(
            width, tokens * out_channels, axes=("embed", "latent"), init=_zeros, **common
        )

    def __call__(
        self,
        x_BTHWC: jax.Array,
        time_B: jax.Array,
        text_BSE: jax.Array,
        text_lengths_B: jax.Array,
        drop_text_B: jax.Array | None = None,
    ) -> jax.Array:
        """Prediction (B, T, H, W, out_channels) float32.

        Args:
          x_BTHWC: noisy latents; H and W multiples of the patch.
          time_B: noise level on the scale of DiT's steps, 0 (clean) to 1000.
          text_BSE: text features; the first `text_lengths_B` of each row are valid.
          drop_text_B: bool, examples that see the learned null text instead of theirs.
        """
        _, t, h, w, _ = x_BTHWC.shape
        p = self.patch
        if h % p or w % p:
            raise ValueError(f"latents of {h}x{w}: expected multiples of the patch {p}")
        if drop_text_B is not None:
            null = self.null_text[...].astype(text_BSE.dtype)
            text_BSE = jnp.where(drop_text_B[:, None, None], null, text_BSE)
            text_lengths_B = jnp.where(drop_text_B, 1, text_lengths_B)

        text_BSE = layers.layer_normalize(text_BSE.astype(self.dtype))
        condition_BD = self._time(time_B) + self._pooled_text(text_BSE, text_lengths_B)
        condition_BD = constrain(condition_BD, "batch", None)
        text_BSD = constrain(self.text_in(text_BSE), "batch", None, None)
        x_BND = self.patch_embedding(_to_patches(x_BTHWC.astype(self.dtype), p))
        n, width = x_BND.shape[1:]
        tokens = (t, h // p, w // p)
        x_BND = x_BND + layers.sinusoidal_positions(tokens, width).astype(self.dtype)
        head_dim = width // self.heads
        angles_NK = layers.rotary_angles(tokens, head_dim) if self.rotary else None

        # In context, text follows video, so that the valid tokens of the sequence come first.
        in_context = self.text_mode == "in_context"
        if in_context:
            x_BND = jnp.concatenate([x_BND, text_BSD], axis=1)
            if angles_NK is not None:  # text does not turn
                angles_NK = jnp.pad(angles_NK, ((0, text_BSD.shape[1]), (0, 0)))
        x_BND = shard_tokens(x_BND)
        graph, blocks = nnx.split(self.blocks)

        def block(x_BND, weights):
            layer = nnx.merge(graph, weights)
            y_BND = layer(
                x_BND,
                condition_BD,
                None if in_context else text_BSD,
                text_lengths_B=None if in_context else text_lengths_B,
                angles_NK=angles_NK,
                lengths_B=n + text_lengths_B if in_context else None,
            )
            return y_BND, None

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        x_BND, _ = jax.lax.scan(block, x_BND, nnx.to_pure_dict(blocks), unroll=self.unroll)
        shift, scale = split_modulation(self.final_modulation(jax.nn.silu(condition_BD)), 2)
        out = self.final(modulate(x_BND[:, :n], shift, scale))
        return _from_patches(out, (t, h, w), p).astype(jnp.float32)

    def _time(self, time_B: jax.Array) -> jax.Array:
        embedding = layers.timestep_embedding(time_B, 256)
        return self.time_out(jax.nn.silu(self.time_in(embedding)))

    def _pooled_text(self, text_BSE: jax.Array, lengths_B: jax.Array) -> jax.Array:
        valid_BS = jnp.arange(text_BSE.shape[1]) < lengths_B[:, None]
        total = jnp.sum(text_BSE * valid_BS[..., None], axis=1)
        mean = total / jnp.maximum(lengths_B, 1)[:, None].astype(total.dtype)
        return self.pooled_out(jax.nn.silu(self.pooled_in(mean)))


def _to_patches(x_BTHWC: jax.Array, p: int) -> jax.Array:
    """(B, T, H, W, C) -> (B, N, p * p * C), tokens in the order time, height, width."""
    b, t, h, w, c = x_BTHWC.shape
    x = x_BTHWC.reshape(b, t, h // p, p, w // p, p, c)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(b, t * (h // p) * (w // p), p * p * c)


def _from_patches(x: jax.Array, grid: tuple[int, int, int], p: int) -> jax.Array:
    """The inverse of `_to_patches`."""
    t, h, w = grid
    x = x.reshape(x.shape[0], t, h // p, w // p, p, p, -1)
    return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(x.shape[0], t, h, w, x.shape[-1])
