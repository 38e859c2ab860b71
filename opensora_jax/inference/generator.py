"""From prompts to videos with a trained DiT: what sampling, training and grading share."""

import dataclasses
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from opensora_jax import files, rngs
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import networks
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import pipeline, video_io
from opensora_jax.diffusion import objectives
from opensora_jax.diffusion.objective import Objective
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import WindowEncoder, decode, load_tokenizer
from opensora_jax.mesh import PyTree
from opensora_jax.models.dit import DiTConfig
from opensora_jax.tasks.dit import DiTTask, Latents
from opensora_jax.windows import Windows


@dataclasses.dataclass(frozen=True)
class DiTDescription:
    """What the folder of a trained DiT says of it, in model.json.

    Attributes:
      latent_grid: (T, H, W) of the latents that it was trained on.
      latent_grids: of all sizes, where there are several; of them `latent_grid` is the first.
      text_length: tokens that texts are padded or cut to.
      vqvae, text_model: where the tokenizer and the text model are.
      fps: frames a second of the training videos.
      downsample: (T, H, W), pixels a latent.
      window: frames that were encoded together; None: as many as the tokenizer was trained on.
      causal: whether the first frame of a window has a latent of its own.
      tile: pixels of the tiles that videos were encoded in, and are decoded in; None: whole.
    """

    dit: DiTConfig
    objective: Objective
    latents: Latents
    latent_grid: tuple[int, int, int]
    text_length: int
    vqvae: str
    text_model: str
    fps: float
    downsample: tuple[int, int, int]
    window: int | None = None
    latent_grids: tuple[tuple[int, int, int], ...] = ()
    causal: bool = False
    tile: int | None = None

    def record(self, folder: epath.PathLike) -> None:
        """Writes it into `folder`, or checks that the same is there.

        Raises:
          ValueError: another model is there, naming what differs.
        """
        folder = epath.Path(folder)
        found = {}
        if (folder / checkpoint.MODEL_FILE).exists():
            found = checkpoint.read_model(folder)
        elif jax.process_index() == 0:  # before what names it
            folder.mkdir(parents=True, exist_ok=True)
            files.write_array(folder / _TABLE, self.latents.table)
        of_objective = objectives.to_fields(self.objective)
        # The table is in model.json itself, as older ones have it.
        said = self.to_json(has_table="latent_table" in found)
        if "objective" in found and objectives.from_fields(found) == self.objective:
            said |= {name: found[name] for name in of_objective if name in found}  # in other words
        checkpoint.record_model(folder, said, new_keys=(*_NEW, "levels", *of_objective))

    def to_json(self, has_table: bool = False) -> dict[str, Any]:
        table = self.latents.table
        dit = dataclasses.asdict(self.dit)
        if self.dit.conditioning == "text":  # which older models do not say
            del dit["conditioning"]
        return {
            "dit": dit,
            **objectives.to_fields(self.objective),
            **({"latent_table": table.tolist()} if has_table else {"latents": _digest(table)}),
            "levels": self.latents.levels,
            **{name: getattr(self, name) for name in (*_PLAIN, *_NEW)},
        }

    @classmethod
    def read(cls, folder: epath.PathLike) -> "DiTDescription":
        """That of the DiT trained in `folder`.

        Raises:
          FileNotFoundError: no model there.
          ValueError: a model of another kind.
        """
        found = checkpoint.read_model(folder)
        if "dit" not in found:
            raise ValueError(f"{folder}: holds no DiT: expected the folder dit of a workdir")
        try:
            return cls._of(folder, found)
        except (KeyError, TypeError) as error:
            path = epath.Path(folder) / checkpoint.MODEL_FILE
            raise ValueError(
                f"{path}: not what this version writes of a DiT ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def _of(cls, folder: epath.PathLike, found: dict[str, Any]) -> "DiTDescription":
        if "latent_table" in found:
            table = np.asarray(found["latent_table"], np.float32)
        else:
            table = _read_table(epath.Path(folder) / _TABLE, found["latents"])
        return cls(
            dit=DiTConfig(**found["dit"]),
            objective=objectives.from_fields(found),
            latents=Latents(table, tuple(found.get("levels", ()))),
            **{name: found[name] for name in _PLAIN},
            **{name: found[name] for name in _NEW if name in found},
        )


# Of model.json; older ones lack the latter.
_PLAIN = ("latent_grid", "text_length", "vqvae", "text_model", "fps", "downsample")
_NEW = ("window", "latent_grids", "causal", "tile")
# Normalized embeddings, (n_codes, dim) float32; model.json says their digest.
_TABLE = "latents.npy"


def _digest(table: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(table).tobytes()).hexdigest()[:16]


def _read_table(path: epath.Path, digest: str) -> np.ndarray:
    """The array at `path`, if it is that of `digest`."""
    try:
        table = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable array: {files.short(str(error))}") from None
    if _digest(table) != digest:
        raise ValueError(f"{path}: not the embeddings of model.json beside it: put them back")
    return table


class Generator:
    """Turns prompts into videos, on all devices of all processes, which call it alike.

    Args:
      description: of the DiT.
      task: the DiT's in training; by default one that only samples.
      mesh: that weights and prompts are sharded over; by default all devices, weights over fsdp.

    Attributes:
      fps: frames a second of the training videos.
      conditioning: `DiTConfig.conditioning`.
      windows: in which the tokenizer encodes and decodes.

    Raises:
      FileNotFoundError: not the tokenizer or text model that the description names.
    """

    def __init__(
        self, description: DiTDescription, task: DiTTask | None = None, mesh: Mesh | None = None
    ):
        d = description
        self.task = task or DiTTask(
            d.dit, d.latents, d.objective, execution=networks.sampling_execution(d.dit)
        )
        self.fps, self.conditioning = d.fps, d.dit.conditioning
        self._description = d
        self._mesh = mesh or mesh_lib.make_mesh({**dict.fromkeys(mesh_lib.AXES, 1), "fsdp": -1})
        self._text_encoder = TextEncoder(d.text_model)
        self._tokenizer = load_tokenizer(d.vqvae)
        window = d.window or self._tokenizer.n_frames
        self.windows = Windows(d.downsample[0], d.causal, window)
        # Codes whole, so that every process can read them.
        self._sample = jax.jit(
            self.task.sample,
            static_argnames="sampling",
            out_shardings=mesh_lib.replicated(self._mesh),
        )

    @classmethod
    def load(cls, folder: epath.PathLike, mesh: Mesh | None = None) -> "Generator":
        """For the DiT trained in `folder`, on this mesh.

        Raises:
          FileNotFoundError: no DiT there, or not the tokenizer or text model that it names.
        """
        return cls(DiTDescription.read(folder), mesh=mesh)

    def restore(
        self, folder: epath.PathLike, *, best: bool = False, step: int | None = None
    ) -> PyTree:
        """The averaged weights of the last checkpoint in `folder`, sharded, in the compute dtype.

        Args:
          best: those of the lowest validation loss instead.
          step: those of this step, if its checkpoint was kept.

        Raises:
          FileNotFoundError: none there, or none that is not damaged.
        """
        params, _ = jax.eval_shape(self.task.init, jax.random.key(0))
        shardings = self.task.param_shardings(self._mesh)
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            params,
            shardings,
        )
        name = checkpoint.BEST if best else checkpoint.FOLDER
        params = checkpoint.restore_items(folder, {"ema": like}, name=name, step=step)["ema"]
        return self.task.cast(params)

    def latent_grid(
        self, n_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int]:
        """The latents (t, h, w) of a video of this size; None stands for the training size.

        Raises:
          ValueError: a size that is no multiple of downsampling (and patch), or that the model was
            not trained up to.
        """
        d = self._description
        grid = list(d.latent_grid)
        names = ("frames", "height", "width")
        for i, (name, size) in enumerate(zip(names, (n_frames, height, width), strict=True)):
            if size is None:
                continue
            if i == 0:
                if size < 1 or self.windows.fit(size) != size:
                    raise ValueError(f"{name}={size}: expected {self.windows.near(size)}")
                grid[0] = self.windows.latents(size)
                continue
            factor = d.downsample[i] * d.dit.patch
            if size < 1 or size % factor:
                raise ValueError(f"{name}={size}: expected a positive multiple of {factor}")
            grid[i] = size // d.downsample[i]
        if not self._knows(grid):
            t, h, w = self.pixels(grid)
            largest = [
                a for a in self.grids if not any(_contains(b, a) for b in self.grids if b != a)
            ]
            known = " and ".join("{} frames of {} x {}".format(*self.pixels(g)) for g in largest)
            raise ValueError(
                f"frames={t}, height={h}, width={w}: this model was trained on up to {known} and "
                "knows no positions beyond: expected no more of any, and no more in all"
            )
        return tuple(grid)

    def _knows(self, grid: Sequence[int]) -> bool:
        """Whether a grid reaches no further along any axis, and holds no more in all, than some
        that were trained on: so a model of several aspect ratios draws others."""
        furthest = np.max(self.grids, axis=0)
        most = max(map(math.prod, self.grids))
        return _contains(furthest, grid) and math.prod(grid) <= most

    @property
    def grids(self) -> list[tuple[int, int, int]]:
        """Sizes of latents (T, H, W) that it was trained on."""
        d = self._description
        return [tuple(grid) for grid in d.latent_grids or (d.latent_grid,)]

    def longest(self, height: int | None = None, width: int | None = None) -> int:
        """Most latent frames of a video of this size; None stands for the training size."""
        _, h, w = self.latent_grid(self.windows.least, height, width)
        furthest = max(t for t, _, _ in self.grids)
        return next(t for t in range(furthest, 0, -1) if self._knows((t, h, w)))

    def pixels(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """Frames, height and width of a video of these latents."""
        t, h, w = grid
        _, down_h, down_w = self._description.downsample
        return self.windows.n_frames(t), h * down_h, w * down_w

    def encode(self, videos_NTHWC: np.ndarray) -> np.ndarray:
        """Codes (N, t, h, w) of videos, uint8, as those of the training were encoded."""
        encoder = WindowEncoder(
            self._tokenizer, self.windows.frames, len(videos_NTHWC), self._description.tile
        )
        for video_THWC in videos_NTHWC:
            encoder.add(video_THWC)
        return np.stack(encoder.finish())

    def sample(
        self,
        prompts: list[str] | Mapping[str, np.ndarray],
        *,
        params: PyTree,
        sampling: Sampling,
        seed: int,
        grid: tuple[int, int, int] | None = None,
        batch_size: int = 16,
        known: tuple[np.ndarray, np.ndarray] | None = None,
        part: int = 0,
    ) -> np.ndarray:
        """Videos, uint8 (n, T, H, W, 3), one a prompt.

        The noise of a video depends on `seed`, `part` and its place in the list only. All batches
        have one size, the last filled up, so that one compilation serves all; it is rounded up to a
        multiple of the devices that share it.

        Args:
          prompts: what to show; or by their names the features (S, D) of texts.
          known: codes (n, t, h, w), and which of the frames are known, (t,): they stay.
          part: of longer videos, that are drawn in several.

        Raises:
          ValueError: a number of steps, or a sampler, that the model's objective lacks; known
            frames for a model that was trained on text alone.
        """
        if known is not None:
            self.expect_frames()
        text_length = self._description.text_length
        if isinstance(prompts, Mapping):
            features = list(prompts.values())
        else:
            features = self._text_encoder.encode(prompts)
        text = np.stack([pipeline.pad_text(f, text_length) for f in features])
        lengths = np.array([min(len(f), text_length) for f in features], np.int32)
        n, parts = len(prompts), self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        batch_size = -(-min(batch_size, n) // parts) * parts
        grid = grid or self._description.latent_grid
        named = f" of part {part}" if part else ""
        noises = jax.vmap(lambda i: self.task.noise(rngs.key(seed, f"sample{named}", i), grid))
        keys = jax.vmap(lambda i: rngs.key(seed, f"ancestral{named}", i))
        videos = []
        for start in range(0, n, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), n - 1)
            inputs = (text[index], lengths[index], noises(index), keys(index))
            if known is not None:
                codes, is_known_t = known
                inputs += ((codes[index], np.tile(is_known_t, (batch_size, 1))),)
            inputs = mesh_lib.shard_whole(inputs, self._mesh)
            with jax.set_mesh(self._mesh):
                codes = self._sample(params, *inputs, sampling=sampling)
            # By way of the host: the DiT may be on many devices, the tokenizer is on one.
            codes = jax.device_get(codes)
            d = self._description
            videos.append(decode(self._tokenizer, codes, d.window, d.tile)[: n - start])
        return np.concatenate(videos)

    def expect_frames(self) -> None:
        """Raises a ValueError if the model cannot be told frames."""
        if self.conditioning != "frames":
            raise ValueError(
                f"dit.conditioning={self.conditioning}: this model was not trained to be told "
                "frames: expected one with dit.conditioning=frames"
            )

    def write(self, folder: epath.Path, prompts: list[str], videos: np.ndarray) -> None:
        """Writes 00.mp4, 01.mp4, ... and prompts.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for i, (prompt, video) in enumerate(zip(prompts, videos, strict=True)):
            name = f"{i:02d}.mp4"
            with files.local(folder / name) as path:
                video_io.write_video(path, video, self.fps)
            entries.append({"file": name, "prompt": prompt})
        files.write_json(folder / "prompts.json", entries)


def _contains(trained: tuple[int, int, int], grid: Sequence[int]) -> bool:
    """Whether a grid reaches no further than another along any axis."""
    return all(n <= most for n, most in zip(grid, trained, strict=True))
