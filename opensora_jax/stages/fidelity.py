"""The stage that grades samples of moving shapes by what `detect` reads from their pixels."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import moving_shapes, video_io
from opensora_jax.inference.generator import Generator
from opensora_jax.metrics import shapes
from opensora_jax.stages import shapes as shapes_stage

logger = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: Path) -> None:
    """Writes `workdir`/fidelity.json, of the DiT's last checkpoint.

    {"step": of that checkpoint, "seen": {"all", "color", "shape", "direction"}, "held_out": {...},
    "n_samples": {...}}: shares of the samples that show what their caption says, for combinations
    that were trained on and for those that never were. "outline": how well one rigid outline of
    the asked shape covers what is seen (`metrics.shapes.outline_score`), of "samples" and of "real"
    files, of all combinations. Of a model of several sizes of videos there is "sizes", too: by
    frames x height x width what "seen" says, of all combinations.
    """
    workdir = Path(workdir)
    path = workdir / "fidelity.json"
    step = checkpoint.latest_step(workdir / "dit")
    if path.exists() and files.read_json(path).get("step") == step:
        logger.info("fidelity: %s: done already, at step %s", path, step)
        return
    combinations = [
        moving_shapes.ALL[i % len(moving_shapes.ALL)] for i in range(config.fidelity.n_samples)
    ]
    prompts = [
        moving_shapes.captions(*combination)[i // len(moving_shapes.ALL) % 2]
        for i, combination in enumerate(combinations)
    ]
    generator = Generator.load(workdir / "dit", mesh_lib.make_mesh(config.mesh))
    params = generator.restore(workdir / "dit")

    def draw(grid: tuple[int, int, int]) -> np.ndarray:
        return generator.sample(
            prompts,
            params=params,
            sampling=build.sampling(config.sample),
            seed=config.seed + 1,
            grid=grid,
            batch_size=config.fidelity.batch_size,
        )

    videos = draw(generator.grids[0])
    result = {"step": step, "n_samples": {}}
    for name, group in (("seen", moving_shapes.SEEN), ("held_out", moving_shapes.HELD_OUT)):
        index = [i for i, combination in enumerate(combinations) if combination in group]
        result["n_samples"][name] = len(index)
        if index:
            result[name] = shapes.score(videos[index], [combinations[i] for i in index])
    real = shapes_stage.labelled_videos(workdir, "held_out")
    result["outline"] = {
        "samples": shapes.outline_score(videos, combinations),
        "real": shapes.outline_score(map(video_io.read_video, real[0]), real[1]),
    }
    for i, grid in enumerate(generator.grids):
        sized = draw(grid) if i else videos
        size = "x".join(map(str, sized.shape[1:4]))
        if len(generator.grids) > 1:
            result.setdefault("sizes", {})[size] = shapes.score(sized, combinations)
    if jax.process_index() == 0:
        files.write_json(path, result)
    logger.info("fidelity: %s", json.dumps(result))
