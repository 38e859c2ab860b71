"""Checks a configuration before anything is compiled or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

STAGES = ("shapes", "vqvae", "preprocess", "dit", "fidelity", "report")
# Those that several processes do together.
TRAINING_STAGES = ("vqvae", "dit")
DTYPES = ("auto", "float32", "bfloat16")

# Fields that must be above zero, or may be zero but not below.
_POSITIVE = [
    "shapes.n_videos",
    "shapes.n_held_out",
    "shapes.resolution",
    "shapes.fps",
    "shapes.n_captions",
    "vqvae.embedding_dim",
    "vqvae.n_hiddens",
    "vqvae.n_frames",
    "vqvae.resolution",
    "vqvae.batch_size",
    "vqvae.accumulate",
    "vqvae.steps",
    "vqvae.learning_rate",
    "vqvae.clip_norm",
    "vqvae.log_every",
    "vqvae.eval_every",
    "vqvae.checkpoint_every",
    "vqvae.keep_checkpoints",
    "vqvae.max_skipped_steps",
    "preprocess.resolution",
    "preprocess.max_frames",
    "preprocess.batch_size",
    "preprocess.videos_per_part",
    "dit.patch",
    "dit.batch_size",
    "dit.accumulate",
    "dit.unroll",
    "dit.time_shift",
    "dit.steps",
    "dit.learning_rate",
    "dit.clip_norm",
    "dit.log_every",
    "dit.eval_every",
    "dit.checkpoint_every",
    "dit.keep_checkpoints",
    "dit.max_skipped_steps",
    "bench.text_width",
    "sample.steps",
    "sample.guidance",
    "fidelity.n_samples",
    "fidelity.batch_size",
]
_NOT_NEGATIVE = [
    "seed",
    "vqvae.n_res_layers",
    "vqvae.fps",
    "vqvae.warmup_steps",
    "vqvae.weight_decay",
    "vqvae.keep_every",
    "preprocess.fps",
    "preprocess.n_frames",
    "preprocess.window",
    "dit.text_length",
    "dit.n_latent_frames",
    "dit.warmup_steps",
    "dit.weight_decay",
    "dit.keep_every",
]
_SHARES = [
    "vqvae.b1",
    "vqvae.b2",
    "vqvae.ema_decay",
    "vqvae.quantize_from",
    "vqvae.quantize_to",
    "dit.b1",
    "dit.b2",
    "dit.ema_decay",
    "dit.caption_dropout",
    "dit.validation_share",
]


def check(c: ConfigDict, devices: Sequence | None = None) -> None:
    """Checks every field that can be checked without looking at data or devices' memory.

    Args:
      devices: that the mesh is made of; None means those of this run.

    Raises:
      ValueError: naming the field, its value and what was expected.
    """
    from opensora_jax.models import dit
    from opensora_jax.train.optim import OPTIMIZERS

    for name in _POSITIVE:
        _expect(c, name, lambda v: v > 0, "a positive number")
    for name in _NOT_NEGATIVE:
        _expect(c, name, lambda v: v >= 0, "zero or a positive number")
    for name in _SHARES:
        _expect(c, name, lambda v: 0 <= v <= 1, "a number from 0 to 1")
    _expect(c, "stages", lambda v: v and set(v) <= set(STAGES), f"some of {', '.join(STAGES)}")
    _expect(c, "shapes.n_frames", lambda v: v >= 2, "at least 2")
    _expect(c, "vqvae.n_codes", lambda v: v >= 2, "at least 2")
    _expect(
        c,
        "vqvae.downsample",
        lambda v: len(v) == 3 and max(v) > 1 and all(d >= 1 and not d & (d - 1) for d in v),
        "three powers of two, one of them above 1",
    )
    _expect(c, "vqvae.dtype", lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}")
    _expect(c, "dit.dtype", lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}")
    _expect(
        c, "dit.remat", lambda v: v in dit.REMAT_POLICIES, f"one of {', '.join(dit.REMAT_POLICIES)}"
    )
    _expect(
        c, "dit.text_mode", lambda v: v in dit.TEXT_MODES, f"one of {', '.join(dit.TEXT_MODES)}"
    )
    _check_objective(c)
    _expect(c, "dit.optimizer", lambda v: v in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
    _expect(c, "vqvae.optimizer", lambda v: v == "adamw", "adamw: it has no stacked blocks")
    _expect(
        c, "dit.init_from", lambda v: not v or Path(v).is_file(), "a file that is there, or empty"
    )
    sizes = ("", *dit.SIZES)
    _expect(c, "dit.size", lambda v: v in sizes, f"one of {', '.join(dit.SIZES)}, or empty")
    if not c.dit.size:
        for name in ("dit.depth", "dit.width", "dit.heads"):
            _expect(c, name, lambda v: v > 0, "a positive number, since dit.size is empty")
        even = 2 * c.dit.heads
        _expect(
            c, "dit.width", lambda v: v % even == 0, f"an even multiple of dit.heads={c.dit.heads}"
        )
    _check_video(c)
    for part in ("vqvae", "dit"):
        every = c[part].checkpoint_every
        _expect(
            c,
            f"{part}.keep_every",
            lambda v, every=every: v % every == 0,
            f"0, or a multiple of {part}.checkpoint_every={every}",
        )
    _check_devices(c, jax.devices() if devices is None else devices)


def _check_devices(c: ConfigDict, devices: Sequence) -> None:
    from opensora_jax import mesh
    from opensora_jax.models import attention, dit

    names = attention.NAMES
    _expect(c, "dit.attention", lambda v: v in names, f"one of {', '.join(names)}")
    kind = devices[0].platform
    fit = [name for name in names if attention.BACKENDS.get(name) in (None, kind)]
    _expect(c, "dit.attention", lambda v: v in fit, f"one of {', '.join(fit)} on a {kind}")
    shape = mesh.make_mesh(c.mesh, devices).shape
    heads = dit.SIZES[c.dit.size][2] if c.dit.size else c.dit.heads
    if "dit" in c.stages and heads % (shape["context"] * shape["tensor"]):
        raise ValueError(
            f"config.mesh.context={shape['context']}, config.mesh.tensor={shape['tensor']}: "
            f"expected a product that divides the DiT's {heads} heads"
        )
    n_processes = jax.process_count()
    _expect(
        c,
        "stages",
        lambda v: n_processes == 1 or set(v) <= set(TRAINING_STAGES),
        f"only {', '.join(TRAINING_STAGES)} in a run of {n_processes} processes; run the others "
        "in one process",
    )
    n_data = shape["data"] * shape["fsdp"]
    for part in (stage for stage in TRAINING_STAGES if stage in c.stages):
        pieces = n_data * c[part].accumulate
        _expect(
            c,
            f"{part}.batch_size",
            lambda v, pieces=pieces: v % pieces == 0,
            f"a multiple of {pieces}: {n_data} data devices x {part}.accumulate",
        )


def _check_objective(c: ConfigDict) -> None:
    from opensora_jax.diffusion import ddpm, flow
    from opensora_jax.diffusion.objectives import OBJECTIVES

    names, predictions = ", ".join(OBJECTIVES), ", ".join(flow.PREDICTIONS)
    _expect(c, "dit.objective", lambda v: v in OBJECTIVES, f"one of {names}")
    _expect(c, "dit.prediction", lambda v: v in flow.PREDICTIONS, f"one of {predictions}")
    since = f"since dit.objective is {c.dit.objective}"
    if c.dit.objective == "ddpm":
        _expect(c, "dit.prediction", lambda v: v == "velocity", f"velocity, {since}")
        _expect(c, "dit.time_shift", lambda v: v == 1, f"1, {since}")
        n = ddpm.N_STEPS
        _expect(c, "sample.steps", lambda v: v <= n, f"at most {n}, {since}")
    else:
        _expect(c, "sample.ancestral", lambda v: not v, f"False, {since}")


def _check_video(c: ConfigDict) -> None:
    t, h, w = c.vqvae.downsample
    _expect(c, "vqvae.n_frames", lambda v: v % t == 0, f"a multiple of vqvae.downsample[0]={t}")
    _expect(
        c,
        "vqvae.resolution",
        lambda v: v % h == 0 and v % w == 0,
        f"a multiple of vqvae.downsample[1:]=({h}, {w})",
    )
    _expect(
        c,
        "vqvae.quantize_to",
        lambda v: v >= c.vqvae.quantize_from,
        f"at least vqvae.quantize_from={c.vqvae.quantize_from}",
    )


def _expect(c: ConfigDict, name: str, test, expected: str) -> None:
    value: Any = c
    for part in name.split("."):
        value = value[part]
    if not test(value):
        raise ValueError(f"config.{name}={value!r}: expected {expected}")
