"""Stage and command: videos and captions -> the Arrow dataset of codes and text features.

Part by part, videos are decoded, encoded by the VQ-VAE in windows of the length that it was trained
on, and written. Legend: T frames, H, W pixels; t, h, w codes; S tokens, D features.
"""

import functools
import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
from etils import epath

from opensora_jax import files, lock
from opensora_jax.build import training as build
from opensora_jax.data import dataset, dataset_writer, shots, video_io
from opensora_jax.data.captions import COLUMNS, expect_a_video, read_captions
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tiles import Tiles
from opensora_jax.inference.tokenizer import fingerprint, load_tokenizer
from opensora_jax.preprocessing import local, summary
from opensora_jax.preprocessing.job import CURATION, VIDEO_TIMEOUT, Job, PreprocessError
from opensora_jax.preprocessing.provenance import command, location, sha256, text_model_identity
from opensora_jax.preprocessing.sorting import Share
from opensora_jax.windows import WindowError, Windows

ENGINES = ("local", "ray")


def run(config, workdir: str | os.PathLike) -> None:
    """The stage `preprocess`: makes `workdir/dataset` by `config.data` and `config.preprocess`, or,
    of several resolutions, a dataset of each; of buckets, a folder of them.

    Without captions or videos in the config it takes the moving shapes of the stage `shapes`,
    without a VQ-VAE the one of the stage `vqvae`, without a text model a small random one.
    """
    workdir = epath.Path(workdir)
    data, options = config.data, config.preprocess
    captions = data.captions or workdir / "shapes" / "train" / "captions.json"
    columns = (data.get("file_column", COLUMNS[0]), data.get("caption_column", COLUMNS[1]))
    strict = options.get("strict", False)
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
    common = {
        "vqvae": data.vqvae or workdir / "vqvae",
        "text_model": text_model,
        "fps": options.fps or None,
        "max_frames": options.max_frames or None,
        "n_frames": options.n_frames or None,
        "window": options.window or None,
        "tile": options.get("tile", 0) or None,
        "batch_size": options.batch_size,
        "videos_per_part": options.videos_per_part,
        "flat": options.get("flat", False),
        "columns": columns,
        "strict": strict,
        "video_timeout": options.get("video_timeout", VIDEO_TIMEOUT) or None,
        **{name: options.get(name, 0) for name in CURATION},
    }
    folders = build.made_datasets(config, workdir)
    if options.get("buckets"):
        from opensora_jax.stages.preprocess_buckets import preprocess_buckets  # which calls this

        sizes = {"asked": options.buckets, "bucket_tokens": options.bucket_tokens}
        preprocess_buckets(*paths, *folders, **sizes, patch=config.dit.patch, **common)
        return
    for folder, resolution in zip(folders, np.atleast_1d(options.resolution), strict=True):
        preprocess(*paths, folder, resolution=int(resolution), **common)


def preprocess(
    captions: str | os.PathLike,
    videos: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vqvae: str | os.PathLike,
    text_model: str | os.PathLike,
    resolution: int | tuple[int, int] = 128,
    fps: float | None = None,
    max_frames: int | None = None,
    n_frames: int | None = None,
    clip_frames: int = 0,
    clip_stride: int = 0,
    window: int | None = None,
    tile: int | None = None,
    batch_size: int = 8,
    videos_per_part: int = 64,
    flat: bool = False,
    columns: tuple[str, str] = COLUMNS,
    strict: bool = False,
    video_timeout: float | None = VIDEO_TIMEOUT,
    split_scenes: bool = False,
    crop_bars: bool = False,
    min_side: int = 0,
    min_motion: float = 0.0,
    min_brightness: float = 0.0,
    max_frozen: float = 0.0,
    near_duplicates: int = 0,
    dry_run: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
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
      vqvae: what `load_tokenizer` reads.
      text_model: what `TextEncoder` reads.
      resolution: height and width in pixels that videos are resized and cropped to.
      fps: frames per second that videos are resampled to; None keeps each video's own rate.
      max_frames: a video with more frames than this (after resampling) is filtered. None: none is,
        as none is where `n_frames` cuts them.
      n_frames: cut every video to this many frames, and filter shorter ones. None keeps all frames
        but for a rest that the tokenizer has no latent for.
      clip_frames: cut every video into clips of this many frames, each with rows of its own and its
        start in seconds, and filter shorter ones. 0: a video is one clip.
      clip_stride: frames from the begin of a clip to that of the next; 0: clip_frames.
      window: frames that are encoded together; None takes the length the VQ-VAE was trained on. A
        last, partial window is padded with its last frame, and the codes of the padding dropped.
      tile: pixels of the tiles, a quarter of them shared, that larger videos are encoded in, and
        samples decoded in; None: whole.
      batch_size: windows encoded at a time, rounded up to a multiple of the number of devices.
      videos_per_part: videos between two points that an interrupted run can go on from, or fewer,
        so that a part stays small.
      flat: every row with all its columns, as `datasets.load_from_disk` reads a part; codes and
        features are stored as often as there are captions.
      columns: of captions in a table: the names of the column of files and of that of captions.
      strict: whether one entry or video that cannot be used ends it, instead of being left out.
      video_timeout: seconds, of copying it here and of decoding it, after which a video counts as
        failed and the process that decodes it is replaced; None: there is no limit.
      split_scenes: cut videos where another shot begins, too, so that no clip spans two; each shot
        is a clip of its own, or several of `clip_frames`.
      crop_bars, min_side, min_motion, min_brightness, max_frozen: what is cut off videos, and what
        a clip has to show to be kept, as `Decoding` says.
      near_duplicates: of 256 bits of what they look like, in how many two clips of different videos
        may differ and the later one be left out; 0: none is.
      dry_run: videos are looked at, and what would become of them is written into
        `output`/dry_run.json; nothing is encoded.
      engine: `local`: this machine alone; `ray`: a cluster of them.
      ray_address: of the cluster; None: one of this machine alone, for as long as this lasts.
      share: which entries of the captions to take, for one of several buckets, `resolution` and
        `n_frames` being its own; None: all.

    Raises:
      ValueError: bad arguments, or an output folder made with others or that cannot be written;
        before any video is read. Likewise what loading the VQ-VAE and the text model raises.
      NothingKeptError: in the end, not one video could be kept.
    """
    check_engine(engine, ray_address, flat, dry_run)
    check_output(output, engine)
    if engine == "ray":
        # What accelerators there are is for Ray's workers; this process only tells them what to do.
        jax.config.update("jax_platforms", "cpu")
    curation = {
        "clip_frames": clip_frames,
        "clip_stride": clip_stride,
        "split_scenes": split_scenes,
        "crop_bars": crop_bars,
        "min_side": min_side,
        "min_motion": min_motion,
        "min_brightness": min_brightness,
        "max_frozen": max_frozen,
        "near_duplicates": near_duplicates,
    }
    counts = {
        "max_frames": max_frames,
        "videos_per_part": videos_per_part,
        "batch_size": batch_size,
    }
    _check_numbers(fps, video_timeout, counts, curation)
    if split_scenes:
        shots.expect_installed()
    if clip_frames and n_frames and share is None:
        raise PreprocessError(f"n_frames={n_frames}: expected none with clip_frames={clip_frames}")
    if clip_stride and not clip_frames:
        raise PreprocessError(f"clip_stride={clip_stride}: expected clip_frames with it")
    videos, output = epath.Path(videos), epath.Path(output)
    entries = read_captions(captions, columns, strict=strict)
    if share is None:
        expect_a_video(entries, videos)
    else:
        entries = entries.some(share.entries)
    model = load_tokenizer(vqvae)
    window = window or model.n_frames
    length = clip_frames or n_frames  # of each clip
    settings = {
        "captions_sha256": sha256(captions),
        "vqvae_fingerprint": fingerprint(model),
        "text_model": text_model_identity(text_model),
        "resolution": [resolution] * 2 if isinstance(resolution, int) else list(resolution),
        "fps": fps,
        "max_frames": max_frames,
        "n_frames": n_frames,
        "window": min(window, length) if length and share is None else window,
        "videos_per_part": videos_per_part,
        # Which older datasets do not say.
        **({"flat": True} if flat else {}),
        **({"tile": tile} if tile else {}),
        **({"columns": list(columns)} if tuple(columns) != COLUMNS else {}),
        **{name: value for name, value in curation.items() if value},
        **({"bucket": str(share.size), **share.settings} if share else {}),
    }
    windows = windows_of(settings, model)
    if _is_done(output, settings, engine):
        print(f"preprocess: {output}: done already")
        return
    rate = f"videos are resampled to {fps:g}" if fps else "videos keep their own"
    print(f"preprocess: {rate} frames a second (fps={fps or 0:g})")
    text_encoder = TextEncoder(text_model)  # before any work, whoever will do it
    metadata = {
        "complete": False,
        "engine": engine,
        "command": command(
            *(captions, videos, output, vqvae, text_model, settings, engine, strict, video_timeout)
        ),
        "vqvae": str(files.absolute(vqvae)),
        "vqvae_fingerprint": settings["vqvae_fingerprint"],
        "text_model": location(text_model),
        "resolution": settings["resolution"],
        "downsample": list(model.downsample),
        "window": settings["window"],
        "causal": model.causal,
        **({"tile": tile} if tile else {}),
        **({"levels": list(model.levels)} if model.levels else {}),
        "settings": settings,
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreprocessError(f"output={output}: cannot be written: {error.strerror}") from error
    with lock.exclusive(output):
        try:
            if not dry_run:
                dataset_writer.write_metadata(output, metadata)
        except OSError as error:
            message = f"output={output}: cannot be written: {error.strerror}"
            raise PreprocessError(message) from error
        job = Job(
            entries=entries,
            videos=videos,
            output=output,
            vqvae=str(vqvae),
            text_model=str(text_model),
            model=model,
            text_encoder=text_encoder,
            settings=settings,
            windows=windows,
            batch_size=batch_size,
            strict=strict,
            video_timeout=video_timeout,
        )
        if dry_run:
            summary.finish_dry_run(job, local.look(job))
        elif engine == "ray":
            from opensora_jax.preprocessing import cluster  # the extra `ray`

            cluster.run(job, ray_address, functools.partial(summary.finish, job, metadata))
        else:
            summary.finish(job, metadata, local.encode(job))


# -------------------------------------------------------------------- settings and the summary


def _check_numbers(fps, video_timeout, counts, curation):
    if fps is not None:
        video_io.check_fps(fps)
    if video_timeout is not None and not 0 < video_timeout < float("inf"):
        raise PreprocessError(f"video_timeout={video_timeout}: expected a positive number, or None")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise PreprocessError(f"{name}={value}: expected at least 1")
    for name, value in curation.items():
        if value < 0:
            raise PreprocessError(f"{name}={value}: expected at least 0")


def check_engine(engine, ray_address, flat, dry_run):
    if engine not in ENGINES:
        raise PreprocessError(f"engine={engine}: expected one of {', '.join(ENGINES)}")
    if engine == "local" and ray_address:
        raise PreprocessError(f"ray_address={ray_address}: expected engine=ray with it")
    if engine == "ray" and flat:
        raise PreprocessError("flat=True: expected engine=local: Ray stores everything once")
    if engine == "ray" and dry_run:
        raise PreprocessError("dry_run=True: expected engine=local")
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        raise PreprocessError("engine=ray: Ray is not installed: pip install 'opensora_jax[ray]'")


def check_output(output, engine):
    """Sees before any work that `output` is a folder, or can become one."""
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


def windows_of(settings, model):
    """How videos are cut in time, if `settings` fit the tokenizer."""
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


def _is_done(output, settings, engine):
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
