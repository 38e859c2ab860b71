"""CLIP's text tower (Radford et al. 2021, https://arxiv.org/abs/2103.00020) in Flax NNX.

The same function as `CLIPTextModel.last_hidden_state` of Hugging Face transformers.

Shape suffixes: B batch, S sequence (tokens), T = B * S, D width, N heads, H head size.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.files import short


def quick_gelu(x: jax.Array) -> jax.Array:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """Which text tower.

    Attributes:
      vocab_size: number of token ids.
      width: size of the features, a multiple of `heads`.
      depth: number of transformer blocks.
      heads: attention heads.
      mlp_width: hidden size of the MLPs.
      max_length: number of learned positions, the longest sequence.
      activation: a key of `ACTIVATIONS`.
      norm_epsilon: epsilon of the layer norms.

    Raises:
      ValueError: a width that the heads do not divide, or an unknown activation.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_length: int
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: not divisible by heads={self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation={short(self.activation)}: expected one of {sorted(ACTIVATIONS)}"
            )


class Block(nnx.Module):
    """Pre-norm transformer block: causal self-attention, then an MLP."""

    def __init__(self, config: ClipTextConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, mlp_width = config.width, config.mlp_width
        epsilon = config.norm_epsilon
        norm = partial(nnx.LayerNorm, width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
        dense = partial(
            nnx.Linear, dtype=dtype, kernel_init=nnx.initializers.normal(0.02), rngs=rngs
        )
        self.attention_norm = norm()
        self.query = dense(width, width)
        self.key = dense(width, width)
        self.value = dense(width, width)
        self.attention_out = dense(width, width)
        self.mlp_norm = norm()
        self.mlp_in = dense(width, mlp_width)
        self.mlp_out = dense(mlp_width, width)
        self.heads = config.heads
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x_TD: jax.Array, mask_BS: jax.Array) -> jax.Array:
        def split(x_TD):
            return x_TD.reshape(*mask_BS.shape, self.heads, -1)

        h_TD = self.attention_norm(x_TD)
        attended_BSNH = jax.nn.dot_product_attention(
            split(self.query(h_TD)),
            split(self.key(h_TD)),
            split(self.value(h_TD)),
            mask=mask_BS[:, None, None, :],
            is_causal=True,
        )
        x_TD = x_TD + self.attention_out(attended_BSNH.reshape(x_TD.shape))
        h_TF = self.activation(self.mlp_in(self.mlp_norm(x_TD)))
        return x_TD + self.mlp_out(h_TF)


class ClipText(nnx.Module):
    """Token ids to one feature vector per token.

    Args:
      dtype: compute dtype; parameters, norms and softmax stay float32.
      rngs: initialization.
    """

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config, self.dtype = config, dtype
        embed = partial(nnx.Embed, features=config.width, rngs=rngs)
        self.token_embedding = embed(
            config.vocab_size, embedding_init=nnx.initializers.normal(0.02)
        )
        self.position_embedding = embed(
            config.max_length, embedding_init=nnx.initializers.normal(0.01)
        )

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
        def stacked_blocks(rngs):
            return Block(config, dtype, rngs)

        self.blocks = stacked_blocks(rngs)
        self.final_norm = nnx.LayerNorm(
            config.width, epsilon=config.norm_epsilon, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Features of every position after the final layer norm (`last_hidden_state`).

        Args:
          input_ids: (B, S) integers below `vocab_size`, S at most `max_length`.
          attention_mask: (B, S), nonzero at valid tokens; padding follows them.

        Returns:
          (B, S, D) float32; what stands at padding has no meaning.

        Raises:
          ValueError: shapes that do not fit.
        """
        if input_ids.ndim != 2 or input_ids.shape != attention_mask.shape:
            raise ValueError(
                f"input_ids {input_ids.shape}, attention_mask {attention_mask.shape}: "
                "expected one shape (batch, sequence)"
            )
        B, S = input_ids.shape
        if self.config.max_length < S:
            raise ValueError(
                f"sequence of {S} tokens: the model has {self.config.max_length} positions"
            )
        mask_BS = attention_mask != 0
        x_BSD = self.token_embedding(input_ids) + self.position_embedding(jnp.arange(S))

        @nnx.scan(
            in_axes=(0, nnx.Carry, None),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        def run(block, x_TD, mask_BS):
            return block(x_TD, mask_BS)

        # Tokens lie flat between the blocks: a dense layer is then one large matmul.
        x_TD = run(self.blocks, x_BSD.reshape(B * S, -1).astype(self.dtype), mask_BS)
        return self.final_norm(x_TD.astype(jnp.float32)).reshape(B, S, -1)
