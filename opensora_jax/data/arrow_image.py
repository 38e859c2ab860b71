"""Arrow files of which only some bytes are read: headers, and where columns have their numbers."""

import dataclasses
import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_jax.data.parts import DatasetError
from opensora_jax.data.store import Store
from opensora_jax.files import short

# Bytes from a file's beginning that most of its headers are in.
_HEADERS = 2**16
_LARGEST_HEADER = 2**24


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the index and metadata.json say of the videos or of the texts.

    Attributes:
      lengths: (n,), of all of them; ends: (n_parts,), how many there are up to the end of each
        part.
      inner: their other sides.
      dtype: that their numbers are of.
      table: the folder in a part that has them.
    """

    lengths: np.ndarray
    ends: np.ndarray
    inner: tuple[int, ...]
    dtype: type[np.generic]
    table: str


class Image:
    """A file in memory of which only what is asked for is there: the rest takes no memory."""

    def __init__(self, store: Store, file: str):
        self._store, self.file = store, file
        self._size = store.size(file)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, max(self._size, 1), flags=private)
        self._buffer = pa.py_buffer(self._memory)
        self._filled: list[tuple[int, int]] = []

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The record batches, with headers and nothing else.

        Raises:
          DatasetError: not an Arrow file that can be read so.
        """
        source = pa.BufferReader(self._buffer)
        self._fill_message(0)
        reader = self._checked(pa.ipc.open_stream, source)
        while True:
            self._fill_message(source.tell())
            try:
                batch = self._checked(reader.read_next_batch)
            except StopIteration:
                return
            yield batch

    def start_of(
        self, batch: pa.RecordBatch, column: str, lengths: np.ndarray, kind: Kind
    ) -> tuple[int, str]:
        """(byte at which the numbers of the first row of a batch begin, their type).

        Raises:
          DatasetError: the column is missing or of another kind, or its rows are not so long.
        """
        where = f"{self.address}: column {column!r}"
        if column not in batch.schema.names:
            raise DatasetError(f"{where} is missing: the columns are {short(batch.schema.names)}")
        array = batch.column(column)
        problem = DatasetError(
            f"{where}: type {short(str(array.type))}: expected lists of lists of "
            f"{list(kind.inner)} {kind.dtype.__name__} numbers, without nulls; set "
            "data.stream=False for a dataset of others"
        )
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        if array.null_count or not is_list:
            raise problem
        self.fill_array(array.offsets)
        offsets, array, inner = array.offsets.to_numpy(), array.values, []
        n_lists = len(array)
        while pa.types.is_fixed_size_list(array.type) and not array.null_count:
            inner.append(array.type.list_size)
            array = array.values
        dtype = pa.types.is_primitive(array.type) and np.dtype(array.type.to_pandas_dtype())
        if array.null_count or inner != list(kind.inner) or not np.issubdtype(dtype, kind.dtype):
            raise problem
        if not np.array_equal(np.diff(offsets), lengths) or not 0 <= offsets[0] <= offsets[-1]:
            raise DatasetError(f"{where}: rows of other lengths than the index says")
        if offsets[-1] > n_lists:
            raise DatasetError(f"{where}: damaged: offsets lead out of the file")
        values = array.buffers()[1].address - self._buffer.address
        return values + int(offsets[0]) * math.prod(inner) * dtype.itemsize, dtype.str

    def fill_array(self, array: pa.Array) -> None:
        """Reads what an array of the file's is in."""
        for buffer in array.buffers():
            if buffer is not None and buffer.size:
                self._fill(buffer.address - self._buffer.address, buffer.size)

    @property
    def address(self) -> str:
        return f"{self._store.address}/{self.file}"

    def _checked(self, read: Callable, *args: Any) -> Any:
        """What a function of pyarrow's makes of what is in memory."""
        try:
            return read(*args)
        except (OSError, ValueError) as error:
            raise self._not_whole(str(error)) from None

    def _not_whole(self, problem: str) -> DatasetError:
        return DatasetError(
            f"{self.address}: not a whole, uncompressed Arrow file: {short(problem)}"
        )

    def _fill_message(self, start: int) -> None:
        """Reads the header of an Arrow message: a mark, its size, and what it says."""
        self._fill(start, 8)
        size = int.from_bytes(self._memory[start + 4 : start + 8], "little")
        if size > _LARGEST_HEADER:
            raise self._not_whole(f"a header of {size} bytes")
        self._fill(start, 8 + size)

    def _fill(self, start: int, n_bytes: int) -> None:
        if any(a <= start and start + n_bytes <= b for a, b in self._filled):
            return
        end = min(start + max(n_bytes, _HEADERS), self._size)
        if end <= start:
            raise self._not_whole(f"it ends after {self._size} bytes")
        self._memory[start:end] = self._store.read(self.file, start, end - start)
        self._filled.append((start, end))
