"""What every video tokenizer can do: `models.vqvae` and `models.cosmos` are two.

Shape suffixes: B batch, T frames, H height, W width, C channels; lower case: the code grid.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from opensora_jax.models.past import Past

Size3 = tuple[int, int, int]

# Variance of the pixels in VideoGPT's data; it scales the reconstruction loss.
DATA_VARIANCE = 0.06


class Tokenizer(nnx.Module):
    """Video (B, T, H, W, 3) in [-0.5, 0.5] <-> codes (B, t, h, w) int32.

    Subclasses say `quantizer` (a `models.codebook.Codebook` or `models.fsq.FSQ`), `latents` and
    `reconstruct`; their `config` says `downsample`, `n_frames`, `n_codes` and `levels`.

    Attributes:
      causal: no frame sees a later one, and the first stands alone:
        T = 1 + (t - 1) * downsample[0]. Its methods also take the `Past` of a chunk of a video.
    """

    causal = False
    config: Any
    quantizer: Any

    @property
    def downsample(self) -> Size3:
        """(T/t, H/h, W/w)."""
        return self.config.downsample

    @property
    def n_frames(self) -> int:
        """Length of the videos it was trained on; longer ones are encoded in windows."""
        return self.config.n_frames

    @property
    def levels(self) -> tuple[int, ...]:
        """Of each dimension, where the codebook is a grid; else ()."""
        return self.config.levels

    @property
    def codebook(self) -> jax.Array:
        """(n_codes, dim) float32."""
        return self.quantizer.codebook()

    def nearest(self, embeddings: jax.Array) -> jax.Array:
        """The codes (...) int32 whose embeddings are nearest to these (..., dim)."""
        return self.quantizer.nearest(embeddings)

    def latents(self, video: jax.Array) -> jax.Array:
        """Encoder output before quantization, (B, t, h, w, dim) float32."""
        raise NotImplementedError

    def reconstruct(self, embeddings: jax.Array) -> jax.Array:
        """(B, t, h, w, dim) -> video (B, T, H, W, 3) float32."""
        raise NotImplementedError

    def encode(self, video: jax.Array, past: Past | None = None) -> jax.Array:
        """Video (B, T, H, W, 3) in [-0.5, 0.5] -> codes (B, t, h, w) int32.

        Raises:
          ValueError: a side of the video is not a multiple of its downsampling; where the first
            frame stands alone, T not 1 and a multiple.
        """
        k, *space = self.downsample
        alone = self.causal and (past is None or past.is_first)
        fits = video.ndim == 5 and video.shape[1] >= 1 and (video.shape[1] - alone) % k == 0
        if not fits or any(n % d for n, d in zip(video.shape[2:4], space, strict=True)):
            time = f"1 + a multiple of {k}" if alone else f"a multiple of {k}"
            raise ValueError(
                f"video of shape {video.shape}: expected (B, T, H, W, 3) with T {time}, and H, W "
                f"multiples of {space}"
            )
        return self.quantizer.codes(self.latents(video, *_given(past)))

    def decode(self, codes: jax.Array, past: Past | None = None) -> jax.Array:
        """Codes (B, t, h, w) -> video (B, T, H, W, 3) float32, about [-0.5, 0.5]."""
        return self.reconstruct(self.quantizer.lookup(codes), *_given(past))

    def losses(
        self,
        video: jax.Array,
        key: jax.Array | None = None,
        quantized_share: jax.Array | float = 1.0,
        end_weight: float = 1.0,
        distance: str = "l2",
        trains_encoder: bool = True,
    ) -> dict[str, jax.Array]:
        """The terms of the loss and what to watch, scalars but for `recon` and `codes`.

        With a `key` a learned codebook's averages move (and, after `.train()`, batch statistics
        do), and of every video's positions only `quantized_share` reach the decoder quantized. The
        first and last frame count `end_weight` times. `distance` is l2, squared, or l1. Without
        `trains_encoder` no gradient reaches what codes depend on.
        """
        latents = self.latents(video)
        if not trains_encoder:
            latents = jax.lax.stop_gradient(latents)
        codes, continuous, quantized, commitment = self.quantizer.straight_through(latents, key)
        if key is not None:
            chosen = jax.random.uniform(jax.random.fold_in(key, 1), (len(video), 1, 1, 1, 1))
            quantized = jnp.where(chosen < quantized_share, quantized, continuous)
        recon = self.reconstruct(quantized)
        weight_T = jnp.ones(video.shape[1]).at[jnp.array([0, -1])].set(end_weight)
        weight_T /= weight_T.mean()
        error = recon - video
        error = error**2 / DATA_VARIANCE if distance == "l2" else abs(error) / DATA_VARIANCE**0.5
        return {
            "recon_loss": jnp.mean(weight_T[:, None, None, None] * error),
            "commitment_loss": commitment,
            "recon": recon,
            "codes": codes,
        }


def _given(past):
    return () if past is None else (past,)
