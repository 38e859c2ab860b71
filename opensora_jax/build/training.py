"""Trainings as a configuration describes them: tasks, optimizers, settings, shares of batches."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import files, hardware
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.convert import vgg
from opensora_jax.diffusion import objectives
from opensora_jax.diffusion.objective import Objective
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.models import dit, flops
from opensora_jax.models.dit import DiTConfig
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.tasks.vqvae import Adversarial, VQVAETask, describe
from opensora_jax.train import optim
from opensora_jax.train.settings import LoopSettings, StepSettings, Throughput

if TYPE_CHECKING:
    from opensora_jax.data.streaming import Streaming

logger = logging.getLogger(__name__)

# What the principal components that "auto" keeps hold of the embeddings' variance.
VARIANCE = 0.99
# The shift of times that "auto" stands for, of objectives whose tokens it is not measured on.
TIME_SHIFTS = {"ddpm": 1.0, "masked": 1.0, "metric": 6.0}


def vqvae_task(c: ConfigDict, start_from: Tokenizer | None = None) -> VQVAETask:
    """The task of `config.vqvae`.

    Args:
      start_from: the tokenizer of `vqvae.init_from`.

    Raises:
      ValueError: which is of other sizes, or what is no file of `vqvae.perceptual`'s.
    """
    if start_from is not None:
        expect_same_sizes(c, start_from)
    adversarial = None
    if c.adversarial:
        start = int(c.adversarial_from * c.steps)
        adversarial = Adversarial(c.adversarial_width, c.adversarial, start)
    perceptual = None
    if c.perceptual:
        perceptual = (vgg.load_perceptual(c.perceptual), c.perceptual_weight)
    return VQVAETask(
        networks.vqvae_config(c),
        dtype=networks.compute_dtype(c.dtype),
        quantize_between=(int(c.quantize_from * c.steps), int(c.quantize_to * c.steps)),
        end_weight=c.end_weight,
        distance=c.distance,
        perceptual=perceptual,
        adversarial=adversarial,
        trains_encoder=c.train == "all",
        start_from=start_from,
    )


def expect_same_sizes(c: ConfigDict, start_from: Tokenizer) -> None:
    """Sees that the tokenizer of `vqvae.init_from` is what `config.vqvae` c describes.

    Raises:
      ValueError: naming the sizes that differ.
    """
    config = networks.vqvae_config(c)
    there = dataclasses.replace(start_from.config, n_frames=config.n_frames)
    different = files.changes(describe(config), describe(there))
    if different:
        raise ValueError(
            f"config.vqvae.init_from={files.short(c.init_from)}: expected a tokenizer of the "
            f"same sizes: {'; '.join(different)}"
        )


def optimizer(c: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `config.vqvae` or `config.dit`, and its learning rates."""
    schedule = optim.schedule(c.learning_rate, c.warmup_steps, c.steps)
    tx = optim.make(
        c.get("optimizer", "adamw"),  # the VQ-VAE's: it has no stacked blocks
        schedule,
        b1=c.b1,
        b2=c.b2,
        weight_decay=c.weight_decay,
        clip_norm=c.clip_norm,
    )
    return tx, schedule


def step_settings(c: ConfigDict, seed: int) -> StepSettings:
    """The settings of a step of `config.vqvae` or `config.dit`."""
    return StepSettings(seed=seed, ema_decay=c.ema_decay, accumulate=c.accumulate)


def loop_settings(c: ConfigDict, profile: Sequence[int]) -> LoopSettings:
    """The settings of the loop of `config.vqvae` or `config.dit`."""
    return LoopSettings(
        steps=c.steps,
        log_every=c.log_every,
        checkpoint_every=c.checkpoint_every,
        keep_checkpoints=c.keep_checkpoints,
        keep_every=c.keep_every,
        max_skipped_steps=c.max_skipped_steps,
        profile=profile,
    )


def throughput(tokens_per_step: int, flops_per_step: float = 0.0) -> Throughput:
    """What a step does on all devices of this run together; FLOPs of 0 are not known."""
    peak_flops = hardware.peak_flops(jax.devices()[0].device_kind) or 0.0
    return Throughput(tokens_per_step, flops_per_step, peak_flops)


def sampling(c: ConfigDict, **changes: Any) -> Sampling:
    """How `config.sample` draws samples."""
    fields = (field.name for field in dataclasses.fields(Sampling))
    return Sampling(**{name: c[name] for name in fields} | changes)


def recorded(config: ConfigDict, *parts: str) -> dict[str, Any]:
    """What checkpoints say of the configuration, for JSON: of everything shared, and of `parts`."""
    chosen = {name: config[name] for name in ("seed", "mesh", "data", *parts)}
    return json.loads(ConfigDict(chosen).to_json())


@dataclasses.dataclass(frozen=True)
class DiTTraining:
    """The training of a DiT, without its data."""

    task: DiTTask
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    step_settings: StepSettings
    throughput: Throughput


def adopt(c: ConfigDict, model: DiTConfig, objective: Objective) -> ConfigDict:
    """`config.dit` c, of which what is left to choose is as in a model that was begun."""
    c = c.copy_and_resolve_references()
    found = objectives.to_fields(objective)
    with c.ignore_type():  # of a number in the place of "auto"
        c.update({n: found[n] for n in ("prediction", "time_shift") if c[n] == "auto"})
    if c.size and dit.SIZES[c.size][:2] == (model.depth, model.width):
        c.update(size="", depth=model.depth, width=model.width, heads=model.heads)
    return c


def latents(
    c: ConfigDict, codebook: np.ndarray, code_counts: np.ndarray, levels: tuple[int, ...] = ()
) -> Latents:
    """What `config.dit` c denoises of a codebook (n_codes, dim) whose codes occur so often.

    Args:
      levels: of a codebook that is a grid, of which "auto" keeps all dimensions.
    """
    whole = Latents.normalized(codebook, code_counts, levels)
    n = 0 if levels and c.components == "auto" else c.components
    if n == "auto":
        n = whole.n_components(code_counts, VARIANCE)
        logger.info(
            "dit.components: %d of %d hold %.0f%% of the variance of the embeddings",
            *(n, whole.channels, 100 * VARIANCE),
        )
    return whole.principal(code_counts, n) if 0 < n < whole.channels else whole


def choose(c: ConfigDict, latents: Latents, code_counts: np.ndarray | None = None) -> ConfigDict:
    """`config.dit` c with "auto" replaced by what suits these latents, and says what it is.

    The prediction of flow is the velocity, which contains the noise, unless a token holds as many
    numbers as the network is wide: then not all of the noise could pass through it
    (arXiv:2511.13720). That of ddpm is the data: what is off in its noise is off 1 / signal times
    as much in the data, 157 times at the first step of samples (docs/objectives.md). The shift of
    times of flow puts the middle of the levels where noise hides half of the codes, or further: of
    n numbers that say the same, noise sqrt(n) times as large is needed to hide it, and half of that
    is where samples turned out best (docs/performance.md).

    Args:
      code_counts: (n_codes,); None: not known, so that nothing can be measured.
    """
    c = c.copy_and_resolve_references()
    _, width, _ = networks.dit_size(c)
    numbers = latents.channels * c.patch**2
    if c.objective != "flow" and c.time_shift == "auto":
        with c.ignore_type():
            c.time_shift = TIME_SHIFTS[c.objective]
    if c.objective in ("masked", "metric"):
        c.prediction = "velocity"  # of no account
        return c
    noisy = "velocity" if c.objective == "flow" else "noise"
    if c.prediction == "auto":
        is_data = c.objective == "ddpm" or numbers >= width
        c.prediction = "data" if is_data else noisy
        logger.info(
            "dit.prediction: %s, for tokens of %d numbers in a network of width %d",
            *(c.prediction, numbers, width),
        )
    elif c.prediction == noisy and numbers > width:
        logger.warning(
            "dit.prediction=%s: a token holds %d numbers, of which a network of width %d can give "
            "%d: of the noise %.0f%% is out of reach; expected data, or fewer dit.components",
            *(noisy, numbers, width, width, 100 * (1 - width / numbers)),
        )
    if c.time_shift == "auto":
        shift = max(1.0, math.sqrt(numbers) / 2)
        if code_counts is not None:
            level = latents.hidden_level(code_counts)
            shift = round(max(shift, level / (1 - level)), 2)
            logger.info(
                "dit.time_shift: %.2f, for tokens of %d numbers; half of the codes alone are "
                "hidden at the noise level %.2f",
                *(shift, numbers, level),
            )
        with c.ignore_type():
            c.time_shift = shift
    return c


def check_patch(c: ConfigDict, grid: tuple[int, int, int]) -> None:
    """Sees that the patch of `config.dit` c divides the grid evenly.

    Raises:
      ValueError: if it does not.
    """
    if any(n % c.patch for n in grid[1:]):
        raise ValueError(
            f"dit.patch={c.patch}: expected a divisor of the latents' {grid[1]}x{grid[2]}"
        )


def check_sequence(c: ConfigDict, mesh: Mesh, grid: tuple[int, int, int], text_length: int) -> None:
    """Sees that the context axis divides the sequence of `config.dit` c evenly.

    Raises:
      ValueError: if it does not.
    """
    n, devices = math.prod(grid) // c.patch**2, mesh.shape["context"]
    what = f"{n} tokens of a {'x'.join(map(str, grid))} grid in patches of {c.patch}"
    if c.text_mode == "in_context":
        n, what = n + text_length, f"{what} and {text_length} of text"
    if n % devices:
        raise ValueError(f"config.mesh.context={devices}: expected a divisor of the {what}")


def dit_training(
    config: ConfigDict,
    latents: Latents,
    *,
    grid: tuple[int, int, int],
    text_length: int,
    text_width: int,
    extent: tuple[int, int, int] | None = None,
    platform: str | None = None,
) -> DiTTraining:
    """What `config` makes of latents of this (T, H, W) `grid` and texts of these sizes.

    Args:
      grid: of several sizes, with about as many tokens a batch, the largest.
      extent: `DiTConfig.extent`.
      platform: cpu, gpu or tpu, that it is to run on; None: what this process runs on.

    Raises:
      ValueError: where the patch does not divide the grid, or the objective is none for these
        latents.
    """
    c = config.dit
    check_patch(c, grid)
    objective = objectives.from_fields(c)
    sizes = objective.sizes(latents)
    model = networks.dit_config(
        c,
        channels=sizes.n_in,
        out_channels=sizes.n_out,
        n_codes=sizes.n_codes,
        text_width=text_width,
        extent=extent,
    )
    task = DiTTask(
        model,
        latents,
        objective,
        execution=networks.execution(c, model, config.mesh.reduce_dtype, platform),
        caption_dropout=c.caption_dropout,
    )
    tx, schedule = optimizer(c)
    tokens = c.batch_size * math.prod(grid) // c.patch**2
    n_flops = flops.dit_step_flops(
        model, grid=grid, text_length=text_length, batch_size=c.batch_size
    )
    return DiTTraining(
        task=task,
        tx=tx,
        schedule=schedule,
        step_settings=step_settings(c, config.seed),
        throughput=throughput(tokens, n_flops),
    )


def dataset_folders(config: ConfigDict, workdir: epath.PathLike) -> list[epath.Path]:
    """What the DiT is trained on: the datasets of `config.data.dataset`, or `made_datasets`; in the
    place of a folder of buckets those in it.

    Raises:
      DatasetError: such a folder is not finished.
    """
    from opensora_jax.data import bucket_folders  # it brings what a bench does without

    names = config.data.dataset
    named = [epath.Path(n) for n in names.split(",")] if names else made_datasets(config, workdir)
    return [folder for name in named for folder in bucket_folders.datasets(name)]


def streaming(c: ConfigDict) -> "Streaming | None":
    """How `config.data` c reads a dataset where it is; None: it does not."""
    from opensora_jax.data.streaming import Streaming

    # Within what is named, which may hold other things, too.
    folder = Path(c.cache_dir) / "opensora_jax_rows" if c.cache_dir else files.cache() / "rows"
    return Streaming(folder, int(c.cache_gb * 1e9)) if c.stream else None


def made_datasets(config: ConfigDict, workdir: epath.PathLike) -> list[epath.Path]:
    """What the stage `preprocess` makes in the workdir: one for each of its resolutions, or a
    folder of buckets."""
    resolution = config.preprocess.resolution
    if isinstance(resolution, int) or config.preprocess.get("buckets"):
        return [epath.Path(workdir) / "dataset"]
    return [epath.Path(workdir) / f"dataset{n}" for n in resolution]


def local_share(mesh: Mesh, batch_size: int) -> dict[str, Any]:
    """Batches and this process's examples of them, as arguments of the pipelines."""
    return {"batch_size": batch_size, "indices": mesh_lib.local_batch_indices(mesh, batch_size)}


def is_trained(folder: Path, steps: int) -> bool:
    """Whether a training in `folder` was marked as ended at step `steps` or later."""
    marker = folder / "done.json"
    if not marker.exists():
        return False
    found = files.read_json(marker).get("steps")
    if not isinstance(found, int):
        raise ValueError(
            f"{marker}: steps={files.short(found)}: expected a number; remove the file"
        )
    return found >= steps


def mark_trained(folder: Path, steps: int) -> None:
    """Says that the training in `folder` ended, evaluations included."""
    if jax.process_index() == 0:
        files.write_json(folder / "done.json", {"steps": steps})
