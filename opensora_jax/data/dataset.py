"""The Arrow dataset of VQ codes and text features that a DiT is trained on, and reading it.

A folder with
  part-00000, part-00001, ...  what `data.parts` reads:
      videos  a Hugging Face dataset, a row a video or clip: video_file, fps, of clips of videos
          start (seconds), and video_latent_states  (T, H, W) integers: VQ codes
      texts   a Hugging Face dataset, a row a distinct caption: caption and
          text_latent_states   (S, D) float16: text features, valid tokens only; S differs
      rows    a Hugging Face dataset, a row an example: the numbers of its video, in the part, and
          of its text, in all parts
  part-00000.json, ...  marks a part as whole: its files' checksums, and which of its videos were
      left out, and why
  parts.json            the parts in order: their folders, and their files' checksums
  index/     where every row lies: see `data.index`
  metadata.json         what a trainer needs to know: see REQUIRED_KEYS
  codebook.npy          (n_codes, dim) float32

So nothing is stored twice; `data.joined.load_joined` gives the rows as one Hugging Face dataset. A
dataset that is flat, with a row a caption and both `*_latent_states` in each part, is read as well,
as is a plain `save_to_disk` folder made by others with metadata.json and codebook.npy in it, and
what `data.tfds_export` writes.

Rows are read straight from the memory-mapped Arrow buffers: Hugging Face's own access by row builds
nested Python lists, dozens of times slower.
"""

import json
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data import bucket_folders, parts, tfds
from opensora_jax.data.index import Index, read_codebook, smallest
from opensora_jax.data.parts import (
    CODES,
    TEXT,
    Batch,
    DatasetError,
    Parts,
    Table,
    count_codes,
    is_file_name,
    read_json,
)
from opensora_jax.data.streaming import StreamedParts, Streaming
from opensora_jax.files import short
from opensora_jax.windows import Windows

CODE_COUNTS = "code_counts.npy"
# Of metadata.json: the checksum of all else that it says, and those of the files beside it.
CHECKSUM, FILES = "checksum", "files"


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(n):
    return lambda value: isinstance(value, list) and len(value) == n and all(map(_is_count, value))


def _is_name(value):
    return isinstance(value, str) and value != ""


# What metadata.json must hold: key -> (test, meaning).
REQUIRED_KEYS = {
    "codebook": (is_file_name, "file name of the (n_codes, dim) array, such as codebook.npy"),
    "n_codes": (_is_count, "number of codes"),
    "downsample": (_are_counts(3), "the VQ-VAE's downsampling [t, h, w]"),
    "vqvae": (_is_name, "path of the VQ-VAE that decodes the codes"),
    "text_model": (_is_name, "name or folder of the text model"),
    "text_width": (_is_count, "width D of the text features"),
    "resolution": (_are_counts(2), "[height, width] of the videos in pixels"),
    "fps": (
        lambda v: isinstance(v, int | float) and 0 < v < math.inf,
        "frames per second of the videos",
    ),
}

_LONGEST_COMMAND = 10_000  # characters of metadata.json's "command" that an error repeats


class LatentDataset:
    """Random access to the rows of a dataset; made by `open_dataset`.

    Attributes:
      metadata: what metadata.json holds.
      codebook: (n_codes, dim) float32.
      code_counts: (n_codes,) int64, how often each code occurs in the videos.
      grid: (H, W) of the latents.
      index: where every row lies.
      streamed: what reads the rows where they are; None: they are in files of this machine's.
    """

    def __init__(
        self,
        folder: Path,
        metadata: dict,
        codebook: np.ndarray,
        code_counts: np.ndarray,
        index: Index,
        parts: Parts | StreamedParts | tfds.Records,
        reopen: tuple[Any, ...],
    ):
        self.folder, self.metadata, self.codebook = folder, metadata, codebook
        self.code_counts, self.index, self._parts = code_counts, index, parts
        self.grid, self._reopen = _grid(metadata), reopen

    @property
    def streamed(self) -> StreamedParts | None:
        return self._parts if isinstance(self._parts, StreamedParts) else None

    def __len__(self) -> int:
        return len(self.index.row_video)

    @property
    def window_latents(self) -> int:
        """Latent frames that were encoded together; 1 where metadata.json says nothing of it."""
        return self.windows.latents(self.windows.frames)

    @property
    def windows(self) -> Windows:
        """How videos were encoded; of one latent each where metadata.json says nothing of it."""
        if self.metadata.get("window") is not None:
            return _windows(self.metadata)
        stride = self.metadata["downsample"][0]
        return Windows(stride, False, stride)

    @property
    def latent_frames(self) -> np.ndarray:
        """(n_rows,), T of every row."""
        return self.index.video_frames[self.index.row_video]

    @property
    def text_lengths(self) -> np.ndarray:
        """(n_rows,), S of every row."""
        return self.index.text_lengths[self.index.row_text]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: video_latent_states (T, H, W) integers, text_latent_states (S, D) float32.

        Where the file stores these types the arrays are read-only views of it.

        Raises:
          DatasetError: the part of the row, used for the first time, is not as expected.
        """
        index = self._checked(index)
        video, i = self._video(index)
        text, j = self._text(index)
        return {CODES: video.codes[i], TEXT: text.text[j].astype(np.float32, copy=False)}

    def has_column(self, name: str) -> bool:
        """Whether rows have another column, such as caption."""
        return any(name in batch.names for batch, _ in self._places(0))

    def column(self, index: int, name: str):
        """The value of another column, such as caption, in row `index`, as a Python value."""
        index = self._checked(index)
        places = self._places(index)
        for batch, i in places:
            if name in batch.names:
                return batch.value(name, i)
        names = {name for batch, _ in places for name in batch.names}
        raise DatasetError(f"{self.folder}: no column {name!r}: {short(sorted(names))}")

    def __repr__(self) -> str:
        # Input pipelines compare this on resume: it must not change when the folder is moved.
        keys = ("n_codes", "text_width", "vqvae_fingerprint")
        known = ", ".join(f"{key}={self.metadata.get(key)!r}" for key in keys)
        return f"LatentDataset(n_rows={len(self)}, {known})"

    def __reduce__(self):
        return open_dataset, self._reopen  # data workers map the files anew

    def _checked(self, index) -> int:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder}: row {index} of {len(self)}")
        return index % len(self)

    def _places(self, index):
        """Where the row's text and video are: (batch, row of it)."""
        return [self._text(index), self._video(index)]

    def _video(self, index):
        return _find(self.index.row_video[index], self.index.video_ends, self._parts.videos)

    def _text(self, index):
        return _find(self.index.row_text[index], self.index.text_ends, self._parts.texts)


def _find(number: int, ends: np.ndarray, table: Callable[[int], Table]) -> tuple[Batch, int]:
    """The batch of row `number` of the tables of all parts, which end so, and its row there."""
    k = int(np.searchsorted(ends, number, side="right"))
    return table(k).find(int(number) - (int(ends[k - 1]) if k else 0))


def _grid(metadata: dict) -> tuple[int, int]:
    """(H, W) of the latents."""
    sides = zip(metadata["resolution"], metadata["downsample"][1:], strict=True)
    return tuple(pixels // factor for pixels, factor in sides)


def _windows(metadata: dict) -> Windows:
    """How videos were encoded, by metadata that says it."""
    causal = metadata.get("causal", False)
    return Windows(metadata["downsample"][0], causal, metadata["window"])


def read_metadata(folder: epath.PathLike) -> dict:
    """What metadata.json holds, finished or not, unchecked."""
    return read_json(epath.Path(folder) / "metadata.json")


def open_dataset(folder: str | os.PathLike, streaming: Streaming | None = None) -> LatentDataset:
    """Opens a dataset and checks what it says of itself; parts are checked when first used.

    Of one without an index, flat and made by others or by an earlier version, all parts are read.
    One in an object store (gs://...) is copied to this machine first, but for its parts where it
    is streamed.

    Args:
      streaming: rows are read where they are; None: they are mapped from files of this machine.

    Raises:
      DatasetError: not finished, a file, key or column is missing, or something does not fit:
        codes outside the codebook, text features of another width, ragged rows, ...
    """
    address, reopen, needed = folder, (folder, streaming), None
    if streaming:
        found = complete_metadata(folder)
        needed = {"metadata.json", found["codebook"], *found.get(FILES, ())}
    folder = files.fetch(folder, "metadata.json", needed)
    metadata = complete_metadata(folder)
    sums = metadata.get(FILES, {})
    path = folder / metadata["codebook"]
    codebook = read_codebook(path, metadata["n_codes"])
    parts.expect_checksum(path, sums.get(metadata["codebook"]))
    if not sums and streaming:
        raise DatasetError(
            f"{address}: has no index, as datasets of others and of earlier versions: expected one "
            "that this version made, or data.stream=False"
        )
    if not sums:
        return _scan(folder, metadata, codebook)
    index = Index.load(folder, sums)
    opened = _open_parts(folder, address, streaming, metadata, index)
    parts.expect_checksum(folder / CODE_COUNTS, sums.get(CODE_COUNTS, ""))
    counts = np.load(folder / CODE_COUNTS, allow_pickle=False)
    found = LatentDataset(folder, metadata, codebook, counts, index, opened, reopen)
    if metadata.get("n_rows") != len(found):
        n_rows = short(metadata.get("n_rows"))
        raise DatasetError(
            f"{folder / 'metadata.json'}: n_rows={n_rows}, but the parts hold {len(found)}"
        )
    found[0]  # the first part stands for what metadata.json says of all
    if metadata.get(CHECKSUM) != checksum(metadata):  # last: others say more
        raise DatasetError(
            f"{folder / 'metadata.json'}: checksum {checksum(metadata)}, expected "
            f"{short(metadata.get(CHECKSUM))}: it was changed after it was written; put it back, "
            f"or set {CHECKSUM!r} to the former if the change is yours"
        )
    return found


def _open_parts(folder, address, streaming, metadata, index):
    """What reads the rows of a dataset that has an index, by its format."""
    if metadata.get(tfds.FORMAT_KEY) == tfds.FORMAT:
        if streaming:
            raise DatasetError(f"{address}: a TFDS dataset: expected data.stream=False")
        return tfds.Records(folder, len(index.row_video), metadata["n_codes"])
    parts.expect_checksum(folder / parts.LIST, metadata[FILES].get(parts.LIST, ""))
    listed = parts.listed(folder)
    if streaming:
        return StreamedParts(address, streaming, metadata, index, _grid(metadata), *listed)
    return _parts(*listed, metadata)


def _parts(folders: list[Path], sums, metadata: dict) -> Parts:
    return Parts(
        folders,
        sums,
        n_codes=metadata["n_codes"],
        grid=_grid(metadata),
        text_width=metadata["text_width"],
    )


def _scan(folder: Path, metadata: dict, codebook: np.ndarray) -> LatentDataset:
    """A dataset without an index: its rows are looked at one part after the other."""
    path = folder / "metadata.json"
    folders = parts.find(folder)
    opened = _parts(folders, [], metadata)
    frames, lengths, ends, n_values = [], [], [], 0
    counts = None if "code_counts" in metadata else np.zeros(metadata["n_codes"], np.int64)
    for k in range(len(folders)):
        for batch in opened.both(k):
            n_values += int(batch.codes.shapes.prod(axis=1).sum())
            frames.append(batch.codes.shapes[:, 0])
            lengths.append(batch.text.shapes[:, 0])
            if counts is not None:
                counts += count_codes(batch, metadata["n_codes"])
        ends.append(sum(map(len, frames)))
    if not frames:
        raise DatasetError(f"{folder}: no rows: expected part-00000, ... or a save_to_disk folder")
    n_rows = ends[-1]
    if metadata.get("n_rows", n_rows) != n_rows:
        raise DatasetError(
            f"{path}: n_rows={short(metadata['n_rows'])}, but the parts hold {n_rows}"
        )
    if counts is None:
        counts = _known_counts(path, metadata, n_values)
    numbers = smallest(np.arange(n_rows))
    index = Index(
        row_video=numbers,
        row_text=numbers,
        video_frames=smallest(np.concatenate(frames)),
        text_lengths=smallest(np.concatenate(lengths)),
        video_ends=np.array(ends),
        text_ends=np.array(ends),
        video_hashes=np.zeros(0, np.uint64),
    )
    return LatentDataset(folder, metadata, codebook, counts, index, opened, (folder,))


def _known_counts(path: Path, metadata: dict, n_values: int) -> np.ndarray:
    """The code counts that metadata.json says, of so many codes."""
    try:
        counts = np.asarray(metadata["code_counts"], np.int64)
    except (ValueError, TypeError, OverflowError):
        found = short(metadata["code_counts"])
        raise DatasetError(f"{path}: code_counts={found}: expected a list of counts") from None
    if counts.shape != (metadata["n_codes"],) or counts.sum() != n_values:
        raise DatasetError(
            f"{path}: code_counts has shape {counts.shape} and sum {counts.sum()}: "
            f"expected ({metadata['n_codes']},) and {n_values}, the codes in the parts"
        )
    return counts


def complete_metadata(folder: epath.PathLike) -> dict:
    """What metadata.json holds, checked, without a look at the data.

    Raises:
      DatasetError: not finished, or a key is missing or not as expected.
    """
    path = epath.Path(folder) / "metadata.json"
    if not path.exists() and bucket_folders.read(folder) is not None:
        names = ", ".join(str(found) for found in bucket_folders.datasets(folder))
        raise DatasetError(f"{folder}: holds buckets: name one, such as {names}")
    metadata = read_metadata(folder)
    # A plain folder of others is whole when it can be read; ours grows by parts.
    if not metadata.get("complete", path.with_name("state.json").exists()):
        command = str(metadata.get("command", "the preprocessing command that began it"))
        command = command if len(command) < _LONGEST_COMMAND else short(command)
        raise DatasetError(
            f'{path}: no "complete": true: not finished. To finish it, run: {command}'
        )
    for key, (test, meaning) in REQUIRED_KEYS.items():
        if not test(metadata.get(key)):
            found = f"{key}={short(metadata[key])}" if key in metadata else f"no key {key!r}"
            raise DatasetError(f"{path}: {found}: expected {meaning}")
    causal, levels = metadata.get("causal", False), metadata.get("levels", [])
    if not isinstance(causal, bool):
        raise DatasetError(f"{path}: causal={short(causal)}: expected true or false")
    is_grid = isinstance(levels, list) and all(map(_is_count, levels))
    if levels and not (is_grid and math.prod(levels) == metadata["n_codes"]):
        raise DatasetError(
            f"{path}: levels={short(levels)}: expected numbers whose product is "
            f"n_codes={metadata['n_codes']}"
        )
    if metadata.get("window") is not None:
        try:
            if not _is_count(metadata["window"]):
                raise ValueError("no number of frames")
            _windows(metadata)
        except ValueError:
            t, window = metadata["downsample"][0], short(metadata["window"])
            raise DatasetError(
                f"{path}: window={window}: expected the frames that were encoded together, "
                f"{'1 and ' if causal else ''}a multiple of {t}"
            ) from None
    return metadata


def checksum(metadata: dict) -> str:
    """CRC-32 of what metadata.json says, but for the checksum itself, as eight digits."""
    rest = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
