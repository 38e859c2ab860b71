"""The Diffusion Transformer (Peebles & Xie, arXiv:2212.09748) over a grid of video latents.

adaLN-Zero conditions on time and pooled text; text tokens come in by cross-attention or, in the
other mode, as part of the sequence ("in context"); queries and keys are normalized
(arXiv:2302.05442). Positions are 3-D rotary and, at the input, sinusoidal: with rotary ones alone,
which only tell distances, the tokens of a sample took far longer to agree on one scene.

Shape suffixes: B batch, T frames, H height, W width of the latents, C their channels; N video
tokens, S text tokens, D width, E text width; in attention H heads and K head size.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.mesh import constrain
from opensora_jax.models import attention as attention_lib
from opensora_jax.models import layers
from opensora_jax.models.cpu import broadcast_to_tokens

# name -> (depth, width, heads), as in the paper.
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
TEXT_MODES = ("cross_attention", "in_context")
CONDITIONINGS = ("text", "frames")

# Ratio of the MLP's hidden width to the width, and features of the embedding of time: the paper's.
MLP_RATIO = 4
TIME_FEATURES = 256

# What the backward pass finds saved: everything, only the outputs of matmuls (offload: in the
# host's memory), or block inputs.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

_zeros = nnx.initializers.zeros


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Which DiT: what a checkpoint has to say of its weights.

    Attributes:
      channels: C, channels of a latent.
      out_channels: channels of the prediction (twice C where a variance is learned).
      patch: p; a token is a (1, p, p) patch of latents.
      text_width: E, width of the text features.
      text_mode: one of `TEXT_MODES`.
      n_codes: of which a last layer makes the logits; None: there is none.
      conditioning: one of `CONDITIONINGS`, what is known of a sample: its text, or frames as well.
      extent: (T, H, W) tokens that grids of all sizes are stretched to where the network is told
        absolute positions; None: it is told them as they are, of one size.

    Raises:
      ValueError: an unknown text mode or conditioning, or a width that is no even multiple of the
        heads.
    """

    depth: int
    width: int
    heads: int
    channels: int
    out_channels: int
    patch: int
    text_width: int
    text_mode: str = "cross_attention"
    extent: tuple[int, int, int] | None = None
    n_codes: int | None = None
    conditioning: str = "text"

    def __post_init__(self):
        for name, known in (("text_mode", TEXT_MODES), ("conditioning", CONDITIONINGS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width}: expected an even multiple of heads={self.heads}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def in_channels(self) -> int:
        """Channels that go in: of noisy latents, or of these, clean ones and which are known."""
        return self.channels if self.conditioning == "text" else 2 * self.channels + 1


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a DiT is computed, which changes its numbers by no more than rounding.

    Attributes:
      dtype: of the computation; parameters are float32.
      attention: a key of `models.attention.BACKENDS`.
      remat: a key of `REMAT_POLICIES`.
      unroll: blocks in a row that are compiled as one piece; more run faster and compile slower.
      reduce_dtype: in which gradients are summed over tokens and devices; None: `dtype`.
    """

    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1
    reduce_dtype: jnp.dtype | None = None

    @property
    def dtypes(self) -> dict[str, jnp.dtype | None]:
        """What every module with weights is told."""
        return {"dtype": self.dtype, "reduce_dtype": self.reduce_dtype}


PLAIN = Execution()


class Attention(nnx.Module):
    """Multi-head attention; keys and values from `context`, or from x itself.

    Args:
      implementation: a key of `models.attention.BACKENDS`.
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
        zero_init: bool = False,
        **dtypes: jnp.dtype | None,
    ):
        self.heads, self.implementation = heads, implementation
        to_heads = functools.partial(
            layers.Dense, width, width, axes=("embed", "heads"), rngs=rngs, **dtypes
        )
        self.query, self.key, self.value = to_heads(), to_heads(), to_heads()
        out_init = {"init": _zeros} if zero_init else {}
        self.out = layers.Dense(
            width, width, axes=("heads", "embed"), rngs=rngs, **dtypes, **out_init
        )
        norm = functools.partial(
            layers.RMSNorm,
            width // heads,
            axes=("norm",),
            rngs=rngs,
            reduce_dtype=dtypes.get("reduce_dtype"),
        )
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


def modulate(x_BND: jax.Array, shift_BND: jax.Array, scale_BND: jax.Array) -> jax.Array:
    """Layer normalization with shift and scale given by the condition."""
    return shard_tokens(layers.layer_normalize(x_BND) * (1 + scale_BND) + shift_BND)


def shard_tokens(x_BND: jax.Array) -> jax.Array:
    """x with examples and tokens sharded over devices and features whole."""
    return constrain(x_BND, "batch", "sequence", None)


class Modulation(layers.Dense):
    """adaLN-Zero: n shifts, scales and gates, each (B, N, D) and zero at first, of a condition."""

    def __init__(self, width: int, n: int, *, rngs: nnx.Rngs, **dtypes: jnp.dtype | None):
        axes = ("embed", "modulation")
        super().__init__(width, n * width, axes=axes, init=_zeros, rngs=rngs, **dtypes)
        self.n = n

    def __call__(self, condition_BD: jax.Array, n_tokens: int) -> list[jax.Array]:
        parts = jnp.split(super().__call__(jax.nn.silu(condition_BD)), self.n, axis=-1)
        # Each is whole on every device.
        parts = [constrain(part_BD, "batch", None) for part_BD in parts]
        return [broadcast_to_tokens(part_BD, n_tokens) for part_BD in parts]


class Block(nnx.Module):
    """Transformer block with adaLN-Zero, and cross-attention to text if `cross_attention`.

    Args:
      qk_norm: off only to reproduce facebookresearch/DiT's block.
      dtypes: `Execution.dtypes`, as for what it is made of.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        cross_attention: bool,
        implementation: str = "xla",
        qk_norm: bool = True,
        **dtypes: jnp.dtype | None,
    ):
        common = {"rngs": rngs, **dtypes}
        attention = {"qk_norm": qk_norm, "implementation": implementation, **common}
        self.attention = Attention(width, heads, **attention)
        self.cross_attention = (
            Attention(width, heads, zero_init=True, **attention) if cross_attention else None
        )
        self.mlp = layers.MLP(width, MLP_RATIO * width, **common)
        self.modulation = Modulation(width, 6, **common)

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
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(
            condition_BD, x_BND.shape[1]
        )
        h_BND = self.attention(
            modulate(x_BND, shift_a, scale_a), angles_NK=angles_NK, lengths_B=lengths_B
        )
        x_BND = shard_tokens(x_BND + gate_a * h_BND)
        if self.cross_attention is not None:
            h_BND = shard_tokens(layers.layer_normalize(x_BND))
            h_BND = self.cross_attention(h_BND, text_BSD, lengths_B=text_lengths_B)
            x_BND = shard_tokens(x_BND + h_BND)
        h_BND = self.mlp(modulate(x_BND, shift_m, scale_m))
        return shard_tokens(x_BND + gate_m * h_BND)


class DiT(nnx.Module):
    """Predicts from noisy latents, time and text; the output has `out_channels` a latent."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs, execution: Execution = PLAIN):
        self.config, self.execution = config, execution
        c, width = config, config.width
        common = {"rngs": rngs, **execution.dtypes}
        normal = nnx.initializers.normal(0.02)
        self.patch_embedding = layers.Dense(
            c.patch**2 * c.in_channels, width, axes=("latent", "embed"), **common
        )
        self.time_in = layers.Dense(
            TIME_FEATURES, width, axes=("frequency", "embed"), init=normal, **common
        )
        self.time_out = layers.Dense(width, width, axes=(None, "embed"), init=normal, **common)
        self.null_text = layers.param(rngs, normal, (c.text_width,), ("text",))
        self.text_in = layers.Dense(c.text_width, width, axes=("text", "embed"), **common)
        self.pooled_in = layers.Dense(c.text_width, width, axes=("text", "embed"), **common)
        self.pooled_out = layers.Dense(width, width, axes=(None, "embed"), init=normal, **common)

        @nnx.split_rngs(splits=c.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Block(
                width,
                c.heads,
                rngs=rngs,
                cross_attention=c.text_mode == "cross_attention",
                implementation=execution.attention,
                **execution.dtypes,
            )

        self.blocks = stack(rngs)
        self.final_modulation = Modulation(width, 2, **common)
        self.final = layers.Dense(
            width, c.patch**2 * c.out_channels, axes=("embed", "latent"), init=_zeros, **common
        )
        self.code_head = (
            layers.Dense(c.out_channels, c.n_codes, axes=("latent", "code"), **common)
            if c.n_codes
            else None
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
          x_BTHWC: noisy latents, or what `in_channels` says; H and W multiples of the patch.
          time_B: noise level on the scale of DiT's steps, 0 (clean) to 1000.
          text_BSE: text features; the first `text_lengths_B` of each row are valid.
          drop_text_B: bool, examples that see the learned null text instead of theirs.
        """
        _, t, h, w, _ = x_BTHWC.shape
        p, dtype = self.config.patch, self.execution.dtype
        if h % p or w % p:
            raise ValueError(f"latents of {h}x{w}: expected multiples of the patch {p}")
        if drop_text_B is not None:
            null = self.null_text[...].astype(text_BSE.dtype)
            text_BSE = jnp.where(drop_text_B[:, None, None], null, text_BSE)
            text_lengths_B = jnp.where(drop_text_B, 1, text_lengths_B)

        text_BSE = layers.layer_normalize(text_BSE.astype(dtype))
        condition_BD = self._time(time_B) + self._pooled_text(text_BSE, text_lengths_B)
        condition_BD = constrain(condition_BD, "batch", None)
        text_BSD = constrain(self.text_in(text_BSE), "batch", None, None)
        x_BND = self.patch_embedding(layers.to_patches(x_BTHWC.astype(dtype), p))
        n, width = x_BND.shape[1:]
        tokens = (t, h // p, w // p)
        positions_ND = layers.sinusoidal_positions(tokens, width, self.config.extent)
        x_BND = x_BND + positions_ND.astype(dtype)
        angles_NK = layers.rotary_angles(tokens, self.config.head_size)
        text = {"text_BSD": text_BSD, "text_lengths_B": text_lengths_B}
        if self.config.text_mode == "in_context":
            # Text follows video, so that the valid tokens of the sequence come first; its
            # positions do not turn.
            x_BND = jnp.concatenate([x_BND, text_BSD], axis=1)
            angles_NK = jnp.pad(angles_NK, ((0, text_BSD.shape[1]), (0, 0)))
            text = {"lengths_B": n + text_lengths_B}
        x_BND = self._run_blocks(shard_tokens(x_BND), condition_BD, angles_NK=angles_NK, **text)
        x_BND = x_BND[:, :n]
        shift_BND, scale_BND = self.final_modulation(condition_BD, n)
        out = self.final(modulate(x_BND, shift_BND, scale_BND))
        return layers.from_patches(out, (t, h, w), p).astype(jnp.float32)

    @property
    def to_logits(self) -> Callable[[jax.Array], jax.Array] | None:
        """Predictions (..., out_channels) -> logits (..., n_codes) float32, if there are any."""
        if self.code_head is None:
            return None
        return lambda x: self.code_head(x).astype(jnp.float32)

    def _run_blocks(self, x_BND: jax.Array, condition_BD: jax.Array, **given) -> jax.Array:
        graph, blocks = nnx.split(self.blocks)

        def block(x_BND, weights):
            return nnx.merge(graph, weights)(x_BND, condition_BD, **given), None

        policy = REMAT_POLICIES[self.execution.remat]
        if policy is not None:
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        unroll = self.execution.unroll
        return jax.lax.scan(block, x_BND, nnx.to_pure_dict(blocks), unroll=unroll)[0]

    def _time(self, time_B: jax.Array) -> jax.Array:
        embedding = layers.timestep_embedding(time_B, TIME_FEATURES)
        return self.time_out(jax.nn.silu(self.time_in(embedding)))

    def _pooled_text(self, text_BSE: jax.Array, lengths_B: jax.Array) -> jax.Array:
        valid_BS = jnp.arange(text_BSE.shape[1]) < lengths_B[:, None]
        total = jnp.sum(text_BSE * valid_BS[..., None], axis=1)
        mean = total / jnp.maximum(lengths_B, 1)[:, None].astype(total.dtype)
        return self.pooled_out(jax.nn.silu(self.pooled_in(mean)))
