"""The stage that trains the VQ-VAE from a folder of videos."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from opensora_jax import files
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import pipeline, video_io
from opensora_jax.metrics import pixel, shapes
from opensora_jax.tasks.vqvae import VQVAETask
from opensora_jax.train import loop
from opensora_jax.train.state import TrainState

logger = logging.getLogger(__name__)

# Videos that evaluation reconstructs, and of these how many it shows.
N_EVALUATED = 240
N_SHOWN = 8


def run(config: ConfigDict, workdir: Path) -> None:
    """Trains `workdir`/vqvae to `config.vqvae.steps`.

    Beside checkpoints and metrics it writes reconstruction.json (PSNR in dB, SSIM, perplexity and
    number of codes used and, for moving shapes, the share of reconstructions whose color, shape
    and direction `detect` still reads) and samples/*.mp4, originals above reconstructions.

    Raises:
      FileNotFoundError: no videos.
      ValueError: the folder holds the training of another model.
    """
    c = config.vqvae
    folder = epath.Path(workdir) / "vqvae"
    make_model = build.vqvae_maker(c)
    task = VQVAETask(make_model, (int(c.quantize_from * c.steps), int(c.quantize_to * c.steps)))
    checkpoint.record_model(folder, task.arguments)
    if build.is_trained(folder, c.steps):
        logger.info("vqvae: %s: done already", folder)
        return
    videos = Path(config.data.videos or Path(workdir) / "shapes" / "train" / "videos")
    source = pipeline.ClipSource(
        pipeline.find_videos(videos), c.n_frames, c.resolution, c.fps or None
    )
    if all(source.clip(i, np.random.default_rng(0)) is None for i in range(len(source))):
        raise ValueError(
            f"{videos}: none of the {len(source)} videos can be used: expected readable videos of "
            f"at least vqvae.n_frames={c.n_frames} frames"
        )
    mesh = mesh_lib.make_mesh(config.mesh)
    batches = pipeline.clips(source, seed=config.seed, **build.local_share(mesh, c.batch_size))
    held_out = HeldOut(config, workdir, source)
    tx, schedule = build.optimizer(c)
    loop.fit(
        task,
        tx,
        schedule,
        batches,
        mesh=mesh,
        folder=folder,
        settings=build.loop_settings(c, config.profile),
        step_settings=build.step_settings(c, config.seed),
        throughput=build.throughput(_tokens(c)),
        evaluations=[loop.Evaluation(c.eval_every, lambda state: held_out(task, state, folder))],
        config=build.recorded(config, "vqvae"),
    )
    build.mark_trained(folder, c.steps)


def _tokens(c: ConfigDict) -> int:
    """Codes that a step trains on."""
    sides = (c.n_frames, c.resolution, c.resolution)
    grid = [side // d for side, d in zip(sides, c.downsample, strict=True)]
    return c.batch_size * int(np.prod(grid))


class HeldOut:
    """Reconstructs videos: the held-out moving shapes, a given folder's, or some of training's."""

    def __init__(self, config: ConfigDict, workdir: Path, training: pipeline.ClipSource):
        c = config.vqvae
        shapes_folder = Path(workdir) / "shapes" / "held_out"
        folder = config.data.held_out_videos
        self._labels = None
        source = training
        if folder:
            paths = pipeline.find_videos(folder)
        elif not config.data.videos and shapes_folder.is_dir():
            entries = json.loads((shapes_folder / "captions.json").read_text())
            paths = [shapes_folder / "videos" / entry["file"] for entry in entries]
            self._labels = [(e["color"], e["shape"], e["direction"]) for e in entries]
        else:
            paths = None
        if paths is not None:
            source = pipeline.ClipSource(paths, c.n_frames, c.resolution, c.fps or None)
        n = min(N_EVALUATED, len(source))
        clips = [source.clip(i, np.random.default_rng(i)) for i in range(n)]
        usable = [clip["video"] for clip in clips if clip is not None]
        if not usable:
            raise ValueError(
                f"{source}: none of the first {n} can be used: expected readable videos of at "
                f"least vqvae.n_frames={c.n_frames} frames"
            )
        self._videos = np.stack(usable)
        self._batch_size = min(c.batch_size, len(self._videos))
        self._fps = c.fps or config.shapes.fps
        self._eval_step = None

    def __call__(self, task: VQVAETask, state: TrainState, folder: Path) -> dict[str, float]:
        mesh = jax.tree.leaves(state.params)[0].sharding.mesh
        if self._eval_step is None:
            # Whole, so that every process can read it.
            self._eval_step = jax.jit(task.eval_step, out_shardings=mesh_lib.replicated(mesh))
        recons, codes = [], []
        n = len(self._videos)
        for start in range(0, n, self._batch_size):
            # The last batch is filled up, so that one compilation serves all.
            index = np.minimum(np.arange(start, start + self._batch_size), n - 1)
            with jax.set_mesh(mesh):
                _, out = self._eval_step(state.ema, state.extra, {"video": self._videos[index]})
            recons.append(np.asarray(out["recon"])[: n - start])
            codes.append(np.asarray(out["codes"])[: n - start])
        recons, codes = np.concatenate(recons), np.concatenate(codes)
        counts = np.bincount(codes.reshape(-1), minlength=task.n_codes)
        p = counts[counts > 0] / counts.sum()
        pairs = list(zip(self._videos, recons, strict=True))
        result = {
            "psnr": float(np.mean([pixel.psnr(a, b) for a, b in pairs])),
            "ssim": float(np.mean([pixel.ssim(a, b) for a, b in pairs])),
            "perplexity": float(np.exp(-(p * np.log(p)).sum())),
            "codes_used": int((counts > 0).sum()),
        }
        if self._labels:
            score = shapes.score(recons, self._labels[:n])
            result |= {f"detected_{name}": value for name, value in score.items()}
        if jax.process_index() == 0:
            self._write(folder, int(state.step), recons, result, counts)
        return {f"held_out/{name}": float(value) for name, value in result.items()}

    def _write(self, folder, step, recons, result, counts) -> None:
        chosen = np.linspace(0, len(recons) - 1, min(N_SHOWN, len(recons))).astype(int)
        rows = [np.concatenate(list(v[chosen]), axis=2) for v in (self._videos, recons)]
        samples = folder / "samples"
        samples.mkdir(exist_ok=True)
        with files.local(samples / f"step{step:06d}.mp4") as path:
            video_io.write_video(path, np.concatenate(rows, axis=1), self._fps)
        written = {"step": step, **result, "code_counts": counts.tolist()}
        files.write_json(folder / "reconstruction.json", written)
