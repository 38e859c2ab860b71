"""Videos in chunks: what causal operations keep from one to the next.

Shape suffixes: B batch, N examples or examples and positions, T frames, H height, W width, C
channels.
"""

import jax
import jax.numpy as jnp


class Past:
    """What is known of a video's earlier chunks: one object for each, asked in the same order.

    The first frame of a video stands alone, so the first chunk has one frame more than the others,
    at every resolution in time; the others are of one size. A whole video is its only chunk.

    Args:
      kept: `kept` of the chunk before; None: this is the first.
      index: which chunk this is, counted from 0; may be traced.
      n_chunks: of the video.

    Attributes:
      kept: after the chunk: arrays, of which the first axis is of examples, or examples and
        positions. The last chunk's are of no use.
    """

    def __init__(
        self,
        kept: list[jax.Array] | None = None,
        index: jax.Array | int = 0,
        n_chunks: int = 1,
    ):
        self.is_first, self._before = kept is None, iter(kept or ())
        self._index, self._n_chunks = index, n_chunks
        self.kept: list[jax.Array] = []

    def extend(self, x_BTHWC: jax.Array, n: int) -> jax.Array:
        """The chunk with the n frames before it; before a video is its first frame."""
        if n == 0:
            return x_BTHWC
        if self.is_first:
            x = _repeat_first(x_BTHWC, n)
        else:
            x = jnp.concatenate([next(self._before), x_BTHWC], axis=1)
        self.kept.append(x[:, x.shape[1] - n :])
        return x

    def to_groups(self, x_BTHWC: jax.Array, n: int) -> jax.Array:
        """The chunk as whole groups of n frames: a video's first frame becomes one."""
        return _repeat_first(x_BTHWC, n - 1) if self.is_first else x_BTHWC

    def from_groups(self, x_BTHWC: jax.Array, n: int) -> jax.Array:
        """The inverse of `to_groups`."""
        return x_BTHWC[:, n - 1 :] if self.is_first else x_BTHWC

    def gather(self, x_NT: jax.Array) -> tuple[jax.Array, jax.Array | int]:
        """(frames (N, T, ...) of all chunks so far, the first of this one).

        After the first chunk they have room for all of the video, which the caller has to mask.
        """
        n = x_NT.shape[1]
        if self.is_first:
            room = jnp.zeros(
                (len(x_NT), (self._n_chunks - 1) * (n - 1), *x_NT.shape[2:]), x_NT.dtype
            )
            self.kept.append(jnp.concatenate([x_NT, room], axis=1))
            return x_NT, 0
        start = 1 + self._index * n
        x = jax.lax.dynamic_update_slice_in_dim(next(self._before), x_NT, start, axis=1)
        self.kept.append(x)
        return x, start


def _repeat_first(x_BTHWC, n):
    """The video with its first frame n times more before it."""
    first = jnp.broadcast_to(x_BTHWC[:, :1], (len(x_BTHWC), n, *x_BTHWC.shape[2:]))
    return jnp.concatenate([first, x_BTHWC], axis=1)
