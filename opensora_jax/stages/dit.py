"""The stage that trains the DiT on an Arrow dataset."""

import logging
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import mesh as mesh_lib
from opensora_jax import rngs
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.convert.dit import open_blocks
from opensora_jax.data import dataset, pipeline
from opensora_jax.data.dataset import LatentDataset
from opensora_jax.inference.generator import Generator
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.train import loop
from opensora_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Captions of the validation videos that are sampled where the configuration names no prompts.
N_PROMPTS = 8
# Batches that a validation loss is the mean of.
N_VALIDATION_BATCHES = 4


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir`/dit to `config.dit.steps`.

    Beside checkpoints and metrics it writes sample videos, samples/stepNNNNNN/*.mp4 with their
    prompts in prompts.json, if the VQ-VAE that the dataset names is there to decode them.

    Raises:
      DatasetError: no dataset, or one that is not as expected.
      ValueError: the folder holds the training of another model, or sizes or `dit.init_from` do
        not fit.
    """
    c = config.dit
    folder = epath.Path(workdir) / "dit"
    data = dataset.open_dataset(config.data.dataset or epath.Path(workdir) / "dataset")
    n_frames = c.n_latent_frames or int(data.latent_shapes[:, 0].min())
    text_length = c.text_length or int(data.text_lengths.max())
    rows, validation_rows = _usable_rows(data, n_frames, c.validation_share)
    grid = (n_frames, *(int(n) for n in data.latent_shapes[0, 1:]))
    latents = Latents(data.codebook, data.code_counts)
    training = build.dit_training(
        config,
        latents,
        grid=grid,
        text_length=text_length,
        text_width=data.metadata["text_width"],
    )
    task = training.task
    mesh = mesh_lib.make_mesh(config.mesh)
    build.check_sequence(c, mesh, grid, text_length)
    start_from = dict
    if c.init_from:  # checked before the folder is claimed, so that sizes can still be changed
        start_from = open_blocks(c.init_from, build.dit_maker(training.dit, dtype=c.dtype))
    checkpoint.record_model(
        folder,
        {
            "dit": training.dit,
            "latent_grid": list(grid),
            "text_length": text_length,
            **{k: c[k] for k in ("objective", "time_shift", "prediction")},
            "latent_table": latents.table.tolist(),
            **{k: data.metadata[k] for k in ("vqvae", "text_model", "fps", "downsample")},
        },
    )
    if build.is_trained(folder, c.steps):
        logger.info("dit: %s: done already", folder)
        return

    def batches(rows: np.ndarray, seed: int | None):
        return pipeline.latents(
            data,
            rows,
            text_length=text_length,
            n_latent_frames=n_frames,
            seed=seed,
            **build.local_share(mesh, c.batch_size),
        )

    evaluations = []
    if len(validation_rows):
        evaluations.append(
            loop.Evaluation(c.eval_every, _validation(task, batches(validation_rows, 0), mesh))
        )
    evaluations.append(
        loop.Evaluation(c.eval_every, SampleVideos(config, folder, task, data, validation_rows))
    )
    loop.fit(
        task,
        training.tx,
        training.schedule,
        batches(rows, config.seed),
        mesh=mesh,
        folder=folder,
        settings=build.loop_settings(c, config.profile),
        step_settings=training.step_settings,
        throughput=training.throughput,
        evaluations=evaluations,
        start_from=start_from,
        config=build.recorded(config, "dit"),
    )
    build.mark_trained(folder, c.steps)


def _usable_rows(
    data: LatentDataset, n_frames: int, validation_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) that are long enough."""
    split = pipeline.split_by_video(data, validation_share)
    long_enough = data.latent_shapes[:, 0] >= n_frames
    rows, validation_rows = (part[long_enough[part]] for part in split)
    if not len(rows):
        raise ValueError(
            f"dit.n_latent_frames={n_frames}: expected at most {data.latent_shapes[:, 0].max()}, "
            f"the most latent frames in {data.folder}"
        )
    return rows, validation_rows


def _validation(task: DiTTask, batches, mesh):
    """An evaluation: losses of the averaged weights by noise level, always on the same batches."""
    step = jax.jit(task.eval_step)
    held = [mesh_lib.shard_batch(next(batches), mesh) for _ in range(N_VALIDATION_BATCHES)]

    def run(state: TrainState) -> dict[str, float]:
        with jax.set_mesh(mesh):
            values = [step(state.ema, batch, rngs.key(0, "validation")) for batch in held]
        values = jax.device_get(values)
        return {name: float(np.mean([v[name] for v in values])) for name in values[0]}

    return run


class SampleVideos:
    """An evaluation: writes sample videos of the averaged weights."""

    def __init__(
        self,
        config: ConfigDict,
        folder: Path,
        task: DiTTask,
        data: LatentDataset,
        validation_rows: np.ndarray,
    ):
        self._config, self._folder, self._data = config.sample, folder, data
        self._seed, self._rows = config.seed, validation_rows
        self._task = task
        self._generator: Generator | None = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        if jax.process_index() or jax.process_count() > 1:
            return {}  # a process has only its share of the weights
        if self._generator is None:
            try:
                self._generator = Generator.load(self._folder, self._task)
            except FileNotFoundError as error:
                logger.warning("no sample videos while training: %s", error)
                return {}
            self._prompts = list(self._config.prompts) or self._captions()
        folder = self._folder / "samples" / f"step{int(state.step):06d}"
        videos = self._generator.sample(
            self._prompts,
            params=state.ema,
            steps=self._config.steps,
            guidance=self._config.guidance,
            ancestral=self._config.ancestral,
            seed=self._seed,
        )
        self._generator.write(folder, self._prompts, videos)
        return {}

    def _captions(self) -> list[str]:
        rows = self._rows if len(self._rows) else np.arange(len(self._data))
        captions = dict.fromkeys(self._data.column(int(i), "caption") for i in rows[:200])
        return list(captions)[:N_PROMPTS]
