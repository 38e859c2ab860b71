"""The shapes stage: writes the moving shapes dataset, a training and a held-out split."""

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
        folder = Path(workdir) / "shapes" / split
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
