"""Videos and captions -> a folder of datasets, one for each of several sizes of clips.

Files' headers say which size a clip goes to (`data.buckets`); what goes to one is made as any
dataset is, in a subfolder of its name.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from opensora_jax import files, lock
from opensora_jax.data import bucket_folders, buckets, dataset
from opensora_jax.data.buckets import Size
from opensora_jax.data.captions import expect_a_video, read_captions
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import fingerprint, load_tokenizer
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.preprocessing import sorting
from opensora_jax.preprocessing.job import NothingKeptError
from opensora_jax.preprocessing.options import Options, PreprocessError
from opensora_jax.preprocessing.provenance import sha256
from opensora_jax.preprocessing.sorting import Measuring, Share
from opensora_jax.stages import preprocess as one
from opensora_jax.windows import Windows

# Options, beside those that every list has named, that decide which bucket an entry goes to.
_SORTED_BY = ("clip_frames", "crop_bars")


def preprocess_buckets(
    captions: str | os.PathLike,
    videos: str | os.PathLike,
    output: str | os.PathLike,
    options: Options,
    *,
    asked: str,
    bucket_tokens: int = 0,
    patch: int = 2,
) -> None:
    """As `preprocess`, into a dataset of each bucket and buckets.json, which names them.

    Every entry goes to the bucket that loses least of its clips, which are of `clip_frames` at
    most, and is kept, filtered or failed there. Near-duplicates are those of one bucket.

    Args:
      options: as of `preprocess`; of `n_frames` auto takes frames of a clip at most, None as many
        as half of the videos have.
      asked: sizes, as "16x96x160,1x128x128", or auto: by the clips' sizes.
      bucket_tokens: of auto: tokens of a clip at most, each a latent frame x patch x patch.
      patch: of auto: latents along the sides of a token.

    Raises:
      ValueError: as `preprocess`, or sizes that do not fit the tokenizer.
      NothingKeptError: in the end, not one video could be kept.
    """
    _check_options(options, asked, bucket_tokens, patch)
    one.prepare(output, options)
    output = epath.Path(output)
    if (output / "metadata.json").exists():
        raise PreprocessError(f"output={output}: holds a dataset: expected another folder")
    about = {"buckets": asked}
    is_auto = asked == buckets.AUTO
    if is_auto:
        sizes = {"patch": patch, "most_frames": options.n_frames}
        about |= {"bucket_tokens": bucket_tokens, **sizes}
    entries = read_captions(captions, options.columns, strict=options.strict)
    expect_a_video(entries, videos)
    model = load_tokenizer(options.vqvae)
    windows = _check_sizes(() if is_auto else buckets.parse(asked), model, options)
    TextEncoder(options.text_model)  # before any work
    settings = {
        **about,
        "fps": options.fps,
        "window": windows.frames,
        "captions_sha256": sha256(captions),
        # By which entries are sorted, and which older lists do not say.
        "vqvae_fingerprint": fingerprint(model),
        **{name: getattr(options, name) for name in _SORTED_BY},
    }

    def make(share: Share) -> dict[str, Any]:
        return _make(captions, videos, output, share, windows, options)

    found = bucket_folders.read(output)
    if found is not None:
        there = found.get("settings", {})
        if "vqvae_fingerprint" not in there:
            there |= {name: settings[name] for name in ("vqvae_fingerprint", *_SORTED_BY)}
        files.expect_settings(output / bucket_folders.LIST, settings, there)
        if found.get("complete", False):
            for size in buckets.parse(",".join(found["datasets"])):  # each says so, or what differs
                if not (output / str(size) / "metadata.json").exists():
                    raise PreprocessError(
                        f"{output / str(size)}: no dataset: expected the one that "
                        f"{bucket_folders.LIST} names: put it back, or remove {output}"
                    )
                make(Share(size, [], about))
            return
    output.mkdir(parents=True, exist_ok=True)
    with lock.exclusive(output):
        if found is None:
            measuring = Measuring(
                *(options.fps, options.clip_frames, options.crop_bars, options.video_timeout)
            )
            cell = [stride * patch for stride in model.downsample[1:]]
            sizes, numbers = sorting.sort(
                *(entries, videos, about), measuring=measuring, windows=windows, cell=tuple(cell)
            )
            found = {"complete": False, "settings": settings, "entries": numbers}
            found["sizes"] = [str(size) for size in sizes]
            if not options.dry_run:
                bucket_folders.write(output, found)
        made = []
        for k, size in enumerate(buckets.parse(",".join(found["sizes"]))):
            of_size = [i for i, number in enumerate(found["entries"]) if number == k]
            print(f"preprocess: bucket {size}: {len(of_size)} videos")
            if of_size:
                made.append((size, make(Share(size, of_size, about))))
        if not options.dry_run:
            _finish(output, settings, found, made)


def _check_options(options: Options, asked: str, bucket_tokens: int, patch: int) -> None:
    """Sees that the options are those of buckets.

    Raises:
      PreprocessError: naming what is not.
    """
    if asked != buckets.AUTO and options.n_frames:
        raise PreprocessError(
            f"n_frames={options.n_frames}: expected none: buckets={asked} says it"
        )
    if asked == buckets.AUTO and bucket_tokens < 1:
        raise PreprocessError(
            f"bucket_tokens={bucket_tokens}: expected at least 1, of buckets=auto"
        )
    if patch < 1:
        raise PreprocessError(f"patch={patch}: expected at least 1")
    if options.split_scenes:
        raise PreprocessError(
            f"split_scenes=True: expected False with buckets={asked}: chosen before shots are known"
        )
    options.check_lengths()


def _check_sizes(sizes: Sequence[Size], model: Tokenizer, options: Options) -> Windows:
    """How clips of all sizes are cut in time, if they fit the tokenizer."""
    common = {"window": options.window or model.n_frames, "tile": options.tile}
    common |= {"bucket": ""}  # or `n_frames` would be a window by itself
    least, clip_frames = list(model.downsample[1:]), options.clip_frames
    windows = one.windows_of({**common, "resolution": least, "n_frames": options.n_frames}, model)
    for size in sizes:
        if 0 < clip_frames < size.n_frames:
            raise PreprocessError(
                f"clip_frames={clip_frames}: expected at least {size.n_frames}, of buckets: {size}"
            )
        frames = {"n_frames": _n_frames(size, windows), "resolution": [size.height, size.width]}
        try:
            one.windows_of({**common, **frames}, model)
        except PreprocessError as error:
            raise PreprocessError(f"buckets: {size}: {error}") from None
    return windows


def _n_frames(size: Size, windows: Windows) -> int:
    """Frames that are encoded; an image is as many as there is a latent for."""
    return windows.least if size.is_image else size.n_frames


def _make(
    captions: str | os.PathLike,
    videos: str | os.PathLike,
    output: epath.Path,
    share: Share,
    windows: Windows,
    options: Options,
) -> dict[str, Any]:
    """Makes the dataset of a bucket; what became of its videos."""
    folder = output / str(share.size)
    options = dataclasses.replace(
        options,
        resolution=(share.size.height, share.size.width),
        n_frames=_n_frames(share.size, windows),
    )
    try:
        one.preprocess(captions, videos, folder, options, share)
    except NothingKeptError as error:
        return {"kept": 0, **error.left_out}
    if options.dry_run:
        return {}
    metadata = dataset.read_metadata(folder)
    return {name: metadata[name] for name in ("filtered", "failed")} | {
        "kept": metadata["counts"]["kept"]
    }


def _finish(
    output: epath.Path,
    settings: dict[str, Any],
    begun: dict[str, Any],
    made: list[tuple[Size, dict[str, Any]]],
) -> None:
    left_out = {
        kind: [video for _, record in made for video in record[kind]]
        for kind in ("filtered", "failed")
    }
    kept, n_failed = sum(record["kept"] for _, record in made), len(left_out["failed"])
    n_filtered = len(begun["entries"]) - kept - n_failed
    counts = {"kept": kept, "filtered": n_filtered, "failed": n_failed}
    print(f"preprocess: {output}: ", ", ".join(f"{n} {what}" for what, n in counts.items()), sep="")
    if not kept:
        raise NothingKeptError(output, left_out)
    value = {
        "complete": True,
        "settings": settings,
        "sizes": begun["sizes"],
        "datasets": [str(size) for size, record in made if record["kept"]],
        "counts": counts,
        **left_out,
    }
    bucket_folders.write(output, value)
