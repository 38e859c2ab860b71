"""Objectives on embeddings of codes: rectified flow, or DiT's diffusion.

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from opensora_jax.diffusion import ddpm, flow, samplers
from opensora_jax.diffusion.objective import Sizes, sampler_of
from opensora_jax.diffusion.samplers import TIME_SCALE


class _OnEmbeddings:
    """What objectives on embeddings have in common.

    Attributes:
      outputs: how many numbers the network gives for each that it gets.
    """

    outputs: ClassVar[int]

    def sizes(self, codes):
        channels = codes.table.shape[1]
        return Sizes(channels, self.outputs * channels, channels)

    def noise(self, key, shape, codes):
        return jax.random.normal(key, (*shape, codes.table.shape[1]))

    def loss(self, network, codes, x, noise, level_B, unknown=None):
        x_0 = codes.from_codes(x)
        if unknown is None:
            return self.error(network, x_0, noise, level_B)
        # Zeros, as the network gives, have no error: the mean is that of the rest.
        x_0, noise = (jnp.where(unknown[..., None], a, 0) for a in (x_0, noise))
        return self.error(network, x_0, noise, level_B) / jnp.mean(unknown, axis=(1, 2, 3))

    def sample(self, network, codes, noise, sampling, draw=None, unknown=None):
        return codes.to_codes(self.denoise(network, noise, sampling, draw))


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(_OnEmbeddings):
    """Mean squared error of the velocity.

    Args:
      time_shift: of the levels of training and of sampling, see `flow.shift_times`.
      prediction: what the network's output is, one of `flow.PREDICTIONS`.
    """

    name: ClassVar[str] = "flow"
    outputs: ClassVar[int] = 1
    samplers: ClassVar[tuple[str, ...]] = ("euler", "heun", "dpm++")
    time_shift: float = 1.0
    prediction: str = "velocity"

    def sample_levels(self, key, n):
        return flow.sample_times(key, n, self.time_shift)

    def error(self, network, x_0, noise, level_B):
        return flow.loss(self._velocity(network), x_0, noise, level_B)

    def denoise(self, network, noise, sampling, draw=None):
        times = flow.shift_times(jnp.linspace(1.0, 0.0, sampling.steps + 1), self.time_shift)
        velocity = self._velocity(network)
        match sampler_of(self, sampling):
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
class DDPM(_OnEmbeddings):
    """DiT's: mean squared error of the noise plus the bound that teaches the variance.

    Level t stands for step 1000 t, rounded, of the 1000. Ancestral samples are drawn by the learned
    variance.

    Args:
      prediction: what the network's output is, one of `ddpm.PREDICTIONS`; of data the error is that
        of the velocity, as of `RectifiedFlow`.
      time_shift: of the levels of training and of sampling, see `ddpm.linear_schedule`.
    """

    name: ClassVar[str] = "ddpm"
    outputs: ClassVar[int] = 2
    samplers: ClassVar[tuple[str, ...]] = ("ddim", "ancestral", "dpm++")
    prediction: str = "noise"
    time_shift: float = 1.0

    def sample_levels(self, key, n):
        return jax.random.randint(key, (n,), 0, ddpm.N_STEPS) / ddpm.N_STEPS

    def error(self, network, x_0, noise, level_B):
        step_B = jnp.round(level_B * ddpm.N_STEPS).astype(jnp.int32)
        schedule = self._schedule()
        error, bound = ddpm.loss(schedule, self._denoiser(network), x_0, noise, step_B)
        if self.prediction == "data":
            error *= ddpm.data_weight(schedule, step_B)
        return error + bound

    def denoise(self, network, noise, sampling, draw=None):
        schedule = self._schedule(ddpm.even_steps(sampling.steps))
        denoise = self._denoiser(network)
        match sampler_of(self, sampling):
            case "ddim":
                return ddpm.ddim(schedule, denoise, noise, sampling.eta, draw)
            case "ancestral":
                return ddpm.ancestral(schedule, denoise, noise, draw)
        return ddpm.dpm_solver(schedule, denoise, noise)

    def _schedule(self, steps=None):
        return ddpm.linear_schedule(steps, self.time_shift)

    def _denoiser(self, network):
        schedule = self._schedule()

        def denoise(x, step_B):
            out = network(x, step_B.astype(jnp.float32))
            if self.prediction == "noise":
                return out
            return ddpm.noise_of_data(schedule, step_B, x, out)

        return denoise
