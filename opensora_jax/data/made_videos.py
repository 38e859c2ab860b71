"""Writes folders of videos that are made, not found: real files, and what they show."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from opensora_jax import files
from opensora_jax.data import video_io
from opensora_jax.data.buckets import Size, parse

# Of video i: its entry in captions.json, without the file, and its frames.
Make = Callable[[int], tuple[dict[str, Any], Callable[[], np.ndarray]]]


def write(folder: str | os.PathLike, make: Make, params: dict[str, Any]) -> bool:
    """Writes `folder/videos/video{i}.mp4` and `folder/captions.json`; goes on where it stopped.

    captions.json comes last, so a folder that has it is whole. `params`, of which the videos are a
    function, lie in `folder/params.json`.

    Args:
      make: (entry, render) of video i; render draws its frames, uint8 (T, H, W, 3).
      params: with n_videos and fps.

    Returns:
      False if the folder was whole already, True if anything was written.

    Raises:
      ValueError: the folder was made with other parameters.
    """
    folder = Path(folder)
    files.record_settings(folder / "params.json", params)
    if (folder / "captions.json").exists():
        return False
    videos = folder / "videos"
    videos.mkdir(exist_ok=True)
    for leftover in videos.glob(".*.tmp"):  # of a run that was killed while it wrote
        leftover.unlink()
    entries = []
    for i in tqdm.trange(params["n_videos"], desc=f"writing {videos}", unit="video"):
        entry, render = make(i)
        path = videos / f"video{i}.mp4"
        if not path.exists():
            video_io.write_video(path, render(), params["fps"])
        entries.append({"file": path.name, **entry})
    files.write_json(folder / "captions.json", entries)
    return True


def sizes(
    n_frames: int | None, resolution: int | Sequence[int] | None, several: Sequence[Size]
) -> dict[str, Any]:
    """What `params` say of sizes: one, or several, of which one is drawn for each video.

    Args:
      resolution: (height, width), or one number for both.

    Raises:
      ValueError: not the one or the other.
    """
    if bool(several) == (n_frames is not None and resolution is not None):
        raise ValueError("expected either n_frames and resolution, or several sizes")
    if several:
        return {"sizes": [str(size) for size in several]}
    whole = isinstance(resolution, int)
    return {"n_frames": n_frames, "resolution": resolution if whole else list(resolution)}


def size_of(params: Mapping[str, Any], i: int) -> Size:
    """That of video i, by what `sizes` has put into its `params`."""
    several = _sizes(params)
    # Drawn, not in turns, or what takes turns, too, would always be of one size.
    return several[np.random.default_rng([params["seed"], i, 1]).integers(len(several))]


def _sizes(params: Mapping[str, Any]) -> tuple[Size, ...]:
    if "sizes" in params:
        return parse(",".join(params["sizes"]))
    return (Size(params["n_frames"], *np.broadcast_to(params["resolution"], 2).tolist()),)


def check(params: dict[str, Any], *, n_phrasings: int, least_frames: int, least_side: int) -> None:
    """Sees that a folder can be written with these parameters.

    Raises:
      ValueError: naming one that is out of range.
    """
    video_io.check_fps(params["fps"])
    several = _sizes(params)
    named = ("sizes", "sizes") if "sizes" in params else ("n_frames", "resolution")
    for name, good, expected in (
        ("n_videos", params["n_videos"] >= 1, "at least 1"),
        ("seed", params["seed"] >= 0, "at least 0"),
        (
            *(named[0], all(size.n_frames >= least_frames for size in several)),
            f"at least {least_frames}" + " frames" * ("sizes" in params),
        ),
        (
            *(named[1], all(_is_side(n, least_side) for s in several for n in (s.height, s.width))),
            f"{least_side} or more, even",
        ),
        ("n_captions", 1 <= params["n_captions"] <= n_phrasings, f"1 to {n_phrasings}"),
    ):
        if not good:
            raise ValueError(f"{name}={params[name]}: expected {expected}")


def _is_side(n: int, least: int) -> bool:
    return n >= least and n % 2 == 0
