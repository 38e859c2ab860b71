"""The stage that grades samples of a made world by what its judge reads from their pixels."""

import json
import logging
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import video_io
from opensora_jax.inference.generator import Generator
from opensora_jax.metrics.shapes import shares
from opensora_jax.stages import shapes as shapes_stage
from opensora_jax.stages import worlds
from opensora_jax.stages.worlds import Question, World

logger = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir`/fidelity.json, of the DiT's last checkpoint.

    {"step": of that checkpoint, "n_samples": {"seen", "held_out"}, "seen": {"all", and each
    property}, "held_out": {...}}: shares of the samples that show what their caption says, of
    combinations that were trained on and of those that never were. Of a model of several sizes of
    videos there is "sizes", too: by frames x height x width what "seen" says, of all combinations.

    Of single shapes "outline": how well one rigid outline of the asked shape covers what is seen
    (`metrics.shapes.outline_score`), of "samples" and of "real" files, of all combinations.

    Of scenes "categories": of each what "seen" and "held_out" say; "real": what the judge says of
    real files, and "guessing": of real files with each other's captions.
    """
    workdir = Path(workdir)
    path = workdir / "fidelity.json"
    step = checkpoint.latest_step(workdir / "dit")
    if path.exists() and files.read_json(path).get("step") == step:
        logger.info("fidelity: %s: done already, at step %s", path, step)
        return
    world = worlds.of(config)
    asked = world.questions(config.fidelity.n_samples)
    generator = Generator.load(workdir / "dit", mesh_lib.make_mesh(config.mesh))
    params = generator.restore(workdir / "dit")

    def draw(grid: tuple[int, int, int]) -> np.ndarray:
        return generator.sample(
            [question.prompt for question in asked],
            params=params,
            sampling=build.sampling(config.sample),
            seed=config.seed + 1,
            grid=grid,
            batch_size=config.fidelity.batch_size,
        )

    videos = draw(generator.grids[0])
    real, shown = shapes_stage.labelled_videos(config, workdir, "held_out")
    real = list(map(video_io.read_video, real))
    result = {"step": step, **grade(world, asked, videos, real, shown)}
    labels = [question.label for question in asked]
    for i, grid in enumerate(generator.grids):
        sized = draw(grid) if i else videos
        size = "x".join(map(str, sized.shape[1:4]))
        if len(generator.grids) > 1:
            result.setdefault("sizes", {})[size] = shares(_judge(world, sized, labels))
    if jax.process_index() == 0:
        files.write_json(path, result)
    logger.info("fidelity: %s", json.dumps(result))


def grade(
    world: World,
    asked: Sequence[Question],
    videos: Sequence[np.ndarray],
    real: Sequence[np.ndarray] = (),
    shown: Sequence[Any] = (),
) -> dict[str, Any]:
    """Everything that `run` writes of samples of one size.

    Args:
      videos: a sample of each question.
      real: files of the world, to compare with, and what each shows.
    """
    labels = [question.label for question in asked]
    judged = _judge(world, videos, labels)
    held_out = np.array([question.is_held_out for question in asked])
    result = {
        "n_samples": {"seen": int((~held_out).sum()), "held_out": int(held_out.sum())},
        **_by_split(judged, held_out),
    }
    if world.outline_score:
        result["outline"] = {"samples": world.outline_score(videos, labels)}
        if shown:
            result["outline"]["real"] = world.outline_score(real, shown)
    of = np.array([question.category for question in asked])
    if any(of):
        result["categories"] = {
            name: _by_split(list(compress(judged, of == name)), held_out[of == name])
            for name in dict.fromkeys(of.tolist())
        }
    if any(of) and shown:
        result["real"] = shares(_judge(world, real, shown))
        # Each with the caption of the next in a random circle: none with its own.
        order = np.random.default_rng(0).permutation(len(shown)).tolist()
        others = [shown[i] for i in (*order[1:], order[0])]
        result["guessing"] = shares(_judge(world, [real[i] for i in order], others))
    return result


def _judge(
    world: World, videos: Sequence[np.ndarray], labels: Sequence[Any]
) -> list[dict[str, bool]]:
    return [world.judge(video, label) for video, label in zip(videos, labels, strict=True)]


def _by_split(
    judged: Sequence[dict[str, bool]], held_out_N: np.ndarray
) -> dict[str, dict[str, float]]:
    """{"seen": shares, "held_out": shares}, where there are any."""
    splits = {"seen": ~held_out_N, "held_out": held_out_N}
    return {
        name: shares(list(compress(judged, chosen_N)))
        for name, chosen_N in splits.items()
        if chosen_N.any()
    }
