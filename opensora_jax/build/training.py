"""Trainings as a configuration describes them: tasks, optimizers, settings, shares of batches."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import files, hardware
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.diffusion import objectives
from opensora_jax.models import flops
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.tasks.vqvae import VQVAETask
from opensora_jax.train import optim
from opensora_jax.train.settings import LoopSettings, StepSettings, Throughput


def vqvae_task(c: ConfigDict) -> VQVAETask:
    """The task of `config.vqvae`."""
    return VQVAETask(
        networks.vqvae_config(c),
        dtype=networks.compute_dtype(c.dtype),
        quantize_between=(int(c.quantize_from * c.steps), int(c.quantize_to * c.steps)),
        end_weight=c.end_weight,
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
    platform: str | None = None,
) -> DiTTraining:
    """What `config` makes of latents of this (T, H, W) `grid` and texts of these sizes.

    Args:
      platform: cpu, gpu or tpu, that it is to run on; None: what this process runs on.

    Raises:
      ValueError: where the patch does not divide the grid.
    """
    c = config.dit
    if any(n % c.patch for n in grid[1:]):
        raise ValueError(
            f"dit.patch={c.patch}: expected a divisor of the latents' {grid[1]}x{grid[2]}"
        )
    objective = objectives.from_fields(c)
    dit = networks.dit_config(
        c,
        channels=latents.channels,
        out_channels=objective.outputs * latents.channels,
        text_width=text_width,
    )
    task = DiTTask(
        dit,
        latents,
        objective,
        execution=networks.execution(c, dit, platform),
        caption_dropout=c.caption_dropout,
    )
    tx, schedule = optimizer(c)
    tokens = c.batch_size * math.prod(grid) // c.patch**2
    n_flops = flops.dit_step_flops(dit, grid=grid, text_length=text_length, batch_size=c.batch_size)
    return DiTTraining(
        task=task,
        tx=tx,
        schedule=schedule,
        step_settings=step_settings(c, config.seed),
        throughput=throughput(tokens, n_flops),
    )


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
