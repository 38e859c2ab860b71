"""The stage that trains the VQ-VAE from a folder of videos."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import pipeline, video_io
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.metrics import pixel, shapes
from opensora_jax.stages import shapes as shapes_stage
from opensora_jax.stages import worlds
from opensora_jax.stages.worlds import World
from opensora_jax.tasks.vqvae import NEW_KEYS, VQVAETask, describe
from opensora_jax.train import loop
from opensora_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Videos that evaluation reconstructs, and of these how many it shows.
N_EVALUATED = 240
N_SHOWN = 8


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir`/vqvae to `config.vqvae.steps`.

    Beside checkpoints and metrics it writes reconstruction.json (PSNR in dB, SSIM, perplexity and
    number of codes used and, for videos of a world, the share of reconstructions in which its judge
    still reads what they show, and of single shapes how well rigid outlines cover them),
    code_counts.npy, how often each code was used, and samples/*.mp4, originals above
    reconstructions.

    Raises:
      FileNotFoundError: no videos.
      ValueError: the folder holds the training of another model.
    """
    c = config.vqvae
    folder = epath.Path(workdir) / "vqvae"
    task = build.vqvae_task(c, load_tokenizer(c.init_from) if c.init_from else None)
    described = describe(task.config, task.adversarial)
    if (folder / checkpoint.MODEL_FILE).exists():
        checkpoint.record_model(folder, described, new_keys=NEW_KEYS)
    if build.is_trained(folder, c.steps):
        logger.info("vqvae: %s: done already", folder)
        return
    made = shapes_stage.split_folder(workdir, "train") / "videos"
    paths = pipeline.find_videos(config.data.videos or made)
    source, stills = clip_source(config, paths), still_source(config)
    mesh = mesh_lib.make_mesh(config.mesh)
    kind, videos = evaluation_videos(config, workdir, paths)
    # The folder is taken when it is known that there is something to train on.
    checkpoint.record_model(folder, described, new_keys=NEW_KEYS)
    # What fits in training fits here.
    evaluate = Reconstruction(task, mesh, kind, videos, batch_size=c.batch_size // c.accumulate)
    tx, schedule = build.optimizer(c)
    loop.fit(
        task,
        tx,
        schedule,
        pipeline.clips(
            source,
            stills=stills,
            still_share=c.still_share,
            seed=config.seed,
            workers=config.data.workers,
            **build.local_share(mesh, c.batch_size),
        ),
        mesh=mesh,
        folder=folder,
        settings=build.loop_settings(c, config.profile),
        step_settings=build.step_settings(c, config.seed),
        throughput=build.throughput(tokens(c)),
        evaluations=[loop.Evaluation(c.eval_every, lambda state: evaluate(state, folder))],
        config=build.recorded(config, "vqvae"),
    )
    build.mark_trained(folder, c.steps)


def tokens(c: ConfigDict) -> int:
    """Codes that a step trains on."""
    _, h, w = c.downsample
    n_latents = networks.vqvae_windows(c).latents(c.n_frames)
    return c.batch_size * n_latents * (c.resolution // h) * (c.resolution // w)


def clip_source(config: ConfigDict, paths: Sequence[Path]) -> pipeline.ClipSource:
    """Clips of these videos as `config.vqvae` wants them.

    Raises:
      ValueError: not one of the videos can be used.
    """
    c = config.vqvae
    source = pipeline.ClipSource(paths, c.n_frames, c.resolution, c.fps or None)
    if all(source.clip(i, np.random.default_rng(0)) is None for i in range(len(source))):
        raise ValueError(
            f"{paths[0].parent}: none of the {len(paths)} videos can be used: expected readable "
            f"videos of at least vqvae.n_frames={c.n_frames} frames"
        )
    return source


def still_source(config: ConfigDict) -> pipeline.StillSource | None:
    """Images beside the videos, if `config.data.images` says where; as `clip_source`."""
    if not config.data.images:
        return None
    c, paths = config.vqvae, pipeline.find_images(config.data.images)
    source = pipeline.StillSource(paths, c.n_frames, c.resolution)
    if all(source.clip(i, np.random.default_rng(0)) is None for i in range(len(source))):
        raise ValueError(f"{config.data.images}: none of the {len(paths)} images can be read")
    return source


@dataclasses.dataclass(frozen=True)
class EvaluationVideos:
    """Clips to reconstruct.

    Attributes:
      clips: uint8 (N, T, H, W, 3).
      fps: frames a second that they are shown at.
      labels: what each shows, of a world whose judge can tell it from clips of this length.
      world: that one.
    """

    clips: np.ndarray
    fps: float
    labels: list[Any] | None = None
    world: World | None = None


def evaluation_videos(
    config: ConfigDict, workdir: Path, training: Sequence[Path]
) -> tuple[str, EvaluationVideos]:
    """("held_out", those of the configuration or of the held-out moving shapes), or, where there
    are none, ("train", some of the training videos)."""
    kind, paths, labels = "held_out", None, None
    if config.data.held_out_videos:
        paths = pipeline.find_videos(config.data.held_out_videos)
    elif not config.data.videos:
        paths, labels = shapes_stage.labelled_videos(config, workdir, "held_out")
    world = worlds.of(config)
    if labels and world.tells_whole:  # of several sizes, some may be seen whole
        is_whole = (i for i, path in enumerate(paths) if _is_whole(config.vqvae, path))
        whole = list(islice(is_whole, N_EVALUATED))
        labels = [labels[i] for i in whole] or None
        paths = [paths[i] for i in whole] or paths
    if not paths:
        kind, paths = "train", training
    paths = paths[:N_EVALUATED]
    source = clip_source(config, paths)
    found = [source.clip(i, np.random.default_rng(i)) for i in range(len(paths))]
    usable = [i for i, clip in enumerate(found) if clip is not None]
    fps = config.vqvae.fps or video_io.probe(paths[usable[0]]).fps
    clips = np.stack([found[i]["video"] for i in usable])
    return kind, EvaluationVideos(clips, fps, labels and [labels[i] for i in usable], world)


def _is_whole(c: ConfigDict, path: Path) -> bool:
    """Whether a clip of this video is all of it."""
    info = video_io.probe(path)
    is_whole = c.n_frames == info.n_frames and info.height == info.width
    return is_whole and (not c.fps or math.isclose(c.fps, info.fps))


class Reconstruction:
    """An evaluation: what is left of videos as codes.

    Args:
      kind: "held_out" or "train", which videos they are; the metrics are named after it.
    """

    def __init__(
        self, task: VQVAETask, mesh: Mesh, kind: str, videos: EvaluationVideos, *, batch_size: int
    ):
        self._task, self._mesh, self._kind, self._videos = task, mesh, kind, videos
        self._batch_size = min(batch_size, len(videos.clips))
        # Whole, so that every process can read it.
        self._eval_step = jax.jit(task.eval_step, out_shardings=mesh_lib.replicated(mesh))

    def __call__(self, state: TrainState, folder: epath.Path) -> dict[str, float]:
        originals = self._videos.clips
        recons, codes = self._reconstruct(state)
        counts = np.bincount(codes.reshape(-1), minlength=self._task.config.n_codes)
        p = counts[counts > 0] / counts.sum()
        pairs = list(zip(originals, recons, strict=True))
        result = {
            "psnr": float(np.mean([pixel.psnr(a, b) for a, b in pairs])),
            "ssim": float(np.mean([pixel.ssim(a, b) for a, b in pairs])),
            "perplexity": float(np.exp(-(p * np.log(p)).sum())),
            "codes_used": int((counts > 0).sum()),
        }
        if self._videos.labels:
            labels, world = self._videos.labels, self._videos.world
            score = shapes.shares([world.judge(v, x) for v, x in zip(recons, labels, strict=True)])
            result |= {f"detected_{name}": value for name, value in score.items()}
            if world.outline_score:
                score = world.outline_score(recons, labels)
                result |= {f"outline_{name}": value for name, value in score.items()}
        if jax.process_index() == 0:
            self._write(folder, int(state.step), recons, result, counts)
        return {f"{self._kind}/{name}": float(value) for name, value in result.items()}

    def _reconstruct(self, state: TrainState) -> tuple[np.ndarray, np.ndarray]:
        """Of all videos, (uint8 reconstructions, codes)."""
        videos = self._videos.clips
        n, size = len(videos), self._batch_size
        recons, codes = [], []
        for start in range(0, n, size):
            # The last batch is filled up, so that one compilation serves all.
            index = np.minimum(np.arange(start, start + size), n - 1)
            with jax.set_mesh(self._mesh):
                _, out = self._eval_step(state.ema, state.extra, {"video": videos[index]})
            recons.append(np.asarray(out["recon"])[: n - start])
            codes.append(np.asarray(out["codes"])[: n - start])
        return np.concatenate(recons), np.concatenate(codes)

    def _write(self, folder, step, recons, result, counts) -> None:
        chosen = np.linspace(0, len(recons) - 1, min(N_SHOWN, len(recons))).astype(int)
        rows = [np.concatenate(list(v[chosen]), axis=2) for v in (self._videos.clips, recons)]
        samples = folder / "samples"
        samples.mkdir(exist_ok=True)
        with files.local(samples / f"step{step:06d}.mp4") as path:
            video_io.write_video(path, np.concatenate(rows, axis=1), self._videos.fps)
        files.write_array(folder / "code_counts.npy", counts)
        written = {"step": step, "videos": self._kind, **result}
        files.write_json(folder / "reconstruction.json", written)
