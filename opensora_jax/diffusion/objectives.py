"""What a network is trained on and how it draws samples: rectified flow, or DiT's diffusion.

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from opensora_jax.diffusion import ddpm, flow, samplers
from opensora_jax.diffusion.samplers import TIME_SCALE, Sampling

# (x (B, ..., C), time (B,) float32 from 0, clean, to 1000) -> (B, ..., outputs C)
Network = Callable[[jax.Array, jax.Array], jax.Array]
# The number of a step (traced) -> standard normal noise of the shape of the latents.
Draw = Callable[[jax.Array], jax.Array]


class Objective(Protocol):
    """Noise levels are in [0, 1), from the data to the noise.

    Attributes:
      outputs: how many numbers the network gives for each that it gets.
      samplers: the names of its ways to draw samples, first the usual one.
    """

    outputs: ClassVar[int]
    samplers: ClassVar[tuple[str, ...]]

    def sample_levels(self, key: jax.Array, n: int) -> jax.Array:
        """Noise levels (n,) to train on."""

    def loss(
        self, network: Network, x_0: jax.Array, noise: jax.Array, level_B: jax.Array
    ) -> jax.Array:
        """What is trained on, (B,)."""

    def sample(
        self, network: Network, noise: jax.Array, sampling: Sampling, draw: Draw | None = None
    ) -> jax.Array:
        """x_0 from noise; guidance is the network's.

        Args:
          draw: for samplers that draw more noise.

        Raises:
          ValueError: steps or a sampler that the objective does not have.
        """


def _sampler(objective: "Objective", sampling: Sampling) -> str:
    """The name of the sampler that is meant."""
    known = objective.samplers
    if sampling.sampler not in ("auto", *known):
        (name,) = (name for name, kind in OBJECTIVES.items() if type(objective) is kind)
        raise ValueError(
            f"sampler={sampling.sampler!r}: expected auto or one of {', '.join(known)}, those of "
            f"models with objective={name}"
        )
    return known[0] if sampling.sampler == "auto" else sampling.sampler


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Mean squared error of the velocity.

    Args:
      time_shift: of the levels of training and of sampling, see `flow.shift_times`.
      prediction: what the network's output is, one of `flow.PREDICTIONS`.
    """

    outputs: ClassVar[int] = 1
    samplers: ClassVar[tuple[str, ...]] = ("euler", "heun", "dpm++")
    time_shift: float = 1.0
    prediction: str = "velocity"

    def sample_levels(self, key, n):
        return flow.sample_times(key, n, self.time_shift)

    def loss(self, network, x_0, noise, level_B):
        return flow.loss(self._velocity(network), x_0, noise, level_B)

    def sample(self, network, noise, sampling, draw=None):
        times = flow.shift_times(jnp.linspace(1.0, 0.0, sampling.steps + 1), self.time_shift)
        velocity = self._velocity(network)
        match _sampler(self, sampling):
            case "euler":
                return samplers.euler(velocity, noise, times)
            case "heun":
                return samplers.heun(velocity, noise, times)

        def to_data(x, i):
            return x - times[i] * velocity(x, jnp.full((x.shape[0],), times[i]))

        return samplers.dpm_solver(to_data, noise, 1 - times, times)

    def _velocity(self, network):
        def velocity(x, t_B):
            return flow.to_velocity(network(x, t_B * TIME_SCALE), x, t_B, self.prediction)

        return velocity


@dataclasses.dataclass(frozen=True)
class DDPM:
    """DiT's: mean squared error of the noise plus the bound that teaches the variance.

    Level t stands for step 1000 t, rounded, of the 1000. Ancestral samples are drawn by the learned
    variance.
    """

    outputs: ClassVar[int] = 2
    samplers: ClassVar[tuple[str, ...]] = ("ddim", "ancestral", "dpm++")

    def sample_levels(self, key, n):
        return jax.random.randint(key, (n,), 0, ddpm.N_STEPS) / ddpm.N_STEPS

    def loss(self, network, x_0, noise, level_B):
        step_B = jnp.round(level_B * ddpm.N_STEPS).astype(jnp.int32)
        error, bound = ddpm.loss(
            ddpm.linear_schedule(), self._denoiser(network), x_0, noise, step_B
        )
        return error + bound

    def sample(self, network, noise, sampling, draw=None):
        schedule = ddpm.linear_schedule(ddpm.even_steps(sampling.steps))
        denoise = self._denoiser(network)
        match _sampler(self, sampling):
            case "ddim":
                return ddpm.ddim(schedule, denoise, noise, sampling.eta, draw)
            case "ancestral":
                return ddpm.ancestral(schedule, denoise, noise, draw)
        return ddpm.dpm_solver(schedule, denoise, noise)

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
