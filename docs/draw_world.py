"""Draws docs/world.png: frames of two scenes of each category, one below the other.

python docs/draw_world.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from opensora_jax.data import scenes

SHOWN = (0, 3, 6, 9, 12, 15)  # of 16 frames
PER_CATEGORY = 2


def main() -> None:
    n = PER_CATEGORY * len(scenes.CATEGORIES)
    figure, axes = plt.subplots(n // 2, 2, figsize=(9, 0.5 * n), layout="constrained")
    for i, ax in enumerate(axes.T.flat):
        rng = np.random.default_rng([16, i])
        category = i // PER_CATEGORY
        scene = scenes.draw(rng, "all", category)
        video_THWC = scenes.render(rng, scene, 16, 64, 64)
        frames = [np.pad(frame, ((0, 0), (1, 1), (0, 0))) for frame in video_THWC[list(SHOWN)]]
        ax.imshow(np.concatenate(frames, axis=1))
        ax.set_title(scenes.captions(scene)[0], fontsize=7)
        ax.axis("off")
    figure.savefig(Path(__file__).with_name("world.png"), dpi=90)


if __name__ == "__main__":
    main()
