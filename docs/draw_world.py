"""Draws docs/world.png: frames of two scenes of each category; with a trained world's samples also
docs/world_samples.png: the same of these.

python docs/draw_world.py [--workdir=runs/world]
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from opensora_jax.data import scenes, video_io

SHOWN = (0, 3, 6, 9, 12, 15)  # of 16 frames
PER_CATEGORY = 2


def draw(name: str, rows: list[tuple[str, np.ndarray]]) -> None:
    """Of each (title, video (T, H, W, 3)) some frames, in two columns."""
    n = len(rows)
    figure, axes = plt.subplots(n // 2, 2, figsize=(9, 0.5 * n), layout="constrained")
    for (title, video_THWC), ax in zip(rows, axes.T.flat, strict=True):
        frames = [np.pad(frame, ((0, 0), (1, 1), (0, 0))) for frame in video_THWC[list(SHOWN)]]
        ax.imshow(np.concatenate(frames, axis=1))
        ax.set_title(title, fontsize=7)
        ax.axis("off")
    figure.savefig(Path(__file__).with_name(name), dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="of a finished configs/world.py")
    args = parser.parse_args()
    rows = []
    for i in range(PER_CATEGORY * len(scenes.CATEGORIES)):
        rng = np.random.default_rng([16, i])
        scene = scenes.draw(rng, "all", i // PER_CATEGORY)
        rows.append((scenes.captions(scene)[0], scenes.render(rng, scene, 16, 64, 64)))
    draw("world.png", rows)
    if args.workdir:
        folder = max((args.workdir / "dit" / "samples").iterdir())  # of the last step
        entries = json.loads((folder / "prompts.json").read_text())
        samples = [(x["prompt"], video_io.read_video(folder / x["file"])) for x in entries]
        draw("world_samples.png", samples)


if __name__ == "__main__":
    main()
