"""The shapes stage: writes the videos of a world, a training and a held-out split."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from opensora_jax.data import buckets
from opensora_jax.stages import worlds

logger = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes `workdir/shapes/train` (seen combinations) and `workdir/shapes/held_out` (all).

    Reads config.seed and config.shapes. Goes on where an interrupted run stopped, and does nothing
    when both are whole.

    Raises:
      ValueError: a bad value in config.shapes, or a split made with other values.
    """
    shapes, world = config.shapes, worlds.of(config)
    splits = {
        # Held-out videos differ from the training ones in everything that is drawn, not only in
        # their combinations: another seed.
        "train": (shapes.n_videos, config.seed),
        "held_out": (shapes.n_held_out, config.seed + 1),
    }
    size = {"n_frames": shapes.n_frames, "resolution": shapes.resolution}
    if shapes.get("sizes", ""):
        size = {"sizes": buckets.parse(shapes.sizes)}
    for split, (n_videos, seed) in splits.items():
        folder = split_folder(workdir, split)
        wrote = world.write(
            folder,
            split == "train",
            n_videos=n_videos,
            seed=seed,
            **size,
            fps=shapes.fps,
            n_captions=shapes.n_captions,
        )
        logger.info("shapes: %s: %s", folder, "written" if wrote else "done already")


def split_folder(workdir: str | os.PathLike, split: str) -> Path:
    """The folder of a split, train or held_out: captions.json and videos/."""
    return Path(workdir) / "shapes" / split


def labelled_videos(
    config: ConfigDict, workdir: str | os.PathLike, split: str
) -> tuple[list[Path], list[Any]]:
    """The videos of a split, if it is there, and what each shows, for `World.judge`."""
    folder = split_folder(workdir, split)
    path = folder / "captions.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    paths = [folder / "videos" / entry["file"] for entry in entries]
    return paths, [worlds.of(config).label(entry) for entry in entries]
