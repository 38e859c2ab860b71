"""What a network is trained on and how it draws samples: what all objectives agree on.

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import jax
import numpy as np

from opensora_jax.diffusion.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Network:
    """What an objective sees of a model.

    Attributes:
      call: (x (B, ..., in), time (B,) float32 from 0, clean, to 1000) -> (B, ..., out).
      to_logits: the last layer, outputs (..., out) -> logits (..., K) of all codes together; None:
        the outputs are what is asked for.
    """

    call: Callable[[jax.Array, jax.Array], jax.Array]
    to_logits: Callable[[jax.Array], jax.Array] | None = None

    def __call__(self, x: jax.Array, time_B: jax.Array) -> jax.Array:
        return self.call(x, time_B)


# The number of a draw (traced) -> noise as it was at first.
Draw = Callable[[jax.Array], jax.Array]


class Codes(Protocol):
    """Codes and their embeddings, as `tasks.dit.Latents` are.

    Attributes:
      table: (n_codes, C) float32.
      levels: values of each dimension, where the codebook is a grid; else ().
    """

    table: np.ndarray
    levels: tuple[int, ...]

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """Codes (...) -> embeddings (..., C)."""

    def to_codes(self, x: jax.Array) -> jax.Array:
        """The nearest codes (...) of embeddings (..., C)."""

    def digits(self) -> list[np.ndarray]:
        """Embeddings (K, channels) of the values of each digit of a code."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers for each latent that a network gets and gives.

    Attributes:
      n_guided: of what it gives, the first numbers, for which there is guidance.
      n_codes: where a last layer makes logits of all codes of what it gives; None: there is none.
    """

    n_in: int
    n_out: int
    n_guided: int
    n_codes: int | None = None


class Objective(Protocol):
    """Noise levels are in [0, 1), from the data to the noise.

    Attributes:
      name: in the configuration.
      samplers: the names of its ways to draw samples, first the usual one.
    """

    name: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]]

    def sizes(self, codes: Codes) -> Sizes:
        """Those of its network.

        Raises:
          ValueError: codes that it cannot be trained on.
        """

    def noise(self, key: jax.Array, shape: Sequence[int], codes: Codes) -> jax.Array:
        """For codes of this shape, (..., numbers)."""

    def sample_levels(self, key: jax.Array, n: int) -> jax.Array:
        """Noise levels (n,) to train on."""

    def loss(
        self,
        network: Network,
        codes: Codes,
        x: jax.Array,
        noise: jax.Array,
        level_B: jax.Array,
        unknown: jax.Array | None = None,
    ) -> jax.Array:
        """What is trained on, (B,), of the data x (B, T, H, W) int32.

        Args:
          unknown: bool (B, T, H, W), what is to be learned; of the rest, where the network gives
            zeros, there is no loss. None: all.
        """

    def sample(
        self,
        network: Network,
        codes: Codes,
        noise: jax.Array,
        sampling: Sampling,
        draw: Draw | None = None,
        unknown: jax.Array | None = None,
    ) -> jax.Array:
        """Codes (B, T, H, W) int32 from noise; guidance is the network's.

        Args:
          draw: for samplers that draw more noise.
          unknown: as of `loss`; what is drawn of the rest is of no account.

        Raises:
          ValueError: steps or a sampler that the objective does not have.
        """


def sampler_of(objective: Objective, sampling: Sampling) -> str:
    """The name of the sampler that is meant.

    Raises:
      ValueError: the objective has no such sampler.
    """
    known = objective.samplers
    if sampling.sampler not in ("auto", *known):
        raise ValueError(
            f"sampler={sampling.sampler!r}: expected auto or one of {', '.join(known)}, those of "
            f"models with objective={objective.name}"
        )
    return known[0] if sampling.sampler == "auto" else sampling.sampler
