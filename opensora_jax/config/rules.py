"""What a configuration may hold: each field by itself, then fields and stages together."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.config.fields import RULES
from opensora_jax.config.stages import STAGES
from opensora_jax.data.buckets import AUTO, Size, parse
from opensora_jax.diffusion import ddpm, flow
from opensora_jax.diffusion.objectives import OBJECTIVES, PREDICTIONS
from opensora_jax.models import attention
from opensora_jax.windows import WindowError, Windows

# Of `data.scenes`, which would have to be imported with the decoders.
SCENES_FRAMES, SCENES_SIDE = 16, 48  # at least


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
    if c.vqvae.train == "decoder":
        if not c.vqvae.init_from:
            raise_invalid(c, "vqvae.init_from", "a tokenizer, since vqvae.train is decoder")
        if c.vqvae.weight_decay:
            raise_invalid(c, "vqvae.weight_decay", "0, since vqvae.train is decoder")
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
    predictions = {"flow": flow.PREDICTIONS, "ddpm": ddpm.PREDICTIONS}
    known = ("auto", *predictions.get(c.dit.objective, PREDICTIONS))
    if c.dit.prediction not in known:
        raise_invalid(c, "dit.prediction", f"one of {', '.join(known)}, {since}")
    if c.dit.objective == "ddpm" and c.sample.steps > ddpm.N_STEPS:
        raise_invalid(c, "sample.steps", f"at most {ddpm.N_STEPS}, {since}")
    if c.dit.objective in ("flow", "ddpm"):
        if c.dit.code_head != "auto":
            raise_invalid(c, "dit.code_head", f"auto, {since}")
        for name in ("temperature", "top_p"):
            if c.sample[name] != 1:
                raise_invalid(c, f"sample.{name}", f"1, {since}")
    known = ("auto", *OBJECTIVES[c.dit.objective].samplers)
    if c.sample.sampler not in known:
        raise_invalid(c, "sample.sampler", f"one of {', '.join(known)}, {since}")
    if c.sample.eta and (c.dit.objective != "ddpm" or c.sample.sampler not in ("auto", "ddim")):
        raise_invalid(c, "sample.eta", "0, since it is ddim's alone")
    if c.sample.guidance_to < c.sample.guidance_from:
        least = c.sample.guidance_from
        raise_invalid(c, "sample.guidance_to", f"at least sample.guidance_from={least}")


def _check_stages(c: ConfigDict) -> None:
    """Sees that what a stage of this run makes fits the next one, and is not made for nothing."""
    if "shapes" in c.stages and c.shapes.world == "scenes":
        names = [f"{part}.resolution" for part in ("vqvae", "preprocess") if _uses_shapes(c, part)]
        least = {"shapes.n_frames": SCENES_FRAMES, "shapes.resolution": SCENES_SIDE}
        if c.shapes.sizes:
            least = {}
            if any(
                size.n_frames < SCENES_FRAMES or min(size.height, size.width) < SCENES_SIDE
                for size in parse(c.shapes.sizes)
            ):
                enough = f"at least {SCENES_FRAMES} frames of {SCENES_SIDE} x {SCENES_SIDE}"
                raise_invalid(c, "shapes.sizes", f"{enough}, since shapes.world is scenes")
        for name, n in (least | dict.fromkeys(names, SCENES_SIDE)).items():
            if np.min(value_of(c, name)) < n:
                raise_invalid(c, name, f"at least {n}, since shapes.world is scenes")
    if _uses_shapes(c, "vqvae"):
        most, name = _frames_of_shapes(c, c.vqvae.fps), _name_of_sizes(c, "n_frames")
        if c.vqvae.n_frames > most:
            raise_invalid(c, "vqvae.n_frames", f"at most {most}, the frames of {name}")
        side = min(min(size.height, size.width) for size in _made_sizes(c))
        if c.vqvae.resolution > side:
            name = _name_of_sizes(c, "resolution")
            raise_invalid(c, "vqvae.resolution", f"at most {name}={side}")
    if _uses_shapes(c, "preprocess"):
        most, of = _frames_of_shapes(c, c.preprocess.fps), _name_of_sizes(c, "n_frames")
        for name in ("n_frames", "clip_frames"):
            if c.preprocess[name] > most:
                raise_invalid(c, f"preprocess.{name}", f"at most {most}, the frames of {of}")
        for name in ("n_frames", "clip_frames"):
            if c.shapes.world == "scenes" and 0 < c.preprocess[name] < most:
                whole = f"0 or {most}: captions of scenes tell of whole videos"
                raise_invalid(c, f"preprocess.{name}", whole)
        if c.shapes.world == "scenes":
            _check_whole_buckets(c)
        is_cut = c.preprocess.n_frames or c.preprocess.clip_frames
        if 0 < c.preprocess.max_frames < most and not is_cut:
            raise_invalid(c, "preprocess.max_frames", f"0, or at least {most}, the frames of {of}")
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


def _made_sizes(c: ConfigDict) -> tuple[Size, ...]:
    """Of the videos that the stage `shapes` makes."""
    if c.shapes.sizes:
        return parse(c.shapes.sizes)
    return (Size(c.shapes.n_frames, c.shapes.resolution, c.shapes.resolution),)


def _name_of_sizes(c: ConfigDict, name: str) -> str:
    """The field that says the sizes of made videos."""
    return "shapes.sizes" if c.shapes.sizes else f"shapes.{name}"


def _frames_of_shapes(c: ConfigDict, fps: float) -> int:
    """Of one video, the shortest, at a rate; 0: its own."""
    return min(_at_rate(c, size.n_frames, fps) for size in _made_sizes(c))


def _at_rate(c: ConfigDict, n_frames: int, fps: float) -> int:
    return math.ceil(n_frames * (fps or c.shapes.fps) / c.shapes.fps)


def _check_whole_buckets(c: ConfigDict) -> None:
    """Sees that no video is cut: captions of scenes tell of all of it."""
    whole = [
        dataclasses.replace(size, n_frames=_at_rate(c, size.n_frames, c.preprocess.fps))
        for size in _made_sizes(c)
    ]
    has_one = not c.shapes.sizes and not c.preprocess.buckets
    if not has_one and set(_listed_buckets(c)) != set(whole):
        asked = ",".join(map(str, whole))
        raise_invalid(c, "preprocess.buckets", f"{asked}: captions of scenes tell of whole videos")


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
    sizes = _listed_buckets(c)
    name, sides = "preprocess.buckets", [(size.height, size.width) for size in sizes]
    if not c.preprocess.buckets:
        name, sides = (
            "preprocess.resolution",
            [[n] * 2 for n in np.atleast_1d(c.preprocess.resolution)],
        )
    if any((np.array(pair) % factors).any() for pair in sides):
        multiple = " and ".join(map(str, dict.fromkeys(factors)))
        raise_invalid(c, name, f"a multiple of {multiple}: {of}")
    if c.preprocess.tile and any(
        c.preprocess.tile % n or c.preprocess.tile < 2 * n for n in spatial
    ):
        multiple = " and ".join(map(str, dict.fromkeys(spatial)))
        raise_invalid(c, "preprocess.tile", f"0, or two or more times {multiple}: {source}")
    if c.preprocess.clip_frames and c.preprocess.n_frames:
        raise_invalid(c, "preprocess.n_frames", "0 with preprocess.clip_frames")
    if c.preprocess.clip_stride and not c.preprocess.clip_frames:
        raise_invalid(c, "preprocess.clip_stride", "0 without preprocess.clip_frames")
    if c.preprocess.split_scenes and c.preprocess.buckets:
        raise_invalid(c, "preprocess.split_scenes", "False with preprocess.buckets")
    longest = max((size.n_frames for size in sizes), default=0)
    if 0 < c.preprocess.clip_frames < longest:
        most = f"0, or at least the {longest} of preprocess.buckets"
        raise_invalid(c, "preprocess.clip_frames", most)
    # Of buckets, which say themselves how many frames are kept, clips may be of any length.
    is_cut = c.preprocess.clip_frames and not c.preprocess.buckets
    name = "clip_frames" if is_cut else "n_frames"
    n_frames = c.preprocess[name]
    try:
        windows = Windows(t, causal, c.preprocess.window or window)
    except WindowError as error:
        raise_invalid(c, "preprocess.window", f"{error.expected}: {source}")
    for size in sizes:
        if not size.is_image and windows.fit(size.n_frames) != size.n_frames:
            near = windows.near(size.n_frames)
            raise_invalid(c, "preprocess.buckets", f"frames of {near}, not {size}: {source}")
    if sizes and n_frames:
        raise_invalid(c, "preprocess.n_frames", "0, since preprocess.buckets says it")
    if n_frames and windows.fit(n_frames) != n_frames:
        raise_invalid(c, f"preprocess.{name}", f"{windows.near(n_frames)}: {source}")
    if not n_frames and _uses_shapes(c, "preprocess"):
        n_frames = _frames_of_shapes(c, c.preprocess.fps)
    n_frames = longest or n_frames
    if "dit" in c.stages and n_frames and np.max(c.dit.n_latent_frames) > windows.latents(n_frames):
        most = f"{windows.latents(n_frames)}: {n_frames} frames by {source}"
        raise_invalid(c, "dit.n_latent_frames", f"at most {most}")
    if "dit" in c.stages and _uses_shapes(c, "preprocess") and c.shapes.world == "scenes":
        # 0 is the length of 90% of the data, in whole windows: here of all.
        whole = windows.latents(n_frames)
        if not set(np.atleast_1d(c.dit.n_latent_frames).tolist()) <= {0, whole}:
            tell = "captions of scenes tell of whole videos"
            raise_invalid(c, "dit.n_latent_frames", f"0 or {whole}: {tell}")


def _listed_buckets(c: ConfigDict) -> tuple[Size, ...]:
    """The sizes of `preprocess.buckets`; none, where there are none or the videos decide."""
    text = c.preprocess.buckets
    return parse(text) if text and text != AUTO else ()


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
