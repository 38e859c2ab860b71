"""What a network is trained on and how it draws samples.

On embeddings of codes: rectified flow, or DiT's diffusion. On the codes themselves: masks, or a
path of ever nearer codes.

Shape suffixes: B batch; C channels of a latent video, its last dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import ddpm, discrete, flow, samplers
from opensora_jax.diffusion.samplers import TIME_SCALE, Sampling


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
      samplers: the names of its ways to draw samples, first the usual one.
    """

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
        self, network: Network, codes: Codes, x: jax.Array, noise: jax.Array, level_B: jax.Array
    ) -> jax.Array:
        """What is trained on, (B,), of the data x (B, T, H, W) int32."""

    def sample(
        self,
        network: Network,
        codes: Codes,
        noise: jax.Array,
        sampling: Sampling,
        draw: Draw | None = None,
    ) -> jax.Array:
        """Codes (B, T, H, W) int32 from noise; guidance is the network's.

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

    def loss(self, network, codes, x, noise, level_B):
        return self.error(network, codes.from_codes(x), noise, level_B)

    def sample(self, network, codes, noise, sampling, draw=None):
        return codes.to_codes(self.denoise(network, noise, sampling, draw))


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(_OnEmbeddings):
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

    def error(self, network, x_0, noise, level_B):
        return flow.loss(self._velocity(network), x_0, noise, level_B)

    def denoise(self, network, noise, sampling, draw=None):
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
class DDPM(_OnEmbeddings):
    """DiT's: mean squared error of the noise plus the bound that teaches the variance.

    Level t stands for step 1000 t, rounded, of the 1000. Ancestral samples are drawn by the learned
    variance.
    """

    outputs: ClassVar[int] = 2
    samplers: ClassVar[tuple[str, ...]] = ("ddim", "ancestral", "dpm++")

    def sample_levels(self, key, n):
        return jax.random.randint(key, (n,), 0, ddpm.N_STEPS) / ddpm.N_STEPS

    def error(self, network, x_0, noise, level_B):
        step_B = jnp.round(level_B * ddpm.N_STEPS).astype(jnp.int32)
        error, bound = ddpm.loss(
            ddpm.linear_schedule(), self._denoiser(network), x_0, noise, step_B
        )
        return error + bound

    def denoise(self, network, noise, sampling, draw=None):
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


CODE_HEADS = ("auto", "joint", "factorized")

# Numbers of each code that the last layer of a joint head makes the logits of all codes of.
_FEATURES = 32


@dataclasses.dataclass(frozen=True)
class _OnCodes:
    """What objectives on codes themselves have in common: cross-entropy of the clean ones, in nats.

    Args:
      time_shift: of the levels of training and of sampling, see `flow.shift_times`.
      code_head: joint, one distribution over all codes; factorized, one over the values of each
        dimension of a grid; auto: factorized where there is a grid.
    """

    time_shift: float = 1.0
    code_head: str = "auto"

    def sizes(self, codes):
        n_in = codes.table.shape[1] + self.more_channels
        if self._is_joint(codes):
            return Sizes(n_in, _FEATURES, _FEATURES, len(codes.table))
        return Sizes(n_in, sum(codes.levels), sum(codes.levels))

    def _is_joint(self, codes: Codes) -> bool:
        if self.code_head == "factorized" and not codes.levels:
            raise ValueError("dit.code_head=factorized: expected joint: the codes are of no grid")
        return self.code_head == "joint" or not codes.levels

    def sample_levels(self, key, n):
        return flow.shift_times(jax.random.uniform(key, (n,)), self.time_shift)

    def _times(self, sampling: Sampling) -> jax.Array:
        """Levels (steps + 1,) of samples, from the noise down to the data."""
        return flow.shift_times(jnp.linspace(1.0, 0.0, sampling.steps + 1), self.time_shift)

    def _cross_entropy(self, network: Network, codes: Codes, out: jax.Array, x: jax.Array):
        """(B, T, H, W) of the codes x by the network's outputs."""
        if self._is_joint(codes):

            def joint(out, x):
                return discrete.cross_entropy(network.to_logits(out), x)

            return discrete.in_parts(joint, len(codes.table), out, x)
        digits = discrete.to_digits(x, codes.levels)
        logits = jnp.split(out, np.cumsum(codes.levels)[:-1], axis=-1)
        return sum(map(discrete.cross_entropy, logits, digits))

    def _draw(self, network: Network, codes: Codes, out: jax.Array, uniform: jax.Array, sampling):
        """Clean codes (B, T, H, W) by the network's outputs, and the logarithms of their
        probabilities; of numbers (..., digits) in [0, 1)."""
        how = sampling.temperature, sampling.top_p
        if self._is_joint(codes):

            def joint(out, uniform):
                return discrete.draw(network.to_logits(out), uniform, *how)

            return discrete.in_parts(joint, len(codes.table), out, uniform[..., 0])
        logits = jnp.split(out, np.cumsum(codes.levels)[:-1], axis=-1)
        drawn = [discrete.draw(x, uniform[..., i], *how) for i, x in enumerate(logits)]
        digits, logs = zip(*drawn, strict=True)
        return discrete.from_digits(digits, codes.levels), sum(logs)

    def noise(self, key, shape, codes):
        return jax.random.uniform(key, (*shape, len(codes.levels) or 1))


@dataclasses.dataclass(frozen=True)
class Masked(_OnCodes):
    """MaskGIT's (arXiv:2202.04200; of videos MAGVIT, arXiv:2212.05199): codes behind a mask are to
    be told from the others; samples are made of the codes that the network is surest of, ever more
    of them. A masked code is an embedding of zeros, and a channel more says so."""

    samplers: ClassVar[tuple[str, ...]] = ("confidence",)
    more_channels: ClassVar[int] = 1

    def loss(self, network, codes, x, noise, level_B):
        share_B = discrete.share_hidden(level_B)
        is_hidden = noise[..., 0] < share_B[:, None, None, None]
        out = network(self._seen(codes, x, is_hidden), level_B * TIME_SCALE)
        entropy = self._cross_entropy(network, codes, out, x) * is_hidden
        axes = (1, 2, 3)
        return jnp.sum(entropy, axes) / jnp.maximum(jnp.sum(is_hidden, axes), 1)

    def sample(self, network, codes, noise, sampling, draw=None):
        _sampler(self, sampling)
        times = self._times(sampling)
        n = math.prod(noise.shape[1:4])

        def step(i, state):
            x, is_hidden = state
            time_B = jnp.full((len(x),), times[i] * TIME_SCALE)
            out = network(self._seen(codes, x, is_hidden), time_B)
            drawn, log = self._draw(network, codes, out, draw(2 * i), sampling)
            x = jnp.where(is_hidden, drawn, x)
            u = jnp.maximum(draw(2 * i + 1)[..., 0], jnp.finfo(jnp.float32).tiny)
            gumbel = -jnp.log(-jnp.log(u))
            doubt = sampling.choice_temperature * times[i + 1] * gumbel
            left = jnp.floor(n * discrete.share_hidden(times[i + 1])).astype(jnp.int32)
            return x, discrete.hide_least(log + doubt, is_hidden, left)

        x = jnp.zeros(noise.shape[:4], jnp.int32)
        return jax.lax.fori_loop(0, sampling.steps, step, (x, jnp.ones(x.shape, bool)))[0]

    def _seen(self, codes, x, is_hidden):
        x = jnp.where(is_hidden[..., None], 0, codes.from_codes(x))
        return jnp.concatenate([x, is_hidden[..., None].astype(x.dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Metric(_OnCodes):
    """From codes at random along softmax(-beta d(x, x_1)), d being the squared distance of
    embeddings, to the data x_1 (URSA, arXiv:2510.24717); beta = scale ((1 - level) / level)^power.

    Samples jump from code to code, which may revise each as long as they are drawn.
    """

    samplers: ClassVar[tuple[str, ...]] = ("jumps",)
    more_channels: ClassVar[int] = 0
    beta_scale: float = 3.0
    beta_power: float = 0.9

    def beta(self, level: jax.Array) -> jax.Array:
        """Of noise levels (...) from above 0 to 1."""
        level = jnp.maximum(level, 1e-6)
        return self.beta_scale * ((1 - level) / level) ** self.beta_power

    def loss(self, network, codes, x, noise, level_B):
        beta = jnp.broadcast_to(self.beta(level_B)[:, None, None, None], x.shape)
        x_t = self._by_digit(codes, discrete.on_path, [x], [beta], noise)
        out = network(codes.from_codes(x_t), level_B * TIME_SCALE)
        return jnp.mean(self._cross_entropy(network, codes, out, x), axis=(1, 2, 3))

    def sample(self, network, codes, noise, sampling, draw=None):
        _sampler(self, sampling)
        times = self._times(sampling)
        sizes = [len(table) for table in codes.digits()]
        start = [discrete.at_random(noise[..., i], n) for i, n in enumerate(sizes)]
        betas = self.beta(times)

        def clean(x, i):
            out = network(codes.from_codes(x), jnp.full((len(x),), times[i] * TIME_SCALE))
            return self._draw(network, codes, out, draw(2 * i), sampling)[0]

        def step(i, x):
            beta, increase = (
                jnp.broadcast_to(b, x.shape) for b in (betas[i], betas[i + 1] - betas[i])
            )
            return self._by_digit(
                codes, discrete.jump, [x, clean(x, i)], [beta, increase], draw(2 * i + 1)
            )

        last = sampling.steps - 1
        x = jax.lax.fori_loop(0, last, step, discrete.from_digits(start, sizes))
        return clean(x, last)

    def _by_digit(
        self,
        codes: Codes,
        function: Callable[..., jax.Array],
        xs: Sequence[jax.Array],
        given: Sequence[jax.Array],
        uniform: jax.Array,
    ) -> jax.Array:
        """Codes of function(table, *digits of xs, *given, uniform) of each digit."""
        tables = codes.digits()
        sizes = [len(table) for table in tables]
        digits = [discrete.to_digits(x, sizes) for x in xs]
        found = [
            discrete.in_parts(
                functools.partial(function, table),
                *(len(table), *(x[i] for x in digits), *given, uniform[..., i]),
            )
            for i, table in enumerate(tables)
        ]
        return discrete.from_digits(found, sizes)


# By the name in the configuration.
OBJECTIVES: dict[str, type] = {
    "flow": RectifiedFlow,
    "ddpm": DDPM,
    "masked": Masked,
    "metric": Metric,
}


def from_fields(fields: Mapping[str, Any]) -> Objective:
    """The objective that a configuration, or a checkpoint's description, names.

    Args:
      fields: `objective`, a key of `OBJECTIVES`, and beside it the fields of that class; those that
        older descriptions lack are as they were.
    """
    kind = OBJECTIVES[fields["objective"]]
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: fields[name] for name in names if name in fields})


def to_fields(objective: Objective) -> dict[str, Any]:
    """What `from_fields` takes, for JSON; the same keys for every objective."""
    (name,) = (name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    defaults: dict[str, Any] = {}
    for kind in OBJECTIVES.values():
        defaults = dataclasses.asdict(kind()) | defaults
    return {"objective": name, **defaults, **dataclasses.asdict(objective)}
