"""Datasets of `tensorflow-datasets`, which need no TensorFlow: rows read from ArrayRecord files."""

import functools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from opensora_jax.data.parts import CODES, TEXT, DatasetError, check_codes

# What metadata.json says of datasets of this kind.
FORMAT_KEY, FORMAT = "format", "tfds"
# The one split that they have.
SPLIT = "train"

# Records that are kept decoded: what a row needs of its record is asked for piece by piece.
_N_RECORDS = 64
# Characters of an error of the library that ours repeat.
_MOST_WORDS = 300


def library() -> ModuleType:
    """`tensorflow_datasets`, which takes a second to import.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"a TFDS dataset needs tensorflow-datasets ({error}): pip install 'opensora_jax[tfds]'"
        ) from None
    return tensorflow_datasets


@dataclass(frozen=True)
class Record:
    """A row; as `data.parts.Batch`, of one row that has a number."""

    values: dict[str, Any]
    codes: dict[int, np.ndarray]
    text: dict[int, np.ndarray]

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def value(self, name: str, i: int) -> Any:
        value = self.values[name]
        return value.decode() if isinstance(value, bytes) else np.asarray(value).item()


class Records:
    """As `data.parts.Parts`, of what `data.tfds_export` wrote: one part, a record a row.

    Raises:
      DatasetError: not a TFDS dataset of `n_rows` such records.
    """

    def __init__(self, folder: Path, n_rows: int, n_codes: int):
        self._folder, self._n_codes, tfds = folder, n_codes, library()
        try:
            self._source = tfds.builder_from_directory(folder).as_data_source(split=SPLIT)
            n_found = len(self._source)
        except Exception as error:  # of all kinds
            raise self._unreadable(error) from None
        if n_found != n_rows:
            raise DatasetError(f"{folder}: {n_found} records: expected {n_rows}, as the index says")
        self._read = functools.lru_cache(_N_RECORDS)(self._record)

    def videos(self, k: int) -> "Records":
        return self

    texts = videos

    def find(self, i: int) -> tuple[Record, int]:
        return self._read(i), i

    def _record(self, i: int) -> Record:
        try:
            values = self._source[i]
            codes, text = values[CODES], values[TEXT]
        except Exception as error:  # of all kinds
            raise self._unreadable(error) from None
        check_codes(codes, self._n_codes, f"{self._folder}: record {i}")
        return Record(values, {i: codes}, {i: text})

    def _unreadable(self, error: Exception) -> DatasetError:
        said = " ".join(str(error).split())[:_MOST_WORDS]
        return DatasetError(
            f"{self._folder}: not a TFDS dataset in ArrayRecord with {CODES} and {TEXT}: {said}"
        )
