"""Writes folders of videos that are made, not found: real files, and what they show."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from opensora_jax import files
from opensora_jax.data import video_io

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


def check(params: dict[str, Any], *, n_phrasings: int, least_frames: int, least_side: int) -> None:
    """Sees that a folder can be written with these parameters.

    Raises:
      ValueError: naming one that is out of range.
    """
    video_io.check_fps(params["fps"])
    sides = np.atleast_1d(params["resolution"])
    for name, good, expected in (
        ("n_videos", params["n_videos"] >= 1, "at least 1"),
        ("seed", params["seed"] >= 0, "at least 0"),
        ("n_frames", params["n_frames"] >= least_frames, f"at least {least_frames}"),
        (
            *("resolution", all(side >= least_side and side % 2 == 0 for side in sides)),
            f"{least_side} or more, even",
        ),
        ("n_captions", 1 <= params["n_captions"] <= n_phrasings, f"1 to {n_phrasings}"),
    ):
        if not good:
            raise ValueError(f"{name}={params[name]}: expected {expected}")
