"""What a configuration may hold: `RULES` for each field, then rules between fields and stages."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.config.stages import STAGES
from opensora_jax.diffusion import ddpm, flow
from opensora_jax.diffusion.objectives import OBJECTIVES
from opensora_jax.models import attention, dit
from opensora_jax.tasks.vqvae import ARCHITECTURES
from opensora_jax.train.optim import OPTIMIZERS
from opensora_jax.windows import WindowError, Windows


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold: a test of any value, and the same in words."""

    test: Callable[[Any], bool]
    expected: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def at_least(low: int) -> Rule:
    return Rule(lambda v: _is_whole(v) and v >= low, f"an integer of at least {low}")


def one_of(names: Sequence[str]) -> Rule:
    known = ", ".join(name or "empty" for name in names)
    return Rule(lambda v: isinstance(v, str) and v in names, f"one of {known}")


def auto_or(rule: Rule) -> Rule:
    return Rule(lambda v: v == "auto" or rule.test(v), f"auto, or {rule.expected}")


def one_or_several(rule: Rule) -> Rule:
    return Rule(
        lambda v: (
            rule.test(v)
            or (
                _is_sequence(v) and len(v) == len(set(v)) > 0 and all(n and rule.test(n) for n in v)
            )
        ),
        f"{rule.expected}, or several, each once",
    )


positive = Rule(lambda v: _is_number(v) and v > 0, "a positive number")
not_negative = Rule(lambda v: _is_number(v) and v >= 0, "zero or a positive number")
share = Rule(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
# `data.video_io.check_fps` with its bounds, which would have to be imported with the decoders.
frame_rate = Rule(lambda v: _is_number(v) and 0.01 <= v <= 1000, "0.01 to 1000 frames a second")
below_one = Rule(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
even = Rule(lambda v: _is_whole(v) and v >= 2 and v % 2 == 0, "an even number of at least 2")
true_or_false = Rule(lambda v: isinstance(v, bool), "True or False")
text = Rule(lambda v: isinstance(v, str), "a text, or empty")
# Their sizes are `mesh.make_mesh`'s to check.
mesh_size = Rule(_is_whole, "an integer")
stages = Rule(
    lambda v: _is_sequence(v) and len(v) > 0 and list(v) == [name for name in STAGES if name in v],
    f"some of {', '.join(STAGES)}, each once and in this order",
)
steps_from_to = Rule(
    lambda v: (
        _is_sequence(v)
        and all(map(_is_whole, v))
        and (len(v) == 0 or (len(v) == 2 and 1 <= v[0] <= v[1]))
    ),
    "(), or two steps, the first and the last",
)


def whole_numbers(low: int) -> Rule:
    return Rule(
        lambda v: _is_sequence(v) and len(v) > 0 and all(_is_whole(n) and n >= low for n in v),
        f"integers of at least {low}",
    )


strides = Rule(
    lambda v: (
        _is_sequence(v)
        and len(v) == 3
        and all(_is_whole(n) and n >= 1 and not n & (n - 1) for n in v)
        and max(v) > 1
    ),
    "three powers of two, one of them above 1",
)
prompts = Rule(
    lambda v: _is_sequence(v) and all(isinstance(p, str) and p.strip() for p in v),
    "texts that are not blank",
)

_TRAINING = {
    "batch_size": at_least(1),
    "accumulate": at_least(1),
    "steps": at_least(1),
    "learning_rate": positive,
    "warmup_steps": at_least(0),
    "b1": below_one,
    "b2": below_one,
    "weight_decay": not_negative,
    "clip_norm": positive,
    "ema_decay": below_one,
    "dtype": one_of(("auto", "float32", "bfloat16")),
    "log_every": at_least(1),
    "eval_every": at_least(1),
    "checkpoint_every": at_least(1),
    "keep_checkpoints": at_least(1),
    "keep_every": at_least(0),
    "max_skipped_steps": at_least(1),
}

# Every field of a configuration; there are no others.
RULES: Mapping[str, Rule | Mapping[str, Rule]] = {
    "seed": at_least(0),
    "stages": stages,
    "profile": steps_from_to,
    "data": {
        "captions": text,
        "videos": text,
        "held_out_videos": text,
        "workers": at_least(0),
        "dataset": text,
        "vqvae": text,
        "text_model": text,
    },
    "mesh": {
        **dict.fromkeys(mesh_lib.AXES, mesh_size),
        "reduce_dtype": one_of(("auto", "float32")),
    },
    "shapes": {
        "n_videos": at_least(1),
        "n_held_out": at_least(1),
        "n_frames": at_least(2),
        "resolution": Rule(lambda v: even.test(v) and v >= 16, "16 or more, even"),
        "fps": frame_rate,
        "n_captions": Rule(lambda v: _is_whole(v) and 1 <= v <= 10, "1 to 10"),
    },
    "vqvae": _TRAINING
    | {
        "architecture": one_of(tuple(ARCHITECTURES)),
        "quantizer": one_of(("vq", "fsq")),
        "levels": whole_numbers(2),
        "multipliers": whole_numbers(1),
        "patch": at_least(1),
        "distance": one_of(("l2", "l1")),
        "n_codes": at_least(2),
        "embedding_dim": at_least(1),
        "n_hiddens": even,  # for two heads of attention
        "n_res_layers": at_least(0),
        "downsample": strides,
        "normalize_latents": true_or_false,
        "n_frames": at_least(1),
        "resolution": at_least(1),
        "fps": Rule(lambda v: v == 0 or frame_rate.test(v), f"0, or {frame_rate.expected}"),
        "end_weight": positive,
        "quantize_from": share,
        "quantize_to": share,
    },
    "preprocess": {
        "resolution": one_or_several(at_least(1)),
        "fps": Rule(lambda v: v == 0 or frame_rate.test(v), f"0, or {frame_rate.expected}"),
        "max_frames": at_least(0),
        "n_frames": at_least(0),
        "window": at_least(0),
        "tile": at_least(0),
        "batch_size": at_least(1),
        "videos_per_part": at_least(1),
        "flat": true_or_false,
    },
    "dit": _TRAINING
    | {
        "size": one_of(("", *dit.SIZES)),
        "depth": at_least(0),
        "width": at_least(0),
        "heads": at_least(0),
        "init_from": text,
        "components": auto_or(at_least(0)),
        "patch": at_least(1),
        "text_mode": one_of(dit.TEXT_MODES),
        "text_length": at_least(0),
        "n_latent_frames": one_or_several(at_least(0)),
        "caption_dropout": share,
        "objective": one_of(tuple(OBJECTIVES)),
        "prediction": one_of(("auto", *flow.PREDICTIONS)),
        "time_shift": auto_or(positive),
        "validation_share": below_one,
        "optimizer": one_of(OPTIMIZERS),
        "attention": one_of(("auto", *attention.BACKENDS)),
        "remat": one_of(tuple(dit.REMAT_POLICIES)),
        "unroll": at_least(1),
    },
    "bench": {"text_width": at_least(1)},
    "sample": {
        "steps": at_least(1),
        "guidance": positive,
        "ancestral": true_or_false,
        "prompts": prompts,
    },
    "fidelity": {"n_samples": at_least(1), "batch_size": at_least(1)},
}


def check(c: ConfigDict, devices: Sequence[jax.Device] | None = None) -> None:
    """Checks all that a configuration alone shows to be wrong.

    Args:
      devices: that the mesh is made of; None means those of this run.

    Raises:
      ValueError: naming the field, its value and what was expected.
    """
    _check_fields(c, RULES)
    _check_models(c)
    _check_stages(c)
    _check_devices(c, jax.devices() if devices is None else devices)


def _check_fields(c: ConfigDict, rules: Mapping[str, Any], prefix: str = "") -> None:
    for key in [*rules, *c]:
        name, rule = prefix + key, rules.get(key)
        if rule is None:
            raise ValueError(f"config.{name}: no such field: see configs/default.py")
        if key not in c:
            raise ValueError(f"config.{name}: missing: see configs/default.py")
        if isinstance(rule, Mapping):
            if not isinstance(c[key], ConfigDict):
                raise ValueError(f"config.{name}={files.short(c[key])}: expected fields")
            _check_fields(c[key], rule, f"{name}.")
        elif not rule.test(c[key]):
            raise ValueError(f"config.{name}={files.short(c[key])}: expected {rule.expected}")


def value_of(c: ConfigDict, name: str) -> Any:
    """The value of a field by its dotted name."""
    for key in name.split("."):
        c = c[key]
    return c


def raise_invalid(c: ConfigDict, name: str, expected: str) -> NoReturn:
    """Raises the error that names a field, its value and what was expected."""
    raise ValueError(f"config.{name}={files.short(value_of(c, name))}: expected {expected}")


def _check_models(c: ConfigDict) -> None:
    t, h, w = c.vqvae.downsample
    if c.vqvae.architecture == "cosmos":
        if c.vqvae.quantizer != "fsq":
            raise_invalid(c, "vqvae.quantizer", "fsq, since vqvae.architecture is cosmos")
        if c.vqvae.n_res_layers < 1:
            raise_invalid(c, "vqvae.n_res_layers", "at least 1, since vqvae.architecture is cosmos")
    try:
        networks.vqvae_windows(c.vqvae)
    except ValueError:
        kind = "1 and a multiple" if c.vqvae.architecture == "cosmos" else "a multiple"
        raise_invalid(c, "vqvae.n_frames", f"{kind} of vqvae.downsample[0]={t}")
    try:
        networks.vqvae_config(c.vqvae)
    except ValueError as error:
        raise ValueError(f"config.vqvae: {error}") from None
    if c.vqvae.resolution % h or c.vqvae.resolution % w:
        raise_invalid(c, "vqvae.resolution", f"a multiple of vqvae.downsample[1:]=({h}, {w})")
    if c.vqvae.quantize_to < c.vqvae.quantize_from:
        raise_invalid(
            c, "vqvae.quantize_to", f"at least vqvae.quantize_from={c.vqvae.quantize_from}"
        )
    for part in ("vqvae", "dit"):
        if c[part].keep_every % c[part].checkpoint_every:
            every = f"{part}.checkpoint_every={c[part].checkpoint_every}"
            raise_invalid(c, f"{part}.keep_every", f"0, or a multiple of {every}")
    for key in ("depth", "width", "heads"):
        if c.dit.size and c.dit[key]:
            drop = f"0, since dit.size={c.dit.size} says it: drop the one or the other"
            raise_invalid(c, f"dit.{key}", drop)
        if not c.dit.size and not c.dit[key]:
            raise_invalid(c, f"dit.{key}", "a positive number, since dit.size is empty")
    if not c.dit.size and c.dit.width % (2 * c.dit.heads):
        raise_invalid(c, "dit.width", f"an even multiple of dit.heads={c.dit.heads}")
    since = f"since dit.objective is {c.dit.objective}"
    if c.dit.objective == "ddpm":
        if c.dit.prediction not in ("auto", "velocity"):
            raise_invalid(c, "dit.prediction", f"auto or velocity, {since}")
        if c.dit.time_shift not in ("auto", 1):
            raise_invalid(c, "dit.time_shift", f"auto or 1, {since}")
        if c.sample.steps > ddpm.N_STEPS:
            raise_invalid(c, "sample.steps", f"at most {ddpm.N_STEPS}, {since}")
    elif c.sample.ancestral:
        raise_invalid(c, "sample.ancestral", f"False, {since}")


def _check_stages(c: ConfigDict) -> None:
    """Sees that what a stage of this run makes fits the next one, and is not made for nothing."""
    if _uses_shapes(c, "vqvae"):
        most = _frames_of_shapes(c, c.vqvae.fps)
        if c.vqvae.n_frames > most:
            raise_invalid(c, "vqvae.n_frames", f"at most {most}, the frames of shapes.n_frames")
        if c.vqvae.resolution > c.shapes.resolution:
            raise_invalid(c, "vqvae.resolution", f"at most shapes.resolution={c.shapes.resolution}")
    if _uses_shapes(c, "preprocess"):
        most = _frames_of_shapes(c, c.preprocess.fps)
        if c.preprocess.n_frames > most:
            raise_invalid(
                c, "preprocess.n_frames", f"at most {most}, the frames of shapes.n_frames"
            )
        if 0 < c.preprocess.max_frames < most and not c.preprocess.n_frames:
            raise_invalid(
                c, "preprocess.max_frames", f"0, or at least {most}, the frames of shapes.n_frames"
            )
    if {"vqvae", "preprocess"} <= set(c.stages):
        if c.data.vqvae:
            raise_invalid(
                c, "data.vqvae", "empty, since the stage vqvae trains one: drop one of the two"
            )
        check_codes(
            *(c, c.vqvae.downsample, f"vqvae.downsample={c.vqvae.downsample}"),
            causal=networks.vqvae_windows(c.vqvae).causal,
            window=c.vqvae.n_frames,
        )
    if {"preprocess", "dit"} <= set(c.stages) and c.data.dataset:
        raise_invalid(c, "data.dataset", "empty, since the stage preprocess makes one: drop one")


def _uses_shapes(c: ConfigDict, stage: str) -> bool:
    return {"shapes", stage} <= set(c.stages) and not c.data.videos


def _frames_of_shapes(c: ConfigDict, fps: float) -> int:
    """Of one video at a rate; 0: its own."""
    return math.ceil(c.shapes.n_frames * (fps or c.shapes.fps) / c.shapes.fps)


def check_codes(
    c: ConfigDict, downsample: Sequence[int], source: str, *, causal: bool, window: int
) -> None:
    """Sees that what is encoded, and what the DiT is to make of it, fit a tokenizer's downsampling.

    Args:
      downsample: (T, H, W).
      source: what to call it.
      causal: whether the first frame of a window has a latent of its own.
      window: frames that are encoded together, unless the configuration says it.
    """
    t, *spatial = downsample
    factors, of = spatial, source
    if "dit" in c.stages:
        factors, of = [n * c.dit.patch for n in spatial], f"{source} x dit.patch={c.dit.patch}"
    resolutions = np.atleast_1d(c.preprocess.resolution)
    if any((resolutions % n).any() for n in factors):
        multiple = " and ".join(map(str, dict.fromkeys(factors)))
        raise_invalid(c, "preprocess.resolution", f"a multiple of {multiple}: {of}")
    if c.preprocess.tile and any(
        c.preprocess.tile % n or c.preprocess.tile < 2 * n for n in spatial
    ):
        multiple = " and ".join(map(str, dict.fromkeys(spatial)))
        raise_invalid(c, "preprocess.tile", f"0, or two or more times {multiple}: {source}")
    n_frames = c.preprocess.n_frames
    try:
        windows = Windows(t, causal, c.preprocess.window or window)
    except WindowError as error:
        raise_invalid(c, "preprocess.window", f"{error.expected}: {source}")
    if n_frames and windows.fit(n_frames) != n_frames:
        raise_invalid(c, "preprocess.n_frames", f"{windows.near(n_frames)}: {source}")
    if not n_frames and _uses_shapes(c, "preprocess"):
        n_frames = _frames_of_shapes(c, c.preprocess.fps)
    if "dit" in c.stages and n_frames and np.max(c.dit.n_latent_frames) > windows.latents(n_frames):
        most = f"{windows.latents(n_frames)}: {n_frames} frames by {source}"
        raise_invalid(c, "dit.n_latent_frames", f"at most {most}")


def _check_devices(c: ConfigDict, devices: Sequence[jax.Device]) -> None:
    kind = devices[0].platform
    fit = ["auto", *(name for name, on in attention.BACKENDS.items() if on in (None, kind))]
    if c.dit.attention not in fit:
        raise_invalid(c, "dit.attention", f"one of {', '.join(fit)} on a {kind}")
    shape = mesh_lib.make_mesh(c.mesh, devices).shape
    _, width, heads = networks.dit_size(c.dit)
    if "dit" in c.stages and heads % (shape["context"] * shape["tensor"]):
        raise ValueError(
            f"config.mesh.context={shape['context']}, config.mesh.tensor={shape['tensor']}: "
            f"expected a product that divides the DiT's {heads} heads, of {width // heads} each; "
            "dit.depth, dit.width and dit.heads, with dit.size empty, give others"
        )
    n_data = shape["data"] * shape["fsdp"]
    for part in ("vqvae", "dit"):
        if part in c.stages and c[part].batch_size % (n_data * c[part].accumulate):
            multiple = f"a multiple of {n_data * c[part].accumulate}"
            why = f"{n_data} data devices x {part}.accumulate"
            raise_invalid(c, f"{part}.batch_size", f"{multiple}: {why}")
    parallel = [name for name, stage in STAGES.items() if stage.processes]
    n_processes = jax.process_count()
    if n_processes > 1 and not set(c.stages) <= set(parallel):
        expected = f"only {', '.join(parallel)} in a run of {n_processes} processes"
        raise_invalid(c, "stages", f"{expected}; run the others in one process")
