"""Reading the rows of a dataset where it is, without a copy of it: a row's bytes at a time.

Rows come in random order from all parts, so whole files would be thrown away long before they are
read again. The numbers of a row lie one after the other in its Arrow file; where they begin follows
from the index and from where those of the file's first row do. That is read from the file's
headers, once.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from opensora_jax.data.arrow_image import Image, Kind
from opensora_jax.data.index import Index
from opensora_jax.data.parts import (
    CODES,
    TEXT,
    TEXTS,
    VIDEOS,
    DatasetError,
    below,
    check_codes,
)
from opensora_jax.data.row_cache import RowCache
from opensora_jax.data.store import Store

# Rows that are read at a time: a store takes long to answer, but answers many at once.
READERS = 32
# Parts of which other columns than codes and features are kept, each some kilobytes.
_N_COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class Streaming:
    """Where rows are kept that were read once.

    Attributes:
      cache_folder: of this machine.
      cache_bytes: that they take there at most; 0: none are kept.
    """

    cache_folder: Path
    cache_bytes: int


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the rows of a record batch are.

    Attributes:
      file: below the dataset.
      first, n_rows: of the file's rows, those of the batch.
      start: byte at which the first row's numbers begin.
      dtype: of the numbers.
      inner: sides of a row but for the first.
      names: of all columns.
    """

    file: str
    first: int
    n_rows: int
    start: int
    dtype: str
    inner: list[int]
    names: list[str]


class StreamedParts:
    """As `data.parts.Parts`, of parts that stay where they are.

    Args:
      address: of the dataset.
      folders: of the parts.
      sums: of each part, the checksums of its files by their names in it.

    Attributes:
      pool: threads to read rows with.
    """

    def __init__(
        self,
        address: epath.PathLike,
        streaming: Streaming,
        metadata: dict,
        index: Index,
        grid: tuple[int, int],
        folders: Sequence[Path],
        sums: Sequence[Mapping[str, str]],
    ):
        self._store = Store(str(epath.Path(address)))
        self._cache = None
        if streaming.cache_bytes:
            name = hashlib.sha256(f"{address}\n{json.dumps(metadata)}".encode()).hexdigest()[:16]
            self._cache = RowCache(streaming.cache_folder, name, streaming.cache_bytes)
        self._names, self._sums = [folder.name for folder in folders], sums
        self._kinds = {
            CODES: Kind(index.video_frames, index.video_ends, grid, np.integer, VIDEOS),
            TEXT: Kind(
                index.text_lengths, index.text_ends, (metadata["text_width"],), np.floating, TEXTS
            ),
        }
        self._n_codes = metadata["n_codes"]
        self._places: dict[tuple[str, int], list[_Place]] = {}
        self.column = functools.lru_cache(_N_COLUMNS)(self._read_column)
        self.pool = concurrent.futures.ThreadPoolExecutor(READERS, thread_name_prefix="rows")
        self.meter = Meter()

    def videos(self, k: int) -> "StreamedTable":
        return StreamedTable(self, CODES, k)

    def texts(self, k: int) -> "StreamedTable":
        return StreamedTable(self, TEXT, k)

    def close(self) -> None:
        """Ends reading ahead."""
        self._store.close()

    def close_meters(self) -> dict[str, float]:
        """Counts since the last call: rows, and seconds of reading them; pieces that were asked of
        the cache, and found there; tries of the store that failed."""
        counts = {**self.meter.close(), "asked": 0, "found": 0, "retries": self._store.n_retries}
        self._store.n_retries = 0
        if self._cache is not None:
            counts["found"] = self._cache.n_found
            counts["asked"] = self._cache.n_found + self._cache.n_missing
            self._cache.n_found = self._cache.n_missing = 0
        return counts

    def lengths(self, column: str, k: int) -> tuple[int, np.ndarray]:
        """The number of the first row of part k among those of all parts, and the lengths of its
        rows."""
        kind = self._kinds[column]
        first = int(kind.ends[k - 1]) if k else 0
        return first, kind.lengths[first : kind.ends[k]]

    def places(self, column: str, k: int) -> list[_Place]:
        """Where the rows of part k are.

        Raises:
          DatasetError: its headers do not say what the index does.
          OSError: it cannot be read.
        """
        if (column, k) not in self._places:
            key = f"{self._kinds[column].table}-of-part-{k}"
            kept = self._cache.get(key) if self._cache else None
            if kept is None:
                with self.meter:
                    found = self._find(column, k)
                kept = json.dumps([dataclasses.asdict(place) for place in found]).encode()
                if self._cache:
                    self._cache.put(key, kept)
            self._places[column, k] = [_Place(**fields) for fields in json.loads(bytes(kept))]
        return self._places[column, k]

    def read(self, column: str, k: int, place: _Place, i: int) -> np.ndarray:
        """Row i of a batch in part k.

        Raises:
          DatasetError: it holds what is no code.
          OSError: it cannot be read.
        """
        first, lengths = self.lengths(column, k)
        lengths = lengths[place.first : place.first + i + 1]
        shape, dtype = (int(lengths[-1]), *place.inner), np.dtype(place.dtype)
        size = dtype.itemsize * math.prod(place.inner)
        start = place.start + size * int(lengths[:-1].sum())
        key = f"{self._kinds[column].table}-{first + place.first + i}"
        with self.meter:
            if column == CODES:
                self.meter.n_rows += 1
            kept = self._cache.get(key, size * shape[0]) if self._cache else None
            if kept is not None:
                return np.frombuffer(kept, dtype).reshape(shape)
            data = self._store.read(place.file, start, size * shape[0])
            array = np.frombuffer(data, dtype).reshape(shape)
            if column == CODES:
                where = f"{self._store.address}/{place.file}: row {i}"
                check_codes(array, self._n_codes, where)
            if self._cache:
                self._cache.put(key, data)
        return array

    def _file(self, column: str, k: int) -> str:
        sums, table = self._sums[k], self._kinds[column].table
        if any("/" in file for file in sums):
            (file,) = below(sums, table)
            return f"{self._names[k]}/{table}/{file}"
        (file,) = sums  # flat
        return f"{self._names[k]}/{file}"

    def _find(self, column: str, k: int) -> list[_Place]:
        kind, (_, lengths) = self._kinds[column], self.lengths(column, k)
        image = Image(self._store, self._file(column, k))
        found, n_rows = [], 0
        for batch in image.batches():
            if len(batch):
                expected = lengths[n_rows : n_rows + len(batch)]
                start, dtype = image.start_of(batch, column, expected, kind)
                found.append(
                    _Place(
                        file=image.file,
                        first=n_rows,
                        n_rows=len(batch),
                        start=start,
                        dtype=dtype,
                        inner=list(kind.inner),
                        names=batch.schema.names,
                    )
                )
                n_rows += len(batch)
        if n_rows != len(lengths):
            raise DatasetError(
                f"{image.address}: {n_rows} rows: expected {len(lengths)}, as the index says"
            )
        return found

    def _read_column(self, file: str, name: str) -> pa.ChunkedArray:
        """A column of a file, whole."""
        image = Image(self._store, file)
        found = []
        for batch in image.batches():
            image.fill_array(batch.column(name))
            found.append(batch.column(name))
        return pa.chunked_array(found)


class StreamedTable:
    """As `data.parts.Table`: the videos or texts of a part."""

    def __init__(self, parts: StreamedParts, column: str, k: int):
        self._parts, self._column, self._k = parts, column, k

    def find(self, i: int) -> tuple["StreamedBatch", int]:
        places = self._parts.places(self._column, self._k)
        place = next(place for place in places if i < place.first + place.n_rows)
        return StreamedBatch(self._parts, self._column, self._k, place), i - place.first


@dataclasses.dataclass(frozen=True)
class StreamedBatch:
    """As `data.parts.Batch`; it is itself the one column of arrays that it has."""

    parts: StreamedParts
    column: str
    k: int
    place: _Place

    @property
    def names(self) -> list[str]:
        return self.place.names

    def value(self, name: str, i: int) -> Any:
        return self.parts.column(self.place.file, name)[self.place.first + i].as_py()

    @property
    def codes(self) -> "StreamedBatch":
        return self

    @property
    def text(self) -> "StreamedBatch":
        return self

    def __getitem__(self, i: int) -> np.ndarray:
        return self.parts.read(self.column, self.k, self.place, i)


class Meter(contextlib.AbstractContextManager):
    """How many rows are read, and in how many seconds in which any was: threads enter."""

    def __init__(self):
        self._lock, self._n_inside, self._since = threading.Lock(), 0, 0.0
        self._busy, self.n_rows = 0.0, 0

    def __enter__(self) -> "Meter":
        with self._lock:
            self._n_inside += 1
            if self._n_inside == 1:
                self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if not self._n_inside:
                self._busy += time.perf_counter() - self._since

    def close(self) -> dict[str, float]:
        """Rows, and seconds of reading, since the last call."""
        with self._lock:
            now = time.perf_counter()
            if self._n_inside:
                self._busy, self._since = self._busy + now - self._since, now
            values = {"rows": self.n_rows, "seconds": self._busy}
            self._busy, self.n_rows = 0.0, 0
        return values


def readings(datasets: Sequence[StreamedParts], n_processes: int) -> dict[str, float]:
    """For the log: how fast so many processes read rows, if each does as this one did since the
    last call; the share of pieces that were found in the cache; failed tries of the store."""
    counts = [parts.close_meters() for parts in datasets]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    found = {"store_retries": total["retries"]}
    if total["seconds"]:
        found["rows_read_per_second"] = n_processes * total["rows"] / total["seconds"]
    if total["asked"]:
        found["cache_share"] = total["found"] / total["asked"]
    return found
