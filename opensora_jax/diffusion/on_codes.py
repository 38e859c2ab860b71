"""Objectives on codes themselves: masks, or a path of ever nearer codes; the mathematics is
`diffusion.discrete`'s.

Shape suffixes: B batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from opensora_jax.diffusion import discrete, flow
from opensora_jax.diffusion.objective import Codes, Network, Sizes, sampler_of
from opensora_jax.diffusion.samplers import TIME_SCALE
from opensora_jax.diffusion.sampling import Sampling

CODE_HEADS = ("auto", "joint", "factorized")

# Numbers of each code that the last layer of a joint head makes the logits of all codes of.
_FEATURES = 32


class Evidence(NamedTuple):
    """What the codes that are seen say of the clean ones by themselves: those on a path, and beta,
    (B, T, H, W) each."""

    x_t: jax.Array
    beta: jax.Array


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

    def _n_values(self, codes: Codes) -> Sequence[int]:
        """How many values each distribution is over."""
        return [len(codes.table)] if self._is_joint(codes) else codes.levels

    def sample_levels(self, key, n):
        return flow.shift_times(jax.random.uniform(key, (n,)), self.time_shift)

    def _times(self, sampling: Sampling) -> jax.Array:
        """Levels (steps + 1,) of samples, from the noise down to the data."""
        return flow.shift_times(jnp.linspace(1.0, 0.0, sampling.steps + 1), self.time_shift)

    def _by_head(
        self,
        function: Callable[..., Any],
        network: Network,
        codes: Codes,
        out: jax.Array,
        arrays: Sequence[jax.Array],
        evidence: Evidence | None,
    ) -> list[Any]:
        """function(logits, array) of each distribution, of which each array is one's."""
        is_joint, sizes = self._is_joint(codes), self._n_values(codes)
        outs = [out] if is_joint else jnp.split(out, np.cumsum(sizes)[:-1], axis=-1)
        tables, seen = [None] * len(sizes), None
        if evidence:
            tables = [codes.table] if is_joint else codes.digits()
            seen = discrete.to_digits(evidence.x_t, sizes)

        def of_positions(table, out, array, *evidence):
            logits = network.to_logits(out) if network.to_logits else out
            if evidence:
                x_t, beta = evidence
                logits -= beta[..., None] * discrete.distances(table, x_t)
            return function(logits, array)

        found = []
        for i, n in enumerate(sizes):
            more = (seen[i], evidence.beta) if evidence else ()
            of_head = functools.partial(of_positions, tables[i])
            found.append(discrete.in_parts(of_head, n, outs[i], arrays[i], *more))
        return found

    def _cross_entropy(
        self,
        network: Network,
        codes: Codes,
        out: jax.Array,
        x: jax.Array,
        evidence: Evidence | None = None,
    ) -> jax.Array:
        """(B, T, H, W) of the codes x by the network's outputs."""
        digits = discrete.to_digits(x, self._n_values(codes))
        return sum(self._by_head(discrete.cross_entropy, network, codes, out, digits, evidence))

    def _draw(
        self,
        network: Network,
        codes: Codes,
        out: jax.Array,
        uniform: jax.Array,
        sampling: Sampling,
        evidence: Evidence | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Clean codes (B, T, H, W) by the network's outputs, and the logarithms of their
        probabilities; of numbers (..., digits) in [0, 1)."""

        def draw(logits, uniform):
            return discrete.draw(logits, uniform, sampling.temperature, sampling.top_p)

        sizes = self._n_values(codes)
        uniforms = [uniform[..., i] for i in range(len(sizes))]
        drawn = self._by_head(draw, network, codes, out, uniforms, evidence)
        digits, logs = zip(*drawn, strict=True)
        return discrete.from_digits(digits, sizes), sum(logs)

    def noise(self, key, shape, codes):
        return jax.random.uniform(key, (*shape, len(codes.levels) or 1))


@dataclasses.dataclass(frozen=True)
class Masked(_OnCodes):
    """MaskGIT's (arXiv:2202.04200; of videos MAGVIT, arXiv:2212.05199): codes behind a mask are to
    be told from the others; samples are made of the codes that the network is surest of, ever more
    of them. A masked code is an embedding of zeros, and a channel more says so."""

    name: ClassVar[str] = "masked"
    samplers: ClassVar[tuple[str, ...]] = ("confidence",)
    more_channels: ClassVar[int] = 1

    def loss(self, network, codes, x, noise, level_B, unknown=None):
        share_B = discrete.share_hidden(level_B)
        is_hidden = noise[..., 0] < share_B[:, None, None, None]
        if unknown is not None:
            is_hidden &= unknown
        out = network(self._seen(codes, x, is_hidden), level_B * TIME_SCALE)
        entropy = self._cross_entropy(network, codes, out, x) * is_hidden
        axes = (1, 2, 3)
        return jnp.sum(entropy, axes) / jnp.maximum(jnp.sum(is_hidden, axes), 1)

    def sample(self, network, codes, noise, sampling, draw=None, unknown=None):
        sampler_of(self, sampling)
        times = self._times(sampling)
        start = jnp.ones(noise.shape[:4], bool) if unknown is None else unknown
        n = jnp.sum(start, axis=(1, 2, 3), keepdims=True)

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
        return jax.lax.fori_loop(0, sampling.steps, step, (x, start))[0]

    def _seen(self, codes, x, is_hidden):
        x = jnp.where(is_hidden[..., None], 0, codes.from_codes(x))
        return jnp.concatenate([x, is_hidden[..., None].astype(x.dtype)], axis=-1)


@dataclasses.dataclass(frozen=True)
class Metric(_OnCodes):
    """From codes at random along softmax(-beta d(x, x_1)), d being the squared distance of
    embeddings, to the data x_1 (URSA, arXiv:2510.24717); beta = scale ((1 - level) / level)^power.

    The logits are the network's minus beta d(x_t, x_1), which is what x_t itself says of x_1 (but
    for what depends on x_1 and the level alone): of each code the network has to learn only what
    the others say. Samples jump from code to code, which may revise each as long as they are drawn.
    """

    name: ClassVar[str] = "metric"
    samplers: ClassVar[tuple[str, ...]] = ("jumps",)
    more_channels: ClassVar[int] = 0
    beta_scale: float = 3.0
    beta_power: float = 0.9

    def sizes(self, codes):
        codes.digits()  # there are some
        return super().sizes(codes)

    def beta(self, level: jax.Array) -> jax.Array:
        """Of noise levels (...) from above 0 to 1."""
        level = jnp.maximum(level, 1e-6)
        return self.beta_scale * ((1 - level) / level) ** self.beta_power

    def loss(self, network, codes, x, noise, level_B, unknown=None):
        beta = jnp.broadcast_to(self.beta(level_B)[:, None, None, None], x.shape)
        x_t = self._by_digit(codes, discrete.on_path, [x], [beta], noise)
        out = network(codes.from_codes(x_t), level_B * TIME_SCALE)
        entropy = self._cross_entropy(network, codes, out, x, Evidence(x_t, beta))
        return jnp.mean(entropy, axis=(1, 2, 3), where=unknown)

    def sample(self, network, codes, noise, sampling, draw=None, unknown=None):
        sampler_of(self, sampling)
        times = self._times(sampling)
        sizes = [len(table) for table in codes.digits()]
        start = [discrete.at_random(noise[..., i], n) for i, n in enumerate(sizes)]
        betas = self.beta(times)

        def clean(x, i):
            out = network(codes.from_codes(x), jnp.full((len(x),), times[i] * TIME_SCALE))
            seen = Evidence(x, jnp.broadcast_to(betas[i], x.shape))
            return self._draw(network, codes, out, draw(2 * i), sampling, seen)[0]

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
