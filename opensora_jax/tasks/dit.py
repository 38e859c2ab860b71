"""Training of the DiT on code embeddings, and sampling, with either objective."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from opensora_jax import mesh as mesh_lib
from opensora_jax.diffusion import discrete, samplers
from opensora_jax.diffusion.objective import Network, Objective
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.mesh import PyTree
from opensora_jax.models.codebook import nearest_codes
from opensora_jax.models.dit import PLAIN, DiT, DiTConfig, Execution
from opensora_jax.models.fsq import FSQ
from opensora_jax.tasks import frames
from opensora_jax.tasks.frames import Known

# Where validation measures the loss: losses look flat over training when levels are mixed.
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """Normalized embeddings of codes.

    Attributes:
      table: (n_codes, dim) float32.
      levels: of the codebook, where it is a grid (`models.fsq`): then codes are found by rounding.
    """

    table: np.ndarray
    levels: tuple[int, ...] = ()

    @classmethod
    def normalized(
        cls, codebook: np.ndarray, code_counts: np.ndarray, levels: tuple[int, ...] = ()
    ) -> "Latents":
        """Embeddings of mean 0 and variance 1 in each channel over the data's codes, of less where
        the data's vary little among all of the codebook: noise may be any.

        Args:
          codebook: (n_codes, dim) float32.
          code_counts: (n_codes,), how often each code occurs in the data.
        """
        share = (code_counts / code_counts.sum())[:, None]
        mean = (codebook * share).sum(axis=0)
        std = np.sqrt((((codebook - mean) ** 2) * share).sum(axis=0))
        std = np.maximum(std, np.maximum(codebook.std(axis=0) / 2, 1e-6))
        table = np.asarray((codebook - mean) / std, np.float32)
        return cls(table, levels)

    def n_components(self, code_counts: np.ndarray, variance: float) -> int:
        """How many principal components hold this share of the variance over the data's codes.

        Raises:
          ValueError: there is none, since all of the data is one code.
        """
        held = np.cumsum(self._principal_axes(code_counts)[0])
        if not held[-1] > 0:
            raise ValueError(
                "all of the data is one code: expected a tokenizer that tells it apart"
            )
        return int(np.searchsorted(held / held[-1], variance)) + 1

    def principal(self, code_counts: np.ndarray, n: int) -> "Latents":
        """The first n principal components, scaled alike to a variance of 1 in the mean.

        A codebook lies in few of its dimensions, and in the others noise is all there is.
        """
        share = (code_counts / code_counts.sum())[:, None]
        table = self.table @ self._principal_axes(code_counts)[1][:, :n]
        table = np.asarray(table / np.sqrt((table**2 * share).sum() / n), np.float32)
        return Latents(table, self.levels)

    def _principal_axes(self, code_counts):
        """Variances (dim,), the largest first, and directions (dim, dim), one a column."""
        share = (code_counts / code_counts.sum())[:, None]
        table = self.table.astype(np.float64)
        variance, directions = np.linalg.eigh((table * share).T @ table)
        return np.maximum(variance[::-1], 0), directions[:, ::-1]

    def hidden_level(self, code_counts: np.ndarray, n: int = 512) -> float:
        """The level t of noise at which the nearest code of (1 - t) x + t noise is right half the
        time, x being the embeddings of the data's codes: measured on `n` of them."""
        rng = np.random.default_rng(0)
        codes = rng.choice(len(self.table), n, p=code_counts / code_counts.sum())
        clean, noise = self.table[codes], rng.standard_normal((n, self.channels), np.float32)
        half_norm = (self.table**2).sum(axis=1) / 2

        def share_right(t):
            # Nearest among the shrunken codes, which is as near as noise lets one tell.
            scores = (clean + t / (1 - t) * noise) @ self.table.T - half_norm
            return (scores.argmax(axis=1) == codes).mean()

        low, high = 0.0, 1.0
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if share_right(middle) > 0.5 else (low, middle)
        return low

    @property
    def channels(self) -> int:
        return self.table.shape[1]

    def digits(self) -> list[np.ndarray]:
        """Of a codebook that is a grid, embeddings (K, 1) of the K values of each dimension; else
        those (n_codes, dim) of all codes.

        Raises:
          ValueError: the embeddings are a grid's, turned.
        """
        if not self.levels:
            return [self.table]
        bases = np.cumprod([1, *self.levels[:-1]])
        rows = [np.arange(n) * base for n, base in zip(self.levels, bases, strict=True)]
        if self.channels == len(self.levels):
            tables = [self.table[row, i, None] for i, row in enumerate(rows)]
            digits = discrete.to_digits(np.arange(len(self.table)), self.levels)
            again = [table[digit, 0] for table, digit in zip(tables, digits, strict=True)]
            if np.allclose(np.stack(again, axis=1), self.table, atol=1e-5):
                return tables
        raise ValueError(
            f"dit.components={self.channels}: expected auto or 0, all dimensions of the grid "
            f"{self.levels} as they are"
        )

    def from_codes(self, codes: jax.Array) -> jax.Array:
        """Codes (...) -> normalized embeddings (..., dim) float32."""
        return jnp.asarray(self.table)[codes]

    def to_codes(self, x: jax.Array) -> jax.Array:
        """The nearest code (...) int32 of each denoised embedding (..., dim)."""
        if self.levels:
            back, offset = self._to_grid
            grid = jnp.matmul(x, back, precision=jax.lax.Precision.HIGHEST) + offset
            return FSQ(self.levels).nearest(grid)
        return nearest_codes(x.reshape(-1, self.channels), jnp.asarray(self.table)).reshape(
            x.shape[:-1]
        )

    @functools.cached_property
    def _to_grid(self) -> tuple[np.ndarray, np.ndarray]:
        """Matrix and offset that lead from normalized embeddings back to the grid's own."""
        with jax.ensure_compile_time_eval():  # it may first be asked for while tracing
            grid = np.asarray(FSQ(self.levels).codebook())
        with_one = np.concatenate([self.table, np.ones((len(self.table), 1))], axis=1)
        solution = np.linalg.lstsq(with_one, grid, rcond=None)[0].astype(np.float32)
        return solution[:-1], solution[-1]


class DiTTask:
    """Batches: {"codes": int32 (B, T, H, W), "text": (B, S, D), "text_length": int32 (B,)}.

    Args:
      config: of a model of `objective.sizes`.
      caption_dropout: share of examples that see the null text, for classifier-free guidance.
    """

    def __init__(
        self,
        config: DiTConfig,
        latents: Latents,
        objective: Objective,
        *,
        execution: Execution = PLAIN,
        caption_dropout: float = 0.0,
    ):
        self.config, self.latents, self.objective = config, latents, objective
        self._execution, self._caption_dropout = execution, caption_dropout
        model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0), execution=execution))
        self._graphdef, self._params, _ = nnx.split(model, nnx.Param, ...)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        model = DiT(self.config, rngs=nnx.Rngs(key), execution=self._execution)
        _, params, _ = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), {}

    def param_shardings(self, mesh: Mesh) -> PyTree:
        shardings = mesh_lib.param_shardings(self._params, mesh_lib.DIT_RULES, mesh)
        return nnx.to_pure_dict(shardings)

    def cast(self, params: PyTree) -> PyTree:
        """Weights in the dtype that the model computes in, to sample with; the given ones go."""
        dtype = self._execution.dtype
        if dtype == jnp.float32:
            return params
        shardings = jax.tree.map(lambda x: x.sharding, params)
        cast = jax.jit(
            lambda params: jax.tree.map(lambda x: x.astype(dtype), params),
            out_shardings=shardings,
            donate_argnums=0,
        )
        return cast(params)

    def model(self, params: PyTree) -> DiT:
        return nnx.merge(self._graphdef, params, {})

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        batch: dict[str, jax.Array],
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        level_key, noise_key, drop_key = jax.random.split(key, 3)
        b = batch["codes"].shape[0]
        drop_B = jax.random.uniform(drop_key, (b,)) < self._caption_dropout
        level_B = self.objective.sample_levels(level_key, b)
        noise = self.noise(noise_key, batch["codes"].shape)
        known_BT = None
        if self.config.conditioning == "frames":
            known_BT = frames.draw(jax.random.fold_in(key, 3), *batch["codes"].shape[:2])
        return self._loss(params, batch, level_B, noise, drop_B, known_BT), (extra, {})

    def eval_step(
        self, params: PyTree, batch: dict[str, jax.Array], key: jax.Array, accumulate: int = 1
    ) -> dict[str, jax.Array]:
        """The training loss (ddpm: error plus bound) at each of `NOISE_LEVELS`, and their mean.

        The same whatever `accumulate`, the number of microbatches that are computed one by one.
        No frames are known, so that models of either conditioning compare.
        """
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(batch["codes"])))
        parts = mesh_lib.microbatches({**batch, "key": keys_B}, accumulate)

        def loss(level):
            def part_loss(part):
                shape = part["codes"].shape[1:]
                noise = jax.vmap(lambda key: self.noise(key, shape))(part["key"])
                level_B = jnp.full(part["text_length"].shape, level)
                return self._loss(params, part, level_B, noise, None)

            return jnp.mean(jax.lax.map(part_loss, parts))

        # One after the other, and not compiled once for each.
        losses = jax.lax.map(loss, jnp.array(NOISE_LEVELS))
        named = {f"validation_loss/t={t}": x for t, x in zip(NOISE_LEVELS, losses, strict=True)}
        return {**named, "validation_loss": jnp.mean(losses)}

    def _loss(self, params, batch, level_B, noise, drop_B, known_BT=None):
        codes = batch["codes"]
        known = self._known(codes, known_BT)
        network = self._network(params, batch["text"], batch["text_length"], drop_B, known)
        unknown = None if known is None else known.unknown
        loss_B = self.objective.loss(network, self.latents, codes, noise, level_B, unknown)
        return jnp.mean(loss_B)

    def _known(self, codes, known_BT) -> Known | None:
        """Of these codes, by default none known; None for a model that knows text alone."""
        if self.config.conditioning == "text":
            return None
        if known_BT is None:
            known_BT = jnp.zeros(codes.shape[:2], bool)
        return Known(self.latents.from_codes(codes), known_BT)

    def _network(self, params, text, text_length, drop_B, known) -> Network:
        """The model for these texts and frames."""
        model = self.model(params)
        network = Network(
            lambda x, time_B: model(x, time_B, text, text_length, drop_B), model.to_logits
        )
        return network if known is None else known.condition(network)

    def noise(self, key: jax.Array, shape: Sequence[int]) -> jax.Array:
        """For codes of this shape, (..., numbers): what training adds and samples begin with."""
        return self.objective.noise(key, shape, self.latents)

    def sample(
        self,
        params: PyTree,
        text: jax.Array,
        text_length: jax.Array,
        noise: jax.Array,
        keys_B: jax.Array | None = None,
        known: tuple[jax.Array, jax.Array] | None = None,
        *,
        sampling: Sampling,
    ) -> jax.Array:
        """Codes (B, T, H, W) int32 for text (B, S, D) from `noise` of this shape.

        Args:
          keys_B: for samplers that draw more noise, for each example by its key.
          known: codes (B, T, H, W), and of which frames (B, T) they are known: they stay. Only for
            models of conditioning "frames".
        """
        b = len(text_length)
        given = self._known(*(known or (jnp.zeros(noise.shape[:4], jnp.int32), None)))
        conditional = self._network(params, text, text_length, jnp.zeros(b, bool), given)
        # In one batch, side by side: so both of an example are on one device.
        drop = jnp.tile(jnp.array([False, True]), b)
        text_2, length_2, given_2 = jax.tree.map(
            lambda x: x.repeat(2, axis=0), (text, text_length, given)
        )
        twice = self._network(params, text_2, length_2, drop, given_2)

        def both(x, time_B):
            out = twice(x.repeat(2, axis=0), time_B.repeat(2))
            return out[::2], out[1::2]

        # Of logits, too, guidance is that of what a linear layer makes them of.
        n_guided = self.objective.sizes(self.latents).n_guided
        guided = samplers.guide(conditional, both, sampling, n_guided)

        def draw(step):
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            return jax.vmap(lambda key: self.noise(key, noise.shape[1:4]))(keys)

        codes = self.objective.sample(
            Network(guided, conditional.to_logits),
            *(self.latents, noise, sampling),
            None if keys_B is None else draw,
            None if given is None else given.unknown,
        )
        return codes if known is None else jnp.where(given.unknown, codes, known[0])
