"""What the training stages share: from the configuration to models, optimizers and shares."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import files, hardware
from opensora_jax import mesh as mesh_lib
from opensora_jax.diffusion.objectives import OBJECTIVES
from opensora_jax.models import dit, flops
from opensora_jax.models.dit import DiT
from opensora_jax.models.vqvae import VQVAE
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.train import optim
from opensora_jax.train.settings import LoopSettings, StepSettings, Throughput


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype that `name` says; "auto" is bfloat16 but for CPUs, which only emulate it."""
    if name == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(name)


def vqvae_maker(c: ConfigDict) -> Callable[[nnx.Rngs], VQVAE]:
    """The constructor of the VQ-VAE that `config.vqvae` describes."""

    def make(rngs: nnx.Rngs) -> VQVAE:
        return VQVAE(
            n_codes=c.n_codes,
            embedding_dim=c.embedding_dim,
            n_hiddens=c.n_hiddens,
            n_res_layers=c.n_res_layers,
            downsample=tuple(c.downsample),
            normalize_latents=c.normalize_latents,
            n_frames=c.n_frames,
            rngs=rngs,
            dtype=compute_dtype(c.dtype),
        )

    return make


def dit_arguments(
    c: ConfigDict, *, channels: int, out_channels: int, text_width: int
) -> dict[str, Any]:
    """The arguments of the DiT that `config.dit` describes, for JSON."""
    depth, width, heads = dit.SIZES[c.size] if c.size else (c.depth, c.width, c.heads)
    return {
        "depth": depth,
        "width": width,
        "heads": heads,
        "channels": channels,
        "out_channels": out_channels,
        "patch": c.patch,
        "text_width": text_width,
        "text_mode": c.text_mode,
    }


def dit_maker(
    arguments: dict[str, Any],
    *,
    dtype: str,
    attention: str = "auto",
    remat: str = "none",
    unroll: int = 1,
) -> Callable[[nnx.Rngs], DiT]:
    """The constructor of a DiT with the `arguments` of `dit_arguments`."""
    how = {"attention": attention, "remat": remat, "unroll": unroll}
    return lambda rngs: DiT(**arguments, **how, dtype=compute_dtype(dtype), rngs=rngs)


def optimizer(c: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of `config.vqvae` or `config.dit`, and its learning rates."""
    schedule = optim.schedule(c.learning_rate, c.warmup_steps, c.steps)
    tx = optim.make(
        c.optimizer,
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


def recorded(config: ConfigDict, part: str) -> dict[str, Any]:
    """What checkpoints of `part`, vqvae or dit, say of the configuration, for JSON."""
    chosen = {name: config[name] for name in ("seed", "mesh", "data", part)}
    return json.loads(ConfigDict(chosen).to_json())


@dataclasses.dataclass(frozen=True)
class DiTTraining:
    """The training of a DiT, without its data."""

    dit: dict[str, Any]  # arguments of the model, for JSON
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
) -> DiTTraining:
    """What `config` makes of latents of this (T, H, W) `grid` and texts of these sizes.

    Raises:
      ValueError: where the patch does not divide the grid.
    """
    c = config.dit
    if any(n % c.patch for n in grid[1:]):
        raise ValueError(
            f"dit.patch={c.patch}: expected a divisor of the latents' {grid[1]}x{grid[2]}"
        )
    objective = OBJECTIVES[c.objective](c)
    arguments = dit_arguments(
        c,
        channels=latents.channels,
        out_channels=objective.outputs * latents.channels,
        text_width=text_width,
    )
    task = DiTTask(
        dit_maker(arguments, dtype=c.dtype, attention=c.attention, remat=c.remat, unroll=c.unroll),
        latents,
        caption_dropout=c.caption_dropout,
        objective=objective,
    )
    tx, schedule = optimizer(c)
    tokens = c.batch_size * math.prod(grid) // c.patch**2
    n_flops = flops.dit_step_flops(
        arguments, grid=grid, text_length=text_length, batch_size=c.batch_size
    )
    return DiTTraining(
        dit=arguments,
        task=task,
        tx=tx,
        schedule=schedule,
        step_settings=step_settings(c, config.seed),
        throughput=throughput(tokens, n_flops),
    )


def local_share(mesh: Mesh, batch_size: int) -> dict[str, Any]:
    """Batches and this process's places in them, as arguments of the pipelines."""
    return {"batch_size": batch_size, "indices": mesh_lib.local_batch_indices(mesh, batch_size)}


def is_trained(folder: Path, steps: int) -> bool:
    """Whether a training in `folder` was marked as ended at step `steps` or later."""
    marker = folder / "done.json"
    return marker.exists() and json.loads(marker.read_text())["steps"] >= steps


def mark_trained(folder: Path, steps: int) -> None:
    """Says that the training in `folder` ended, evaluations included."""
    if jax.process_index() == 0:
        files.write_json(folder / "done.json", {"steps": steps})
