"""Latent frames that are known: which of them in training, and how the network is told.

Shape suffixes: B batch, T latent frames.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from opensora_jax.diffusion.objective import Network

_SOME = -1  # a random number of frames, of all but one
# What may be known of a training example: so many frames from the begin on, so many up to the end,
# and whether every n-th, from a random one on. Longer videos are drawn in windows that begin with
# what the one before ends with, so that the rest goes with that, too.
KINDS = (
    (0, 0, False),
    (1, 0, False),
    (_SOME, 0, False),
    (0, 1, False),
    (0, _SOME, False),
    (1, 1, False),
    (_SOME, _SOME, False),
    (0, 0, True),
    (_SOME, 0, True),
)
# Share of the first kind, which is all that a text is enough for; the others have equal shares.
NONE_SHARE = 0.4


def draw(key: jax.Array, n: int, n_frames: int) -> jax.Array:
    """Which frames of n examples are known, bool (n, n_frames); never all of an example."""
    kind_key, first_key, last_key, stride_key, place_key = jax.random.split(key, 5)
    rest = (1 - NONE_SHARE) / (len(KINDS) - 1)
    shares = jnp.array([NONE_SHARE] + [rest] * (len(KINDS) - 1))
    kind_B = jax.random.choice(kind_key, len(KINDS), (n,), p=shares)
    first_B, last_B, is_every_B = jnp.array(KINDS, jnp.int32)[kind_B].T

    def number(key, asked_B):
        some_B = jax.random.randint(key, (n,), 1, max(n_frames, 2))
        return jnp.where(asked_B == _SOME, some_B, asked_B)[:, None]

    stride_B = jax.random.randint(stride_key, (n,), 2, max(n_frames // 2, 2) + 1)
    place_B = jax.random.randint(place_key, (n,), 0, stride_B)
    frame_T = jnp.arange(n_frames)
    is_nth_BT = frame_T % stride_B[:, None] == place_B[:, None]
    known_BT = (
        (frame_T < number(first_key, first_B))
        | (frame_T >= n_frames - number(last_key, last_B))
        | (is_nth_BT & (is_every_B[:, None] == 1))
    )
    return known_BT & ~known_BT.all(axis=1, keepdims=True)


class Known(NamedTuple):
    """Clean latents (B, T, H, W, C), of which those of some frames are known, (B, T) bool.

    What a network gets of the noise of known frames is zero, and what it says of them, too, so that
    this is neither trained nor used.
    """

    latents: jax.Array
    is_known: jax.Array

    @property
    def unknown(self) -> jax.Array:
        """Which latents are not known, bool (B, T, H, W)."""
        unknown_BT = ~self.is_known
        return jnp.broadcast_to(unknown_BT[:, :, None, None], self.latents.shape[:-1])

    def condition(self, network: Network) -> Network:
        """A network that gets `DiTConfig.in_channels`, as one that gets noisy latents alone."""
        unknown = self.unknown[..., None]

        def call(x, time_B):
            clean = jnp.where(unknown, 0, self.latents)
            more = x.shape[-1] - clean.shape[-1]  # what noisy latents have beside their channels
            clean = jnp.pad(clean, [(0, 0)] * (x.ndim - 1) + [(0, more)])
            seen = [jnp.where(unknown, x, 0), clean, (~unknown).astype(x.dtype)]
            return jnp.where(unknown, network(jnp.concatenate(seen, axis=-1), time_B), 0)

        return Network(call, network.to_logits)
