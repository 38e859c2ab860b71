"""Stage and command: videos and captions -> the Arrow dataset of codes and text features.

Part by part, videos are decoded, encoded by the VQ-VAE in windows of the length that it was trained
on, and written. Legend: T frames, H, W pixels; t, h, w codes; S tokens, D features.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import files, lock
from opensora_jax.build import training as build
from opensora_jax.data import dataset, dataset_writer
from opensora_jax.data.captions import COLUMNS, expect_a_video, read_captions
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tiles import Tiles
from opensora_jax.inference.tokenizer import fingerprint, load_tokenizer
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.preprocessing import local, summary
from opensora_jax.preprocessing.job import Job
from opensora_jax.preprocessing.options import CURATION, VIDEO_TIMEOUT, Options, PreprocessError
from opensora_jax.preprocessing.provenance import command, location, sha256, text_model_identity
from opensora_jax.preprocessing.sorting import Share
from opensora_jax.windows import WindowError, Windows


def run(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """The stage `preprocess`: makes `workdir/dataset` by `config.data` and `config.preprocess`, or,
    of several resolutions, a dataset of each; of buckets, a folder of them.

    Without captions or videos in the config it takes the moving shapes of the stage `shapes`,
    without a VQ-VAE the one of the stage `vqvae`, without a text model a small random one.
    """
    workdir = epath.Path(workdir)
    data, c = config.data, config.preprocess
    captions = data.captions or workdir / "shapes" / "train" / "captions.json"
    columns = (data.get("file_column", COLUMNS[0]), data.get("caption_column", COLUMNS[1]))
    strict = c.get("strict", False)
    text_model = data.text_model
    if not text_model:
        text_model = workdir / "text_model"
        print(
            f"preprocess: no text model in the config: {text_model} is a small, randomly "
            "initialised one that knows the words of the captions; nothing is downloaded"
        )
        entries = read_captions(captions, columns, strict=strict)
        words = (caption for entry in entries for caption in entry["captions"])
        make_small_text_model(text_model, words)
    paths = (captions, data.videos or workdir / "shapes" / "train" / "videos")
    options = Options(
        vqvae=data.vqvae or workdir / "vqvae",
        text_model=text_model,
        fps=c.fps or None,
        max_frames=c.max_frames or None,
        n_frames=c.n_frames or None,
        window=c.window or None,
        tile=c.get("tile", 0) or None,
        batch_size=c.batch_size,
        videos_per_part=c.videos_per_part,
        flat=c.get("flat", False),
        columns=columns,
        strict=strict,
        video_timeout=c.get("video_timeout", VIDEO_TIMEOUT) or None,
        **{name: c.get(name, 0) for name in CURATION},
    )
    folders = build.made_datasets(config, workdir)
    if c.get("buckets"):
        from opensora_jax.stages.preprocess_buckets import preprocess_buckets  # which calls this

        sizes = {"asked": c.buckets, "bucket_tokens": c.bucket_tokens, "patch": config.dit.patch}
        preprocess_buckets(*paths, *folders, options, **sizes)
        return
    for folder, resolution in zip(folders, np.atleast_1d(c.resolution), strict=True):
        preprocess(*paths, folder, dataclasses.replace(options, resolution=int(resolution)))


def preprocess(
    captions: str | os.PathLike,
    videos: str | os.PathLike,
    output: str | os.PathLike,
    options: Options,
    share: Share | None = None,
) -> None:
    """Writes the dataset: one row per caption of every video that is kept.

    Interrupted, it goes on after the last whole part when called again; finished, it says so. A
    video that cannot be used is left out, and named with its reason in metadata.json.

    Args:
      captions: the captions, of any kind that `data.captions` reads.
      videos: the folder that its file names are relative to, of this machine or an object store.
      output: the folder to write, of this machine; with Ray one that all its machines see, or of an
        object store.
      share: which entries of the captions to take, for one of several buckets, `resolution` and
        `n_frames` of the options being its own; None: all.

    Raises:
      ValueError: bad options, or an output folder made with others or that cannot be written;
        before any video is read. Likewise what loading the VQ-VAE and the text model raises.
      NothingKeptError: in the end, not one video could be kept.
    """
    prepare(output, options)
    if share is None:
        options.check_lengths()
    videos, output = epath.Path(videos), epath.Path(output)
    entries = read_captions(captions, options.columns, strict=options.strict)
    if share is None:
        expect_a_video(entries, videos)
    else:
        entries = entries.some(share.entries)
    model = load_tokenizer(options.vqvae)
    settings = _settings(captions, options, model, share)
    windows = windows_of(settings, model)
    if _is_done(output, settings, options.engine):
        print(f"preprocess: {output}: done already")
        return
    fps = options.fps
    rate = f"videos are resampled to {fps:g}" if fps else "videos keep their own"
    print(f"preprocess: {rate} frames a second (fps={fps or 0:g})")
    job = Job(
        entries=entries,
        videos=videos,
        output=output,
        vqvae=str(options.vqvae),
        text_model=str(options.text_model),
        model=model,
        text_encoder=TextEncoder(options.text_model),  # before any work, whoever will do it
        settings=settings,
        windows=windows,
        batch_size=options.batch_size,
        strict=options.strict,
        video_timeout=options.video_timeout,
    )
    line = command(captions, videos, output, options, settings)
    metadata = _metadata(options, settings, model, line)
    with _telling_what_cannot_be_written(output):
        output.mkdir(parents=True, exist_ok=True)
    with lock.exclusive(output):
        if options.dry_run:
            summary.finish_dry_run(job, local.look(job))
            return
        with _telling_what_cannot_be_written(output):
            dataset_writer.write_metadata(output, metadata)
        if options.engine == "ray":
            from opensora_jax.preprocessing import cluster  # the extra `ray`

            finish = functools.partial(summary.finish, job, metadata)
            cluster.run(job, options.ray_address, finish)
        else:
            summary.finish(job, metadata, local.encode(job))


# --------------------------------------------------------------------------- before any work


def prepare(output: str | os.PathLike, options: Options) -> None:
    """Sees that the options are possible and `output` is a folder, or can become one; leaves
    accelerators to Ray's workers where they do the work.

    Raises:
      ValueError: naming what is not.
    """
    options.check_engine()
    _check_output(output, options.engine)
    if options.engine == "ray":
        jax.config.update("jax_platforms", "cpu")
    options.check()


def _check_output(output: str | os.PathLike, engine: str) -> None:
    if files.is_remote(output):
        if engine == "local":
            raise PreprocessError(
                f"output={output}: expected a folder of this machine (engine=ray writes to others)"
            )
        return
    path = Path(output)
    if os.path.exists(path / "metadata.json"):
        return  # a finished one need not be written to
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise PreprocessError(f"output={output}: {nearest} is a file: expected a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PreprocessError(f"output={output}: cannot be written: {nearest} is read-only")


@contextlib.contextmanager
def _telling_what_cannot_be_written(output: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PreprocessError(f"output={output}: cannot be written: {error.strerror}") from error


# ----------------------------------------------------------------- what metadata.json says


def _settings(
    captions: str | os.PathLike, options: Options, model: Tokenizer, share: Share | None
) -> dict[str, Any]:
    """What decides what is in the dataset: it is gone on with by the same alone."""
    window = options.window or model.n_frames
    length = options.clip_frames or options.n_frames  # of each clip
    return {
        "captions_sha256": sha256(captions),
        "vqvae_fingerprint": fingerprint(model),
        "text_model": text_model_identity(options.text_model),
        "resolution": options.sides,
        "fps": options.fps,
        "max_frames": options.max_frames,
        "n_frames": options.n_frames,
        "window": min(window, length) if length and share is None else window,
        "videos_per_part": options.videos_per_part,
        # Which older datasets do not say.
        **({"flat": True} if options.flat else {}),
        **({"tile": options.tile} if options.tile else {}),
        **({"columns": list(options.columns)} if tuple(options.columns) != COLUMNS else {}),
        **options.curation,
        **({"bucket": str(share.size), **share.settings} if share else {}),
    }


def _metadata(
    options: Options, settings: dict[str, Any], model: Tokenizer, line: str
) -> dict[str, Any]:
    """Of a dataset that is begun; `line` is the command that goes on with it."""
    return {
        "complete": False,
        "engine": options.engine,
        "command": line,
        "vqvae": str(files.absolute(options.vqvae)),
        "vqvae_fingerprint": settings["vqvae_fingerprint"],
        "text_model": location(options.text_model),
        "resolution": settings["resolution"],
        "downsample": list(model.downsample),
        "window": settings["window"],
        "causal": model.causal,
        **({"tile": options.tile} if options.tile else {}),
        **({"levels": list(model.levels)} if model.levels else {}),
        "settings": settings,
    }


def windows_of(settings: dict[str, Any], model: Tokenizer) -> Windows:
    """How videos are cut in time.

    Raises:
      PreprocessError: settings that do not fit the tokenizer.
    """
    t, h, w = model.downsample
    height, width = settings["resolution"]
    if height < 1 or width < 1 or height % h or width % w:
        raise PreprocessError(
            f"resolution={height}x{width}: expected multiples of the tokenizer's downsampling "
            f"{h}x{w}"
        )
    try:
        Tiles.of((height // h, width // w), (h, w), settings.get("tile"))
    except ValueError as error:
        raise PreprocessError(str(error)) from None
    window = settings["window"]
    is_bucket = "bucket" in settings  # all of which have the same windows
    name = "clip_frames" if "clip_frames" in settings and not is_bucket else "n_frames"
    n_frames = settings[name]
    key = name if window == n_frames else "window"  # a window by itself
    try:
        windows = Windows(t, model.causal, window)
    except WindowError as error:
        raise PreprocessError(
            f"{key}={window}: expected {error.expected}, the tokenizer's downsampling in time"
        ) from None
    if n_frames and windows.fit(n_frames) != n_frames:
        raise PreprocessError(
            f"{name}={n_frames}: expected {windows.near(n_frames)}, the tokenizer's downsampling "
            "in time"
        )
    return windows


def _is_done(output: epath.Path, settings: dict[str, Any], engine: str) -> bool:
    """Whether `output` is finished; refuses it when it was made with other settings."""
    path = output / "metadata.json"
    if not path.exists():
        return False
    metadata = dataset.read_metadata(output)
    found, complete = metadata.get("settings"), metadata.get("complete", False)
    found = dict(found) if isinstance(found, dict) else {}
    if complete and not settings["max_frames"] and not metadata.get("filtered"):
        found["max_frames"] = None  # a limit under which all stayed was none
    files.expect_settings(path, settings, found)
    begun = metadata.get("engine", "local")
    if not complete and begun != engine:
        raise PreprocessError(
            f"{output}: begun with engine={files.short(begun)}, not {engine!r}: go on with that, "
            "or use another folder"
        )
    return complete
