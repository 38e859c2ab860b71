"""A window through a tokenizer: at once, or where it is long and the tokenizer causal, in chunks.

Each chunk goes on where the last one stopped (`models.past.Past`), so codes and pixels are those
of the whole. What grows with the window is attention's keys and values in time.

Shape suffixes: B batch, T frames, H height, W width, C channels; lower case: the code grid.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from opensora_jax.models.past import Past
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.tasks.vqvae import to_float, to_uint8
from opensora_jax.windows import Windows


class Chunks:
    """Encodes and decodes windows, and shorter videos as their beginnings.

    Chunks are as long as the videos that the tokenizer was trained on, or less, so that they fill
    a window evenly. The first and the others are a compilation each; the last is filled up with
    its last frame, and what comes of that is cut off.

    Args:
      windows: how long videos are cut.
      mesh: whose devices share a batch; None: one device.
    """

    def __init__(self, model: Tokenizer, windows: Windows, mesh: Mesh | None = None):
        self._windows, self._first = windows, int(windows.causal)
        latents = windows.latents(windows.frames) - self._first
        at_once = (model.n_frames - 1) // windows.stride if windows.causal else latents
        self._n = max(-(-latents // max(at_once, 1)), 1)
        self._latents = -(-latents // self._n)  # of a chunk; the first has self._first more
        self._graph, state = nnx.split(model)
        self._sharding = mesh and NamedSharding(mesh, PartitionSpec("data"))
        self._state = jax.device_put(state, mesh and NamedSharding(mesh, PartitionSpec()))

    def encode(self, video_BTHWC: np.ndarray) -> np.ndarray:
        """uint8 videos of up to a window -> codes (B, t, h, w)."""
        n = self._windows.latents(video_BTHWC.shape[1])
        return self._run(_encode, video_BTHWC, self._latents * self._windows.stride)[:, :n]

    def decode(self, codes_Bthw: np.ndarray) -> np.ndarray:
        """Codes of up to a window -> videos uint8 (B, T, H, W, C)."""
        n = self._windows.n_frames(codes_Bthw.shape[1])
        return self._run(_decode, codes_Bthw, self._latents)[:, :n]

    def _run(self, compute: Callable, x: np.ndarray, size: int) -> np.ndarray:
        end, kept, found = 0, None, []
        while end < x.shape[1]:
            start, end = end, (end or self._first) + size
            index = np.minimum(np.arange(start, end), x.shape[1] - 1)
            inputs = jax.device_put((x[:, index], kept), self._sharding)
            y, kept = compute(self._graph, self._state, *inputs, len(found), self._n)
            found.append(np.asarray(y))
        return np.concatenate(found, axis=1)


_jit = functools.partial(jax.jit, static_argnames=("graph", "n"), donate_argnames="kept")


@_jit
def _encode(graph, state, video, kept, i, n):
    """Chunk `i` of `n`: (its codes, what the next has to know)."""
    past = Past(kept, i, n) if n > 1 else None
    codes = nnx.merge(graph, state).encode(to_float(video), past)
    return codes, past and past.kept


@_jit
def _decode(graph, state, codes, kept, i, n):
    """Chunk `i` of `n`: (its frames, what the next has to know)."""
    past = Past(kept, i, n) if n > 1 else None
    video = nnx.merge(graph, state).decode(codes, past)
    return to_uint8(video), past and past.kept
