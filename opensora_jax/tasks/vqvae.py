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
from opensora_jax.models import discriminator
from opensora_jax.models.codebook import perplexity
from opensora_jax.models.cosmos import Cosmos, CosmosConfig
from opensora_jax.models.discriminator import Discriminator
from opensora_jax.models.perceptual import Perceptual
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig

# By the name that `config.vqvae` and model.json say.
ARCHITECTURES = {"videogpt": (VQVAEConfig, VQVAE), "cosmos": (CosmosConfig, Cosmos)}
# Of model.json, which older ones lack.
NEW_KEYS = ("architecture", "levels")
# In the parameters of a training, and, its width, in model.json.
DISCRIMINATOR = "discriminator"
_AVERAGES = "logits"  # in the rest of its state
_AVERAGE_DECAY = 0.99


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """An adversary that is trained beside a tokenizer.

    Attributes:
      width: of its networks.
      weight: in the tokenizer's loss.
      start: the step from which on it is trained, and counts.
    """

    width: int
    weight: float = 0.0
    start: int = 0


def describe(
    config: VQVAEConfig | CosmosConfig, adversarial: Adversarial | None = None
) -> dict[str, Any]:
    """What model.json says of a tokenizer and its training's adversary."""
    name = next(name for name, (kind, _) in ARCHITECTURES.items() if type(config) is kind)
    described = {"architecture": name, **dataclasses.asdict(config)}
    return described | ({DISCRIMINATOR: adversarial.width} if adversarial else {})


def from_description(found: Mapping[str, Any]) -> "VQVAETask":
    """A task whose parameters are those that `describe` tells of.

    Raises:
      TypeError, ValueError, OverflowError: it describes no tokenizer.
    """
    sizes = dict(found)
    name, width = sizes.pop("architecture", "videogpt"), sizes.pop(DISCRIMINATOR, 0)
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name}: expected one of {', '.join(ARCHITECTURES)}")
    adversarial = Adversarial(int(width)) if width else None
    return VQVAETask(ARCHITECTURES[name][0](**sizes), adversarial=adversarial)


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
      perceptual: a distance of images that is added, of one frame of each clip, and its weight.
      adversarial: an adversary, whose parameters are among this task's.
      trains_encoder: False: what codes depend on stays as it is, and the decoder alone learns.
      start_from: a tokenizer that the training begins with.
    """

    def __init__(
        self,
        config: VQVAEConfig | CosmosConfig,
        *,
        dtype: jnp.dtype = jnp.float32,
        quantize_between: tuple[int, int] = (-1, 0),
        end_weight: float = 1.0,
        distance: str = "l2",
        perceptual: tuple[Perceptual, float] | None = None,
        adversarial: Adversarial | None = None,
        trains_encoder: bool = True,
        start_from: Tokenizer | None = None,
    ):
        self.config, self._dtype = config, dtype
        self._quantize_between, self._end_weight = quantize_between, end_weight
        self._distance, self._perceptual = distance, perceptual
        self.adversarial, self._trains_encoder = adversarial, trains_encoder
        self._start_from = start_from
        self._kind = next(model for kind, model in ARCHITECTURES.values() if type(config) is kind)
        model = nnx.eval_shape(lambda: self._kind(config, rngs=nnx.Rngs(0), dtype=dtype))
        self._graphdef, self._params, _ = nnx.split(model, nnx.Param, ...)
        if adversarial:
            adversary = nnx.eval_shape(lambda: self._new_adversary(jax.random.key(0)))
            self._adversary, self._adversary_params = nnx.split(adversary)

    def _new_adversary(self, key: jax.Array) -> Discriminator:
        return Discriminator(self.adversarial.width, rngs=nnx.Rngs(key), dtype=self._dtype)

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        model = self._start_from or self._kind(self.config, rngs=nnx.Rngs(key), dtype=self._dtype)
        _, params, extra = nnx.split(model, nnx.Param, ...)
        params, extra = nnx.to_pure_dict(params), nnx.to_pure_dict(extra)
        if self.adversarial:
            adversary = nnx.state(self._new_adversary(jax.random.fold_in(key, 1)))
            params |= {DISCRIMINATOR: nnx.to_pure_dict(adversary)}
            extra |= {_AVERAGES: {"real": jnp.zeros(()), "fake": jnp.zeros(())}}
        return params, extra

    def param_shardings(self, mesh: Mesh) -> PyTree:
        def shardings(params):
            return nnx.to_pure_dict(mesh_lib.param_shardings(params, mesh_lib.VQVAE_RULES, mesh))

        found = shardings(self._params)
        if self.adversarial:
            found |= {DISCRIMINATOR: shardings(self._adversary_params)}
        return found

    def model(self, params: PyTree, extra: PyTree) -> Tokenizer:
        """The tokenizer of a state, in evaluation mode."""
        model = self._merge(params, extra)
        model.eval()
        return model

    def _merge(self, params: PyTree, extra: PyTree) -> Tokenizer:
        mine = (_without(params, DISCRIMINATOR), _without(extra, _AVERAGES))
        return nnx.merge(self._graphdef, *mine)

    def loss(
        self,
        params: PyTree,
        extra: PyTree,
        batch: dict[str, jax.Array],
        key: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[PyTree, dict[str, jax.Array]]]:
        model = self._merge(params, extra)
        if self._trains_encoder:
            model.train()
        else:
            model.eval()  # batch statistics as well stay as they are
        start, end = self._quantize_between
        share = jnp.clip((step - start) / max(end - start, 1), 0.0, 1.0)
        video = to_float(batch["video"])
        out = model.losses(
            video,
            key if self._trains_encoder else None,
            share,
            self._end_weight,
            self._distance,
            self._trains_encoder,
        )
        _, _, new_extra = nnx.split(model, nnx.Param, ...)
        new_extra = nnx.to_pure_dict(new_extra)
        total, metrics = self._total(out), self._metrics(out)
        if self._perceptual:
            distance, weight = self._perceptual
            frame = jax.random.randint(jax.random.fold_in(key, 2), (), 0, video.shape[1])
            metrics["perceptual_loss"] = distance(out["recon"][:, frame], video[:, frame])
            total += weight * metrics["perceptual_loss"]
        if self.adversarial:
            added, averages, seen = jax.lax.cond(
                step >= self.adversarial.start,
                self._contest,
                lambda adversary, averages, video, recon: (
                    jnp.zeros(()),
                    averages,
                    {"adversarial_loss": jnp.zeros(()), "discriminator_loss": jnp.zeros(())},
                ),
                *(params[DISCRIMINATOR], extra[_AVERAGES], video, out["recon"]),
            )
            total += added
            new_extra, metrics = new_extra | {_AVERAGES: averages}, metrics | seen
        return total, (new_extra, metrics)

    def _contest(self, adversary, averages, video, recon):
        """What the adversary adds to the loss, by gradients that go to one side each; the averages
        of its logits; what to watch."""
        frozen = nnx.merge(self._adversary, jax.lax.stop_gradient(adversary))
        learning = nnx.merge(self._adversary, adversary)
        fools = -jnp.mean(frozen(recon))
        real, fake = learning(video), learning(jax.lax.stop_gradient(recon))
        tells = discriminator.loss(real, fake, averages)
        logits = {"real": jnp.mean(real), "fake": jnp.mean(fake)}
        averages = jax.tree.map(
            lambda old, new: _AVERAGE_DECAY * old + (1 - _AVERAGE_DECAY) * new,
            averages,
            jax.lax.stop_gradient(logits),
        )
        seen = {"adversarial_loss": fools, "discriminator_loss": tells}
        return self.adversarial.weight * fools + tells, averages, seen

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


def _without(tree: PyTree, name: str) -> PyTree:
    return {key: value for key, value in tree.items() if key != name}
