"""Which rows a dataset has, and where they lie, without a look at its parts.

Ten million rows are some arrays of numbers here, in files of their own beside metadata.json.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data import parts
from opensora_jax.data.parts import DatasetError
from opensora_jax.files import short

FOLDER = "index"


@dataclass(frozen=True)
class Index:
    """Attributes:
    row_video, row_text: (n_rows,), of each row the numbers of its video and of its text.
    video_frames: (n_videos,), latent frames.
    text_lengths: (n_texts,), valid tokens.
    video_ends, text_ends: (n_parts,), how many videos and texts there are up to the end of each
      part.
    video_hashes: (n_videos,) uint64, of the videos' names; empty where validation was chosen
      otherwise, before there were hashes.
    """

    row_video: np.ndarray
    row_text: np.ndarray
    video_frames: np.ndarray
    text_lengths: np.ndarray
    video_ends: np.ndarray
    text_ends: np.ndarray
    video_hashes: np.ndarray

    def save(self, folder: epath.Path) -> dict[str, str]:
        """Writes the arrays into `folder`/index; returns the checksums of their files by name."""
        (folder / FOLDER).mkdir(exist_ok=True)
        for field in fields(self):
            files.write_array(folder / _file(field.name), getattr(self, field.name))
        return {_file(f.name): parts.checksum(folder / _file(f.name)) for f in fields(self)}

    @classmethod
    def load(cls, folder: Path, sums: dict[str, str]) -> "Index":
        """What `save` wrote.

        Raises:
          DatasetError: a file is missing or changed, or the arrays do not fit one another.
        """
        found = {}
        for field in fields(cls):
            path = folder / _file(field.name)
            parts.expect_checksum(path, sums.get(_file(field.name), ""))
            try:
                found[field.name] = np.load(path, allow_pickle=False)
            except (ValueError, EOFError, MemoryError) as error:
                raise DatasetError(f"{path}: not a readable array: {short(str(error))}") from None
        return cls(**found)


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.npy"


def smallest(values: Iterable[int] | np.ndarray) -> np.ndarray:
    """Natural numbers in the smallest type that holds them."""
    array = np.fromiter(values, np.int64) if not isinstance(values, np.ndarray) else values
    return array.astype(np.min_scalar_type(int(array.max(initial=0))))


def hash_of(name: str) -> int:
    """A number in [0, 2**64) that is the same for the same name everywhere."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def read_codebook(path: Path, n_codes: int) -> np.ndarray:
    """(n_codes, dim) float32.

    Raises:
      DatasetError: no such array.
    """
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
