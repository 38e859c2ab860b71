"""The adversary of a tokenizer's training: which patches of a video are real.

Shape suffixes: B batch, T frames, H height, W width, C channels; lower case: the patches.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.models.vqvae import Conv

_WIDTHS = (1, 2, 4)


class Discriminator(nnx.Module):
    """Video (B, T, H, W, 3) in [-0.5, 0.5] -> logits (B, T, h, w) float32, higher for real patches.

    A patch discriminator (arXiv:1611.07004) of 3-D convolutions, each of which halves height and
    width, so that videos of any length go through it, and images.

    Args:
      width: channels after the first convolution; twice and four times as many after the others.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        widths = [3, *(width * n for n in _WIDTHS)]
        self.convs = nnx.List(
            Conv(d_in, d_out, 4, (1, 2, 2), rngs=rngs, dtype=dtype)
            for d_in, d_out in itertools.pairwise(widths)
        )
        self.out = Conv(widths[-1], 1, 3, rngs=rngs, dtype=dtype)

    def __call__(self, video_BTHWC: jax.Array) -> jax.Array:
        x = 2.0 * video_BTHWC
        for conv in self.convs:
            x = jax.nn.leaky_relu(conv(x), 0.2)
        return self.out(x)[..., 0].astype(jnp.float32)


def loss(
    real: jax.Array, fake: jax.Array, averages: dict[str, jax.Array], strength: float = 1e-3
) -> jax.Array:
    """The hinge loss of logits, with LeCam's regularization (arXiv:2104.03310).

    Args:
      averages: of earlier logits of `real` and `fake`, scalars, from which the other kind is not to
        move far.
      strength: of the regularization.
    """
    hinge = jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake))
    apart = jnp.mean(jax.nn.relu(real - averages["fake"]) ** 2)
    apart += jnp.mean(jax.nn.relu(averages["real"] - fake) ** 2)
    return hinge + strength * apart
