"""Video tokenizers: opening them, and encoding and decoding videos of any length in windows.

Legend: T frames of a window, t frames of its codes, H, W pixels, h, w codes.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from opensora_jax import files
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.convert import cosmos, videogpt
from opensora_jax.inference.chunks import Chunks
from opensora_jax.inference.tiles import Tiles
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.tasks.vqvae import NEW_KEYS, describe, from_description
from opensora_jax.windows import WindowError, Windows


def load_tokenizer(path: epath.PathLike) -> Tokenizer:
    """The tokenizer of a training or imported folder, a VideoGPT checkpoint file, or a file or
    folder of Cosmos-Tokenizer.

    Returns:
      The model in evaluation mode, with averaged weights.

    Raises:
      FileNotFoundError: nothing there, or a folder without a tokenizer.
      ValueError: a file or folder of something else.
    """
    path = epath.Path(path)
    if not (path / checkpoint.MODEL_FILE).exists() and cosmos.is_published(path):
        return cosmos.load_cosmos(path)
    if path.is_file():
        return videogpt.load_videogpt(path)
    description = _description(path)
    try:
        task = from_description(description)
        params, extra = jax.eval_shape(task.init, jax.random.key(0))
    except (TypeError, ValueError, OverflowError) as error:
        model_file = path / checkpoint.MODEL_FILE
        raise ValueError(
            f"{model_file}: describes no tokenizer: {files.short(str(error))}"
        ) from error
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {"ema": params} | ({"extra": extra} if extra else {}),
    )
    restored = checkpoint.restore_items(path, like)
    return task.model(restored["ema"], restored.get("extra", {}))


def _description(folder: epath.Path) -> dict[str, Any]:
    """What model.json says of the tokenizer in `folder`."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such file or folder: expected a tokenizer")
    inside = folder / "vqvae"
    is_workdir = (inside / checkpoint.MODEL_FILE).exists()
    if is_workdir and not (folder / checkpoint.MODEL_FILE).exists():
        raise FileNotFoundError(f"{folder}: holds no tokenizer: did you mean {inside}?")
    description = checkpoint.read_model(folder)
    if "dit" in description:
        its_own = files.short(description.get("vqvae"))
        raise ValueError(
            f"{folder}: holds a DiT, not a tokenizer: did you mean its own, {its_own}?"
        )
    return description


def save_tokenizer(folder: epath.PathLike, model: Tokenizer) -> None:
    """Writes `model` so that `load_tokenizer` reads it from `folder`.

    Raises:
      ValueError: if the folder holds another model.
    """
    checkpoint.record_model(folder, describe(model.config), new_keys=NEW_KEYS)
    _, params, extra = nnx.split(model, nnx.Param, ...)
    params, extra = nnx.to_pure_dict(params), nnx.to_pure_dict(extra)
    checkpoints = checkpoint.Checkpoints(folder)
    checkpoints.save(0, {"ema": params} | ({"extra": extra} if extra else {}))
    checkpoints.close()


def import_tokenizer(source: epath.PathLike, model: Tokenizer, output: epath.PathLike) -> bool:
    """Writes what was read from `source` into the folder `output`; False if it is there already.

    Raises:
      ValueError: frames that no latents stand for, or another model in `output`.
    """
    try:
        Windows(model.downsample[0], model.causal, model.n_frames)
    except WindowError as error:
        raise ValueError(
            f"n_frames={model.n_frames}: expected {error.expected}, the downsampling in time"
        ) from None
    if epath.Path(output).is_file():
        raise ValueError(f"{output}: a file, expected a folder or nothing")
    try:
        known = load_tokenizer(output)
    except FileNotFoundError:
        save_tokenizer(output, model)
        return True
    if known.config != model.config or fingerprint(known) != fingerprint(model):
        raise ValueError(f"{output}: holds another model than {source}: choose another folder")
    return False


def decode(
    model: Tokenizer, codes: jax.Array, window: int | None = None, tile: int | None = None
) -> np.ndarray:
    """Codes (B, t, h, w) -> videos uint8 (B, T, H, W, 3), in the windows of `WindowEncoder`.

    Args:
      window: frames that were encoded together; None: as many as the model was trained on.
      tile: pixels of the tiles that larger videos are decoded in; None: whole.

    Raises:
      ValueError: a tile that does not fit the downsampling.
    """
    _, *space = model.downsample
    tiles = Tiles.of(codes.shape[2:], space, tile)
    windows = Windows(model.downsample[0], model.causal, window or model.n_frames)
    chunks = Chunks(model, windows)
    window = windows.latents(windows.frames)
    pieces = [
        tiles.decode(chunks.decode, codes[:, start : start + window], space)
        for start in range(0, codes.shape[1], window)
    ]
    return np.concatenate(pieces, axis=1)


class WindowEncoder:
    """Codes of videos of any length with one or two compilations: chunks and batches are padded.

    Videos are added one by one, and need not all be in memory: `add`, `add`, ..., `finish`.

    Args:
      window: frames that are encoded together.
      tile: pixels of the tiles that larger videos are encoded in; None: whole.
      batch_size: windows at a time, rounded up to a multiple of the number of devices.

    Attributes:
      batch_size: the same, rounded up.
    """

    def __init__(self, model: Tokenizer, window: int, batch_size: int, tile: int | None = None):
        devices = jax.local_devices()
        self._window = window
        self._windows = Windows(model.downsample[0], model.causal, window)
        self._space, self._tile = model.downsample[1:], tile
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self._chunks = Chunks(model, self._windows, Mesh(devices, ("data",)))
        self._codes: list[list[np.ndarray]] = []  # of each video, window by window
        self._waiting: list[tuple[int, np.ndarray]] = []  # windows, and whose video's they are

    def add(self, video_THWC: np.ndarray) -> None:
        """Takes a video, uint8, of a T that fits (`Windows.fit`)."""
        self._codes.append([])
        for start in range(0, len(video_THWC), self._window):
            window_THWC = video_THWC[start : start + self._window]
            self._waiting.append((len(self._codes) - 1, window_THWC))
            if len(self._waiting) == self.batch_size:
                self._encode_batch()

    def finish(self) -> list[np.ndarray]:
        """The codes (t, h, w) of the videos that were added since the last call, in order."""
        if self._waiting:
            self._encode_batch()
        codes, self._codes = self._codes, []
        return [np.concatenate(pieces) for pieces in codes]

    def _encode_batch(self):
        shape_HWC = self._waiting[0][1].shape[1:]
        longest = max(len(window_THWC) for _, window_THWC in self._waiting)
        batch_BTHWC = np.zeros((self.batch_size, longest, *shape_HWC), np.uint8)
        for row, (_, window_THWC) in zip(batch_BTHWC, self._waiting, strict=False):
            row[: len(window_THWC)] = window_THWC
            row[len(window_THWC) :] = window_THWC[-1]
        cells = [n // d for n, d in zip(shape_HWC[:2], self._space, strict=True)]
        tiles = Tiles.of(tuple(cells), self._space, self._tile)
        codes_Bthw = tiles.encode(self._chunks.encode, batch_BTHWC, self._space)
        for (i, window_THWC), codes_thw in zip(self._waiting, codes_Bthw, strict=False):
            self._codes[i].append(codes_thw[: self._windows.latents(len(window_THWC))])
        self._waiting.clear()


def summary(model: Tokenizer) -> str:
    """What an import command says of a tokenizer, a line each."""
    sizes = [f"{name}: {value}" for name, value in dataclasses.asdict(model.config).items()]
    n_parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return "\n".join(
        [*sizes, f"parameters: {n_parameters:,}", f"fingerprint: {fingerprint(model)}"]
    )


def fingerprint(model: nnx.Module) -> str:
    """A hash of all parameters: the same for equal models, wherever they lie."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model)):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
