"""From prompts to videos with a trained DiT: what sampling, training and grading share."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from opensora_jax import files, rngs
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import pipeline, video_io
from opensora_jax.diffusion.objectives import OBJECTIVES
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import decode, load_tokenizer
from opensora_jax.tasks.dit import DiTTask, Latents

PyTree = Any


class Generator:
    """Turns prompts into videos. Made by `load`; it holds the text encoder and the VQ-VAE.

    Attributes:
      task: the DiT's task.
      fps: frames a second of the training videos.
    """

    def __init__(self, task: DiTTask, description: dict[str, Any]):
        self.task = task
        self.fps: float = description["fps"]
        self._grid = tuple(description["latent_grid"])
        self._downsample = tuple(description["downsample"])
        self._patch = description["dit"]["patch"]
        self._text_length = description["text_length"]
        self._text_encoder = TextEncoder(description["text_model"])
        self._vqvae = load_tokenizer(description["vqvae"])
        self._sample = jax.jit(task.sample, static_argnames=("steps", "guidance"))

    @classmethod
    def load(cls, folder: Path, task: DiTTask | None = None) -> "Generator":
        """For the DiT trained in `folder`; with a `task` given, for its weights in training.

        Raises:
          FileNotFoundError: no DiT there, or not the VQ-VAE or text model that it names.
        """
        description = checkpoint.read_model(folder)
        if task is None:
            latents = Latents.from_table(np.asarray(description["latent_table"], np.float32))
            task = DiTTask(
                build.dit_maker(description["dit"], dtype="auto"),
                latents,
                caption_dropout=0.0,
                objective=OBJECTIVES[description["objective"]](description),
            )
        return cls(task, description)

    def restore(self, folder: Path, *, best: bool = False) -> PyTree:
        """The averaged weights of the last checkpoint in `folder`.

        Args:
          best: those of the lowest validation loss instead.

        Raises:
          FileNotFoundError: none there, or none that is not damaged.
        """
        params, _ = jax.eval_shape(self.task.init, jax.random.key(0))
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
        )
        name = checkpoint.BEST if best else checkpoint.FOLDER
        return checkpoint.restore_items(folder, {"ema": like}, name=name)["ema"]

    def latent_grid(
        self, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """The latents (t, h, w) of a video of this size; None stands for the training size.

        Raises:
          ValueError: a size that is no multiple of downsampling (and patch).
        """
        grid = list(self._grid)
        names = ("frames", "height", "width")
        for i, (name, size) in enumerate(zip(names, (n_frames, height, width), strict=True)):
            if size is None:
                continue
            factor = self._downsample[i] * (self._patch if i else 1)
            if size < 1 or size % factor:
                raise ValueError(f"{name}={size}: expected a positive multiple of {factor}")
            grid[i] = size // self._downsample[i]
        return tuple(grid)

    def sample(
        self,
        prompts: list[str],
        *,
        params: PyTree,
        steps: int,
        guidance: float,
        seed: int,
        ancestral: bool = False,
        grid: tuple[int, int, int] | None = None,
        batch_size: int = 16,
    ) -> np.ndarray:
        """Videos, uint8 (n, T, H, W, 3), one a prompt.

        The noise of a video depends on `seed` and its place in the list only. All batches have one
        size, the last filled up, so that one compilation serves all.

        Args:
          ancestral: draw noise in every step, too; of models with the objective ddpm.

        Raises:
          ValueError: a number of steps, or ancestral sampling, that the model's objective lacks.
        """
        grid = grid or self._grid
        features = self._text_encoder.encode(prompts)
        text = np.stack([pipeline.pad_text(f, self._text_length) for f in features])
        lengths = np.array([min(len(f), self._text_length) for f in features], np.int32)
        n = len(prompts)
        batch_size = min(batch_size, n)
        shape = (*grid, self.task.latents.channels)
        noises = jax.vmap(lambda i: jax.random.normal(rngs.key(seed, "sample", i), shape))
        keys = jax.vmap(lambda i: rngs.key(seed, "ancestral", i))
        videos = []
        for start in range(0, n, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), n - 1)
            noise, keys_B = noises(index), keys(index) if ancestral else None
            inputs = (text[index], lengths[index], noise, keys_B)
            with mesh_lib.context_of(params):
                codes = self._sample(params, *inputs, steps=steps, guidance=guidance)
            # By way of the host: the DiT's weights may be on many devices, the VQ-VAE is on one.
            codes = jax.device_get(codes)
            videos.append(decode(self._vqvae, codes)[: n - start])
        return np.concatenate(videos)

    def write(self, folder: Path, prompts: list[str], videos: np.ndarray) -> None:
        """Writes 00.mp4, 01.mp4, ... and prompts.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for i, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
            name = f"{i:02d}.mp4"
            with files.local(folder / name) as path:
                video_io.write_video(path, video, self.fps)
            entries.append({"file": name, "prompt": prompt})
        files.write_json(folder / "prompts.json", entries)
