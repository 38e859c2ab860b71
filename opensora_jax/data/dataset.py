"""The Arrow dataset of VQ codes and text features that a DiT is trained on, and reading it.

A folder with
  part-00000, part-00001, ...  each a Hugging Face dataset (`datasets.load_from_disk` reads it) of
      video_latent_states  (T, H, W) integers: VQ codes
      text_latent_states   (S, D) float32: text features, valid tokens only; S differs between rows
      video_file, caption  strings
      fps                  frames per second
  part-00000.json, ...  marks a part as whole, and says which of its videos were left out, and why
  metadata.json         what a trainer needs to know: see REQUIRED_KEYS
  codebook.npy          (n_codes, dim) float32

A plain `save_to_disk` folder made by others, with at least the two `*_latent_states` columns and
`metadata.json` and `codebook.npy` in it, is read as well.

Rows are read straight from the memory-mapped Arrow buffers: Hugging Face's own access by row builds
nested Python lists, dozens of times slower.
"""

import bisect
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from etils import epath

from opensora_jax import files
from opensora_jax.data import arrow
from opensora_jax.files import short

CODES, TEXT = "video_latent_states", "text_latent_states"


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(n):
    return lambda value: isinstance(value, list) and len(value) == n and all(map(_is_count, value))


def _is_name(value):
    return isinstance(value, str) and value != ""


def _is_file_name(value):
    return _is_name(value) and len(value) <= 255 and Path(value).name == value


# What metadata.json must hold: key -> (test, meaning).
REQUIRED_KEYS = {
    "codebook": (_is_file_name, "file name of the (n_codes, dim) array, such as codebook.npy"),
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


class DatasetError(ValueError):
    """A dataset is not as expected; the message names the file or key, its value, and what was."""


class LatentDataset:
    """Random access to the rows of a dataset; made by `open_dataset`.

    Attributes:
      metadata: what metadata.json holds.
      codebook: (n_codes, dim) float32.
      code_counts: (n_codes,) int64, how often each code occurs in the data.
      latent_shapes: (n_rows, 3), T, H and W of every row.
      text_lengths: (n_rows,), S of every row.
    """

    def __init__(self, folder: Path, metadata: dict, codebook: np.ndarray, batches: list["_Batch"]):
        self.folder, self.metadata, self.codebook = folder, metadata, codebook
        self._batches = batches
        self._ends = np.cumsum([len(batch) for batch in batches]).tolist()
        self.latent_shapes = np.concatenate([batch.codes.shapes for batch in batches])
        self.text_lengths = np.concatenate([batch.text.shapes[:, 0] for batch in batches])
        self.code_counts = self._check_rows()

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def window_latents(self) -> int:
        """Latent frames that were encoded together; 1 where metadata.json says nothing of it."""
        return max(self.metadata.get("window", 1) // self.metadata["downsample"][0], 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: video_latent_states (T, H, W) integers, text_latent_states (S, D) float32.

        The arrays are read-only views of the file wherever it stores these types.
        """
        batch, i = self._find(index)
        return {CODES: batch.codes[i], TEXT: batch.text[i].astype(np.float32, copy=False)}

    def column(self, index: int, name: str):
        """The value of another column, such as caption, in row `index`, as a Python value."""
        batch, i = self._find(index)
        if name not in batch.table.column_names:
            raise DatasetError(
                f"{self.folder}: no column {name!r}: {short(batch.table.column_names)}"
            )
        return batch.table.column(name)[i].as_py()

    def __repr__(self) -> str:
        # Input pipelines compare this on resume: it must not change when the folder is moved.
        keys = ("n_codes", "text_width", "vqvae_fingerprint")
        known = ", ".join(f"{key}={self.metadata.get(key)!r}" for key in keys)
        return f"LatentDataset(n_rows={len(self)}, {known})"

    def __reduce__(self):
        return open_dataset, (self.folder,)  # data workers map the files anew

    def _find(self, index):
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder}: row {index} of {len(self)}")
        index %= len(self)
        k = bisect.bisect_right(self._ends, index)
        return self._batches[k], index - self._ends[k] + len(self._batches[k])

    def _check_rows(self) -> np.ndarray:
        """Checks the rows against the metadata; returns the code counts."""
        path, metadata = self.folder / "metadata.json", self.metadata
        if metadata.get("n_rows", len(self)) != len(self):
            raise DatasetError(
                f"{path}: n_rows={short(metadata['n_rows'])}, but the parts hold {len(self)}"
            )
        width = metadata["text_width"]
        grid = [
            r // d for r, d in zip(metadata["resolution"], metadata["downsample"][1:], strict=True)
        ]
        for batch in self._batches:
            for i in np.flatnonzero(batch.text.shapes[:, 1] != width)[:1]:
                raise DatasetError(
                    f"{batch.path}: row {i}: {TEXT} is {batch.text.shapes[i, 1]} wide: "
                    f"expected text_width={short(width)} as in {path}"
                )
            for i in np.flatnonzero((batch.codes.shapes[:, 1:] != grid).any(axis=1))[:1]:
                raise DatasetError(
                    f"{batch.path}: row {i}: {CODES} has shape {batch.codes.shapes[i].tolist()}: "
                    f"expected [T, {short(grid[0])}, {short(grid[1])}], resolution "
                    f"{short(metadata['resolution'])} over downsample "
                    f"{short(metadata['downsample'])} as in {path}"
                )
        if "code_counts" not in metadata:
            return sum(count_codes(batch, metadata["n_codes"]) for batch in self._batches)
        try:
            counts = np.asarray(metadata["code_counts"], np.int64)
        except (ValueError, TypeError, OverflowError):
            found = short(metadata["code_counts"])
            raise DatasetError(f"{path}: code_counts={found}: expected a list of counts") from None
        n_values = int(self.latent_shapes.prod(axis=1).sum())
        if counts.shape != (metadata["n_codes"],) or counts.sum() != n_values:
            raise DatasetError(
                f"{path}: code_counts has shape {counts.shape} and sum {counts.sum()}: "
                f"expected ({metadata['n_codes']},) and {n_values}, the codes in the parts"
            )
        return counts


def read_metadata(folder: epath.PathLike) -> dict:
    """What metadata.json holds, finished or not, unchecked."""
    return read_json(epath.Path(folder) / "metadata.json")


def open_dataset(folder: str | os.PathLike) -> LatentDataset:
    """Opens a dataset and checks it: metadata, codebook, and the shapes of all rows.

    One in an object store (gs://...) is copied to this machine first.

    Raises:
      DatasetError: not finished, a file, key or column is missing, or something does not fit:
        codes outside the codebook, text features of another width, ragged rows, ...
    """
    folder = files.fetch(folder, "metadata.json")
    metadata = complete_metadata(folder)
    codebook = _read_codebook(folder / metadata["codebook"], metadata["n_codes"])
    batches = list(read_batches(folder))
    if not batches:
        raise DatasetError(f"{folder}: no rows: expected part-00000, ... or a save_to_disk folder")
    return LatentDataset(folder, metadata, codebook, batches)


def complete_metadata(folder: epath.PathLike) -> dict:
    """What metadata.json holds, checked, without a look at the data.

    Raises:
      DatasetError: not finished, or a key is missing or not as expected.
    """
    path = epath.Path(folder) / "metadata.json"
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
    window, t = metadata.get("window"), metadata["downsample"][0]
    if window is not None and not (_is_count(window) and window % t == 0):
        raise DatasetError(
            f"{path}: window={short(window)}: expected the frames that were encoded together, a "
            f"multiple of {t}"
        )
    return metadata


@dataclass
class _Batch:
    """One contiguous Arrow record batch."""

    path: Path
    table: pa.RecordBatch
    codes: arrow.Column
    text: arrow.Column

    def __len__(self):
        return len(self.codes)


def read_batches(folder: Path) -> Iterator[_Batch]:
    """The rows of all parts, mapped into memory.

    Raises:
      DatasetError: a file is missing or damaged, or a column is, or of another kind.
    """
    parts = [folder] if (folder / "state.json").exists() else sorted(folder.glob("part-?????"))
    for part in parts:
        for path in _data_files(part):
            try:
                record_batches = (
                    pa.ipc.open_stream(pa.memory_map(str(path))).read_all().to_batches()
                )
            except (OSError, ValueError) as error:
                raise DatasetError(f"{path}: not a whole Arrow file: {short(str(error))}") from None
            for table in record_batches:
                if len(table):
                    codes = _read_column(path, table, CODES, 3, "integer")
                    yield _Batch(path, table, codes, _read_column(path, table, TEXT, 2, "floating"))


def _data_files(part: Path) -> list[Path]:
    path = part / "state.json"
    found = read_json(path).get("_data_files")
    try:
        names = [entry["filename"] for entry in found]
    except (KeyError, TypeError):
        names = [None]
    if not all(map(_is_file_name, names)):
        raise DatasetError(f"{path}: _data_files={short(found)}: expected a list of file names")
    return [part / name for name in names]


def _read_column(path, table, name, rank, kind) -> arrow.Column:
    where = f"{path}: column {name!r}"
    if name not in table.column_names:
        raise DatasetError(f"{where} is missing: the columns are {short(table.column_names)}")
    try:
        return arrow.from_nested_list(table.column(name), rank, kind)
    except arrow.ColumnError as error:
        raise DatasetError(f"{where}: {error}") from None


def count_codes(batch: _Batch, n_codes: int) -> np.ndarray:
    """How often each code occurs, (n_codes,) int64.

    Raises:
      DatasetError: as `check_codes`.
    """
    counts = np.zeros(n_codes, np.int64)
    codes = batch.codes.flat
    for start in range(0, len(codes), 2**20):  # in chunks: bincount widens them to 8 bytes
        chunk = codes[start : start + 2**20]
        check_codes(chunk, n_codes, batch.path)
        counts += np.bincount(chunk.astype(np.int64), minlength=n_codes)
    return counts


def check_codes(codes: np.ndarray, n_codes: int, where: str | Path) -> None:
    """Sees that all codes are in the codebook.

    Raises:
      DatasetError: naming `where` they are found.
    """
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= n_codes:
        raise DatasetError(f"{where}: {CODES} holds {low} to {high}: expected 0 to {n_codes - 1}")


def _read_codebook(path, n_codes):
    try:
        codebook = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise DatasetError(f"{path}: not a readable codebook: {short(str(error))}") from None
    is_table = codebook.dtype.kind in "fiu" and codebook.ndim == 2 and len(codebook) == n_codes
    if not is_table or not np.isfinite(codebook).all():
        raise DatasetError(
            f"{path}: {codebook.dtype} of shape {codebook.shape}: expected finite numbers of shape "
            f"({short(n_codes)}, dim), n_codes={short(n_codes)}"
        )
    return codebook.astype(np.float32)


def read_json(path: epath.PathLike) -> dict:
    """`files.read_json` of a file that belongs to a dataset.

    Raises:
      DatasetError: no such file, or not an object in JSON.
    """
    try:
        return files.read_json(path)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file: expected a dataset in {path.parent}") from None
    except ValueError as error:
        raise DatasetError(str(error)) from None
