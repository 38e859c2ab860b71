"""The stage that trains the DiT on an Arrow dataset."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import files, rngs, runtime
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.convert.dit import open_blocks
from opensora_jax.data import dataset, pipeline
from opensora_jax.data.dataset import LatentDataset
from opensora_jax.data.parts import TEXT, DatasetError
from opensora_jax.data.streaming import StreamedParts, readings
from opensora_jax.diffusion import objectives
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.train import loop
from opensora_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Captions of the validation videos that are sampled where the configuration names no prompts.
N_PROMPTS = 8
# Share of the rows that are long enough for the length that is chosen where none is asked for.
USABLE = 0.9
# Batches that a validation loss is the mean of, at least.
N_VALIDATION_BATCHES = 4


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir`/dit to `config.dit.steps`.

    Beside checkpoints and metrics it writes sample videos, samples/stepNNNNNN/*.mp4 with their
    prompts in prompts.json, if the tokenizer that the dataset names is there to decode them. A
    training that is done asks for no dataset.

    Raises:
      DatasetError: no dataset, or one that is not as expected.
      ValueError: the folder holds the training of another model, or sizes or `dit.init_from` do
        not fit.
    """
    folder = epath.Path(workdir) / "dit"
    config = config.copy_and_resolve_references()
    begun = None
    if (folder / checkpoint.MODEL_FILE).exists():
        begun = DiTDescription.read(folder)
        config.dit = build.adopt(config.dit, begun.dit, begun.objective)
    c = config.dit
    if build.is_trained(folder, c.steps):
        _expect_same_model(c, folder)
        logger.info("dit: %s: done already", folder)
        return
    streaming = build.streaming(config.data)
    folders = build.dataset_folders(config, workdir)
    sets = [dataset.open_dataset(path, streaming) for path in folders]
    _expect_alike(sets)
    data, mesh = sets[0], mesh_lib.make_mesh(config.mesh)
    text_length = c.text_length or max(int(part.index.text_lengths.max()) for part in sets)
    training_part, validation_part = _buckets(c, sets, _lengths(c, sets, begun), mesh)
    grids = [bucket.grid for bucket in training_part]
    for grid in grids:
        build.check_patch(c, grid)
        build.check_sequence(c, mesh, grid, text_length)
    code_counts = sum(part.code_counts for part in sets)
    latents = _latents(c, data, code_counts, folder, begun)
    c = config.dit = build.choose(c, latents, code_counts)
    training = build.dit_training(
        config,
        latents,
        grid=max(grids, key=math.prod),
        text_length=text_length,
        text_width=data.metadata["text_width"],
        extent=_extent(grids, c.patch) if len(grids) > 1 else None,
    )
    task = training.task
    start_from = dict
    if c.init_from:  # checked before the folder is taken, so that sizes can still be changed
        start_from = open_blocks(c.init_from, task.config)
    description = DiTDescription(
        dit=task.config,
        objective=task.objective,
        latents=task.latents,
        latent_grid=grids[0],
        latent_grids=tuple(grids) if len(grids) > 1 else (),
        text_length=text_length,
        **{name: data.metadata[name] for name in ("vqvae", "text_model", "fps", "downsample")},
        window=data.metadata.get("window"),
        causal=data.metadata.get("causal", False),
        tile=data.metadata.get("tile"),
    )
    description.record(folder)

    evaluations = []
    if validation_part:
        validation_batches = pipeline.latents(validation_part, text_length=text_length, seed=0)
        n = max(N_VALIDATION_BATCHES, len(validation_part))
        validation = Validation(task, validation_batches, n, mesh, c.accumulate)
        evaluations.append(loop.Evaluation(c.eval_every, validation))
    prompts = list(config.sample.prompts) or _prompts(data, validation_part)
    samples = SampleVideos(config, folder, task, description, prompts, mesh)
    evaluations.append(loop.Evaluation(c.eval_every, samples))
    streamed = [part.streamed for part in sets if part.streamed]
    try:
        loop.fit(
            task,
            training.tx,
            training.schedule,
            pipeline.latents(training_part, text_length=text_length, seed=config.seed),
            mesh=mesh,
            folder=folder,
            settings=build.loop_settings(c, config.profile),
            step_settings=training.step_settings,
            throughput=training.throughput,
            loading=_loading(streamed),
            evaluations=evaluations,
            start_from=start_from,
            config=build.recorded(config, "dit", "sample"),
        )
    finally:
        for part in streamed:
            part.close()
    build.mark_trained(folder, c.steps)


def _loading(streamed: Sequence[StreamedParts]) -> Callable[[], dict[str, float]] | None:
    """What tells for the log how fast datasets were read where they are, if any are."""
    n = jax.process_count()
    return (lambda: readings(streamed, n)) if streamed else None


def _expect_same_model(c: ConfigDict, folder: epath.Path) -> None:
    """Sees that what was trained in `folder` is what `config.dit` asks for.

    Raises:
      ValueError: naming what differs.
    """
    there = DiTDescription.read(folder)
    given = ("channels", "out_channels", "n_codes", "text_width", "extent")
    asked = networks.dit_config(c, **{name: getattr(there.dit, name) for name in given})
    files.expect_settings(
        folder / checkpoint.MODEL_FILE,
        {"dit": vars(asked), **objectives.to_fields(objectives.from_fields(c))},
        {"dit": vars(there.dit), **objectives.to_fields(there.objective)},
    )


def _latents(
    c: ConfigDict,
    data: LatentDataset,
    code_counts: np.ndarray,
    folder: epath.Path,
    begun: DiTDescription | None,
) -> Latents:
    """Those of `config.dit` c, or of the training that was begun in `folder`, if it fits.

    Raises:
      ValueError: it has other components than c asks for.
    """
    if begun is not None:
        there = begun.latents
        channels = data.codebook.shape[1]
        asked = c.components
        if asked != "auto":
            asked = min(asked, channels) or channels
        if asked not in ("auto", there.channels):
            raise ValueError(
                f"{folder / checkpoint.MODEL_FILE}: made with other settings: "
                f"components={asked}, there {there.channels}. Use another folder, or remove it"
            )
        if len(there.table) == len(data.codebook):
            return there
    return build.latents(c, data.codebook, code_counts, tuple(data.metadata.get("levels", ())))


def _expect_alike(sets: Sequence[LatentDataset]) -> None:
    """Sees that datasets of several sizes were made by the same models.

    Raises:
      DatasetError: naming what differs.
    """
    first, *rest = sets
    for other in rest:
        for key in (
            "vqvae_fingerprint",
            "text_model",
            "downsample",
            "window",
            "causal",
            "tile",
        ):
            one, two = first.metadata.get(key), other.metadata.get(key)
            if one != two:
                raise DatasetError(
                    f"{other.folder}: {key}={files.short(two)}: expected {files.short(one)}, as in "
                    f"{first.folder}"
                )
        if not np.array_equal(first.codebook, other.codebook):
            raise DatasetError(f"{other.folder}: expected the codebook of {first.folder}")
        one, two = first.metadata["fps"], other.metadata["fps"]
        if one != two and not (_keeps_rates(first) and _keeps_rates(other)):
            raise DatasetError(f"{other.folder}: fps={two}: expected {one}, as in {first.folder}")


def _keeps_rates(data: LatentDataset) -> bool:
    """Whether each video has the frames a second of its file."""
    return data.metadata.get("settings", {}).get("fps", 0) is None


def _is_bucket(data: LatentDataset) -> bool:
    return "bucket" in data.metadata.get("settings", {})


def _lengths(
    c: ConfigDict, sets: Sequence[LatentDataset], begun: DiTDescription | None
) -> list[list[int]]:
    """Latent frames of the examples of each dataset, one or several lengths; what is asked for cuts
    the clips of a bucket, which keep their length where they are shorter."""
    if c.n_latent_frames:
        asked = np.atleast_1d(c.n_latent_frames).tolist()
        own = [
            int(part.index.video_frames.max()) if _is_bucket(part) else max(asked) for part in sets
        ]
        return [list(dict.fromkeys(min(n, most) for n in asked)) for most in own]
    if begun and len(sets) == 1:
        return [[begun.latent_grid[0]]]
    return [[_usual_frames(part)] for part in sets]


def _buckets(
    c: ConfigDict, sets: Sequence[LatentDataset], lengths: Sequence[Sequence[int]], mesh: Mesh
) -> tuple[list[pipeline.Bucket], list[pipeline.Bucket]]:
    """(training, validation): every dataset at its lengths, all batches of about as many tokens.

    The largest size has batches of `dit.batch_size`, smaller ones larger batches.
    """
    sized = [(part, n) for part, of in zip(sets, lengths, strict=True) for n in of]
    most = max(n * math.prod(part.grid) for part, n in sized)
    multiple = mesh.shape["data"] * mesh.shape["fsdp"] * c.accumulate
    found = [], []
    for part, n in sized:
        size = c.batch_size * most // (n * math.prod(part.grid))
        share = build.local_share(mesh, max(size // multiple, 1) * multiple)
        split = _usable_rows(part, n, c.validation_share)
        for buckets, rows in zip(found, split, strict=True):
            if len(rows):
                bucket = pipeline.Bucket(part, rows, n, **share, stride=part.window_latents)
                buckets.append(bucket)
    return found


def _extent(grids: Sequence[tuple[int, int, int]], patch: int) -> tuple[int, int, int]:
    """The most tokens along each axis."""
    t, h, w = np.max(grids, axis=0).tolist()
    return t, h // patch, w // patch


def _usual_frames(data: LatentDataset) -> int:
    """Latent frames of an example that most of the data has: the most, in whole windows where there
    are any and not all are of one length, of which `USABLE` of the rows have so many.
    """
    frames, window = data.latent_frames, data.window_latents
    n = int(np.quantile(frames, 1 - USABLE, method="lower"))
    if frames.min() < frames.max():
        n = n // window * window or n
    left_out = int((frames < n).sum())
    logger.info("dit: dit.n_latent_frames is %d, which suits most of the data", n)
    if left_out:
        logger.info("dit: %d of %d rows are shorter and left out", left_out, len(frames))
    return n


def _usable_rows(
    data: LatentDataset, n_frames: int, validation_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) that are long enough."""
    split = pipeline.split_by_video(data, validation_share)
    long_enough = data.latent_frames >= n_frames
    rows, validation_rows = (part[long_enough[part]] for part in split)
    if not len(rows):
        raise ValueError(
            f"dit.n_latent_frames={n_frames}: expected at most {data.index.video_frames.max()}, "
            f"the most latent frames in {data.folder}"
        )
    return rows, validation_rows


def _prompts(
    data: LatentDataset, validation: Sequence[pipeline.Bucket]
) -> dict[str, Any] | list[str]:
    """Captions of the validation videos; where rows have none, their text features, by a name."""
    rows = validation[0].rows if validation else np.arange(min(200, len(data)))
    data = validation[0].dataset if validation else data
    if data.has_column("caption"):
        captions: dict[str, None] = {}
        for i in rows[:200]:
            captions[data.column(int(i), "caption")] = None
            if len(captions) == N_PROMPTS:
                break
        return list(captions)
    return {f"row {i}": data[int(i)][TEXT] for i in rows[:N_PROMPTS]}


class Validation:
    """An evaluation: losses of the averaged weights by noise level, always on the same batches.

    Args:
      accumulate: microbatches a batch, so that what fits in training fits here.
    """

    def __init__(
        self,
        task: DiTTask,
        batches: Iterator[dict[str, np.ndarray]],
        n_batches: int,
        mesh: Mesh,
        accumulate: int,
    ):
        self._step, self._mesh = jax.jit(task.eval_step, static_argnames="accumulate"), mesh
        self._accumulate = accumulate
        self._batches = [mesh_lib.shard_batch(next(batches), mesh) for _ in range(n_batches)]

    def __call__(self, state: TrainState) -> dict[str, float]:
        key = rngs.key(0, "validation")
        with jax.set_mesh(self._mesh):
            losses = [
                self._step(state.ema, batch, key, accumulate=self._accumulate)
                for batch in self._batches
            ]
        losses = jax.device_get(losses)
        return {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]}


class SampleVideos:
    """An evaluation: writes sample videos of the averaged weights."""

    def __init__(
        self,
        config: ConfigDict,
        folder: epath.Path,
        task: DiTTask,
        description: DiTDescription,
        prompts: list[str] | dict[str, np.ndarray],
        mesh: Mesh,
    ):
        self._config, self._folder, self._prompts = config, folder, prompts
        self._generator: Generator | None = None
        problem = None
        try:
            self._generator = Generator(description, task, mesh)
        except FileNotFoundError as error:
            problem = str(error)
        # All draw together, or none.
        if (problem := runtime.first_text(problem)) is not None:
            logger.warning("no sample videos while training: %s", problem)
            self._generator = None

    def __call__(self, state: TrainState) -> dict[str, float]:
        if self._generator is None:
            return {}
        c = self._config.sample
        videos = self._generator.sample(
            self._prompts,
            params=state.ema,
            sampling=build.sampling(c),
            seed=self._config.seed,
        )
        if jax.process_index() == 0:
            folder = self._folder / "samples" / f"step{int(state.step):06d}"
            self._generator.write(folder, list(self._prompts), videos)
        return {}
