"""The worlds that the stage `shapes` can make: how each is written, asked for and graded."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from opensora_jax.data import moving_shapes, scenes
from opensora_jax.metrics import scenes as scenes_metrics
from opensora_jax.metrics import shapes as shapes_metrics


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, and what its video has to show.

    Attributes:
      label: for `World.judge`.
      category: of the world's; empty where it has none.
      is_held_out: whether it is a combination that was never trained on.
    """

    prompt: str
    label: Any
    category: str
    is_held_out: bool


@dataclasses.dataclass(frozen=True)
class World:
    """One kind of made videos.

    Attributes:
      write: (folder, whether for training, number of videos, seed, other options) -> whether
        anything was written.
      label: what the video of an entry of captions.json shows.
      questions: so many, over all combinations.
      judge: (video, label) -> whether it shows "all" of it, and each property by its name.
      outline_score: as `metrics.shapes.outline_score`, of one shape.
      tells_whole: whether a caption says what happens from a video's first frame to its last.
    """

    write: Callable[..., bool]
    label: Callable[[Mapping[str, Any]], Any]
    questions: Callable[[int], list[Question]]
    judge: Callable[[np.ndarray, Any], dict[str, bool]]
    outline_score: Callable[..., dict[str, float]] | None = None
    tells_whole: bool = False


def of(config: ConfigDict) -> World:
    """The one that `config.shapes.world` names."""
    return WORLDS[config.shapes.get("world", "single")]


def _write_single(folder: Path, training: bool, **options: Any) -> bool:
    combinations = moving_shapes.SEEN if training else moving_shapes.ALL
    return moving_shapes.write_dataset(folder, combinations=combinations, **options)


def _ask_single(n: int) -> list[Question]:
    every = moving_shapes.ALL
    return [
        Question(
            moving_shapes.captions(*every[i % len(every)])[i // len(every) % 2],
            *(every[i % len(every)], ""),
            is_held_out=every[i % len(every)] in moving_shapes.HELD_OUT,
        )
        for i in range(n)
    ]


def _write_scenes(folder: Path, training: bool, **options: Any) -> bool:
    return scenes.write_dataset(folder, split="seen" if training else "all", **options)


def _ask_scenes(n: int) -> list[Question]:
    """Categories take turns, and of each what was seen and what was held out."""
    asked, rng = [], np.random.default_rng(0)
    for i in range(n):
        is_held_out = bool(i // len(scenes.CATEGORIES) % 2)
        scene = scenes.draw(rng, "held_out" if is_held_out else "seen", i)
        prompt = str(rng.choice(scenes.captions(scene)))
        asked.append(Question(prompt, scene.facts(), scene.category, is_held_out))
    return asked


WORLDS = {
    "single": World(
        write=_write_single,
        label=lambda entry: (entry["color"], entry["shape"], entry["direction"]),
        questions=_ask_single,
        judge=shapes_metrics.judge,
        outline_score=shapes_metrics.outline_score,
    ),
    "scenes": World(
        write=_write_scenes,
        label=lambda entry: entry["facts"],
        questions=_ask_scenes,
        judge=scenes_metrics.judge,
        tells_whole=True,
    ),
}
