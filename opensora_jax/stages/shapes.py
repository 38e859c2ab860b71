"""The shapes stage: writes the moving shapes dataset, a training and a held-out split."""

import json
import logging
import os
from pathlib import Path

from ml_collections import ConfigDict

from opensora_jax.data import moving_shapes

logger = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes `workdir/shapes/train` (seen combinations) and `workdir/shapes/held_out` (all).

    Reads config.seed and config.shapes.{n_videos, n_held_out, n_frames, resolution, fps,
    n_captions}. Goes on where an interrupted run stopped, and does nothing when both are whole.

    Raises:
      ValueError: a bad value in config.shapes, or a split made with other values.
    """
    shapes = config.shapes
    splits = {
        # Held-out videos differ from the training ones in everything that is drawn, not only in
        # their combinations: another seed.
        "train": (shapes.n_videos, moving_shapes.SEEN, config.seed),
        "held_out": (shapes.n_held_out, moving_shapes.ALL, config.seed + 1),
    }
    for split, (n_videos, combinations, seed) in splits.items():
        folder = split_folder(workdir, split)
        wrote = moving_shapes.write_dataset(
            folder,
            n_videos=n_videos,
            combinations=combinations,
            seed=seed,
            n_frames=shapes.n_frames,
            resolution=shapes.resolution,
            fps=shapes.fps,
            n_captions=shapes.n_captions,
        )
        logger.info("shapes: %s: %s", folder, "written" if wrote else "done already")


def split_folder(workdir: str | os.PathLike, split: str) -> Path:
    """The folder of a split, train or held_out: captions.json and videos/."""
    return Path(workdir) / "shapes" / split


def labelled_videos(
    workdir: str | os.PathLike, split: str
) -> tuple[list[Path], list[tuple[str, str, str]]]:
    """The videos of a split, if it is there, and the (color, shape, direction) of each."""
    folder = split_folder(workdir, split)
    path = folder / "captions.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    paths = [folder / "videos" / entry["file"] for entry in entries]
    return paths, [(e["color"], e["shape"], e["direction"]) for e in entries]
