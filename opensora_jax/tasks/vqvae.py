"""Training of a video tokenizer on clips, whichever its network."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from opensora_jax import mesh as mesh_lib
from opensora_jax.mesh import PyTree
from opensora_jax.models.codebook import perplexity
from opensora_jax.models.cosmos import Cosmos, CosmosConfig
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig

# By the name that `config.vqvae` and model.json say.
ARCHITECTURES = {"videogpt": (VQVAEConfig, VQVAE), "cosmos": (CosmosConfig, Cosmos)}
# Of model.json, which older ones lack.
NEW_KEYS = ("architecture", "levels")


def describe(config: VQVAEConfig | CosmosConfig) -> dict[str, Any]:
    """What model.json says of a tokenizer."""
    name = next(name for name, (kind, _) in ARCHITECTURES.items() if type(config) is kind)
    return {"architecture": name, **dataclasses.asdict(config)}


def from_description(found: Mapping[str, Any]) -> VQVAEConfig | CosmosConfig:
    """The inverse of `describe`.

    Raises:
      TypeError, ValueError, OverflowError: it describes no tokenizer.
    """
    sizes = dict(found)
    name = sizes.pop("architecture", "videogpt")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name][0](**sizes)


def to_float(video: jax.Array) -> jax.Array:
    """uint8 -> float32 in [-0.5, 0.5], with videos sharded over devices."""
    video = mesh_lib.constrain(video, "clip", None, None, None, None)
    return video.astype(jnp.float32) / 255.0 - 0.5


def to_uint8(video: jax.Array) -> jax.Array:
    """Float in [-0.5, 0.5], clipped -> uint8."""
    return jnp.round((jnp.clip(video, -0.5, 0.5) + 0.5) * 255.0).astype(jnp.uint8)


class VQVAETask:
    """Batches: {"video": uint8 (B, T, H, W, 3)}; `extra` is batch statistics and the codebook.

    Args:
      quantize_between: steps between which training examples go over from continuous latents to
        quantized ones, more and more of them; by default all are quantized from the first step.
      end_weight: of the first and last frame of a clip in the loss, which see frames on one side
        only; 1: all alike.
      distance: l2 or l1, of reconstructions.
    """

    def __init__(
        self,
        config: VQVAEConfig | CosmosConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        quantize_between: tuple[int, int] = (-1, 0),
        end_weight: float = 1.0,
        distance: str = "l2",
    ):
        self.config, self._dtype = config, dtype
        self._quantize_between, self._end_weight = quantize_between, end_weight
        self._distance = distance
        self._kind = next(model for kind, model in ARCHITECTURES.values() if type(config) is kind)
        model = nnx.eval_shape(lambda: self._kind(config, rngs=nnx.Rngs(0), dtype=dtype))
        self._graphdef, self._params, _ = nnx.split(model, nnx.Param, ...)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        model = self._kind(self.config, rngs=nnx.Rngs(key), dtype=self._dtype)
        _, params, extra = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(extra)

    def param_shardings(self, mesh: Mesh) -> PyTree:
        shardings = mesh_lib.param_shardings(self._params, mesh_lib.VQVAE_RULES, mesh)
        return nnx.to_pure_dict(shardings)

    def model(self, params: PyTree, extra: PyTree) -> Tokenizer:
        """The model of a state, in evaluation mode."""
        model = nnx.merge(self._graphdef, params, extra)
        model.eval()
        return model

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        batch: dict[str, jax.Array],
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        model = nnx.merge(self._graphdef, params, extra)
        model.train()
        start, end = self._quantize_between
        share = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        out = model.losses(to_float(batch["video"]), key, share, self._end_weight, self._distance)
        _, _, extra = nnx.split(model, nnx.Param, ...)
        return self._total(out), (nnx.to_pure_dict(extra), self._metrics(out))

    def eval_step(
        self, params: PyTree, extra: PyTree, batch: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(scalars, {"recon": uint8 videos, "codes": ...}) with the statistics as they stand."""
        out = self.model(params, extra).losses(to_float(batch["video"]), distance=self._distance)
        scalars = {"loss": self._total(out), **self._metrics(out)}
        return scalars, {"recon": to_uint8(out["recon"]), "codes": out["codes"]}

    def _total(self, out: dict[str, jax.Array]) -> jax.Array:
        return out["recon_loss"] + out["commitment_loss"]

    def _metrics(self, out: dict[str, jax.Array]) -> dict[str, jax.Array]:
        perplexity_, n_used = perplexity(out["codes"], self.config.n_codes)
        return {
            "recon_loss": out["recon_loss"],
            "commitment_loss": out["commitment_loss"],
            "perplexity": perplexity_,
            "codes_used": n_used,
        }
