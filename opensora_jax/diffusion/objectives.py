"""What a network is trained on and how it draws samples: rectified flow, or DiT's diffusion.

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from opensora_jax.diffusion import ddpm, flow, samplers

# (x (B, ..., C), time (B,) float32 from 0, clean, to 1000) -> (B, ..., outputs C)
Network = Callable[[jax.Array, jax.Array], jax.Array]
# The number of a step (traced) -> standard normal noise of the shape of the latents.
Draw = Callable[[jax.Array], jax.Array]


# Levels run from 0 to 1; the network's embedding of time was made for DiT's 1000 steps.
TIME_SCALE = 1000.0


class Objective(Protocol):
    """Noise levels are in [0, 1), from the data to the noise.

    Attributes:
      outputs: how many numbers the network gives for each that it gets.
    """

    outputs: ClassVar[int]

    def sample_levels(self, key: jax.Array, n: int) -> jax.Array:
        """Noise levels (n,) to train on."""

    def loss(
        self, network: Network, x_0: jax.Array, noise: jax.Array, level_B: jax.Array
    ) -> jax.Array:
        """What is trained on, (B,)."""

    def sample(
        self, network: Network, noise: jax.Array, steps: int, draw: Draw | None = None
    ) -> jax.Array:
        """x_0 from noise in so many steps.

        Args:
          draw: for ancestral sampling; None: no noise but the one given.

        Raises:
          ValueError: steps or a way of sampling that the objective does not have.
        """


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Mean squared error of the velocity; samples by Euler steps.

    Args:
      time_shift: of the levels of training and of sampling, see `flow.shift_times`.
      prediction: what the network's output is, one of `flow.PREDICTIONS`.
    """

    outputs: ClassVar[int] = 1
    time_shift: float = 1.0
    prediction: str = "velocity"

    def sample_levels(self, key, n):
        return flow.sample_times(key, n, self.time_shift)

    def loss(self, network, x_0, noise, level_B):
        return flow.loss(self._velocity(network), x_0, noise, level_B)

    def sample(self, network, noise, steps, draw=None):
        if draw is not None:
            raise ValueError("ancestral sampling: expected a model with objective=ddpm, not flow")
        times = flow.shift_times(jnp.linspace(1.0, 0.0, steps + 1), self.time_shift)
        return samplers.euler(self._velocity(network), noise, times)

    def _velocity(self, network):
        def velocity(x, t_B):
            return flow.to_velocity(network(x, t_B * TIME_SCALE), x, t_B, self.prediction)

        return velocity


@dataclasses.dataclass(frozen=True)
class DDPM:
    """DiT's: mean squared error of the noise plus the bound that teaches the variance.

    Level t stands for step 1000 t, rounded, of the 1000. Samples are DDIM's, or, with noise to
    draw, ancestral ones, by the learned variance.
    """

    outputs: ClassVar[int] = 2

    def sample_levels(self, key, n):
        return jax.random.randint(key, (n,), 0, ddpm.N_STEPS) / ddpm.N_STEPS

    def loss(self, network, x_0, noise, level_B):
        step_B = jnp.round(level_B * ddpm.N_STEPS).astype(jnp.int32)
        error, bound = ddpm.loss(
            ddpm.linear_schedule(), self._denoiser(network), x_0, noise, step_B
        )
        return error + bound

    def sample(self, network, noise, steps, draw=None):
        schedule = ddpm.linear_schedule(ddpm.even_steps(steps))
        denoise = self._denoiser(network)
        if draw is None:
            return ddpm.ddim(schedule, denoise, noise)
        return ddpm.ancestral(schedule, denoise, noise, draw)

    def _denoiser(self, network):
        return lambda x, step_B: network(x, step_B.astype(jnp.float32))


# By the name in the configuration.
OBJECTIVES: dict[str, type] = {"flow": RectifiedFlow, "ddpm": DDPM}


def from_fields(fields: Mapping[str, Any]) -> Objective:
    """The objective that a configuration, or a checkpoint's description, names.

    Args:
      fields: `objective`, a key of `OBJECTIVES`, and beside it the fields of that class.
    """
    kind = OBJECTIVES[fields["objective"]]
    return kind(**{field.name: fields[field.name] for field in dataclasses.fields(kind)})


def to_fields(objective: Objective) -> dict[str, Any]:
    """What `from_fields` takes, for JSON; the same keys for every objective."""
    (name,) = (name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    defaults = dataclasses.asdict(RectifiedFlow())
    return {"objective": name, **defaults, **dataclasses.asdict(objective)}
