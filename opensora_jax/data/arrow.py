"""Arrays <-> Arrow's nested lists, without going through Python lists.

Arrow stores a column of nested lists as one flat array of values and, per level, the offsets where
lists begin; lists of one fixed size need none. Rows that are boxes (no ragged lists inside) are
therefore plain slices of the values.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from opensora_jax.files import short

_IS_KIND = {"integer": pa.types.is_integer, "floating": pa.types.is_floating}


class ColumnError(ValueError):
    """A column does not hold full arrays of the rank and kind asked for; the message says why."""


@dataclass(frozen=True)
class Column:
    """Arrays of one rank as views of one flat array."""

    values: np.ndarray
    starts: np.ndarray  # (rows,): where each row begins in `values`
    shapes: np.ndarray  # (rows, rank)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> np.ndarray:
        shape, start = self.shapes[i], self.starts[i]
        return self.values[start : start + shape.prod()].reshape(shape)

    @property
    def flat(self) -> np.ndarray:
        """All values of all rows, in order."""
        return self.values[self.starts[0] : self.starts[-1] + self.shapes[-1].prod()]


def to_nested_list(arrays: list[np.ndarray], dtype: np.dtype) -> pa.LargeListArray:
    """Arrays (at least one) that differ in their first dimension only -> a column of nested lists.

    64-bit offsets where rows begin; what is in them are lists of fixed sizes.

    Raises:
      ValueError: the other dimensions differ.
    """
    inner = {a.shape[1:] for a in arrays}
    if len(inner) > 1:
        raise ValueError(f"arrays of sides {sorted(inner)}: expected the same but for the first")
    values = pa.array(np.concatenate([np.ravel(a) for a in arrays], dtype=dtype, casting="unsafe"))
    for size in reversed(inner.pop()):
        values = pa.FixedSizeListArray.from_arrays(values, size)
    offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays])])
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)


def from_nested_list(array: pa.Array, rank: int, kind: str) -> Column:
    """A column of `rank` nested lists -> arrays, without a copy.

    Args:
      array: at least one row of lists, large lists, fixed-size lists, or the Array2D and Array3D of
        Hugging Face datasets.
      kind: "integer" or "floating".

    Raises:
      ColumnError: another type or rank, a null, a row that is ragged or empty, or offsets that
        lead out of the file.
    """
    expected = f"expected {rank} nested lists of {kind} numbers"
    found = f"type {short(str(array.type))}"
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ColumnError(f"damaged: {short(str(error))}") from None
    offsets = []
    for _ in range(rank):
        if array.null_count:
            raise ColumnError(f"{array.null_count} values are null: {expected}")
        if pa.types.is_fixed_size_list(array.type):
            offsets.append((np.arange(len(array) + 1) + array.offset) * array.type.list_size)
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            offsets.append(array.offsets.to_numpy())
        else:
            raise ColumnError(f"{found}: {expected}")
        array = array.values
    if array.null_count or not _IS_KIND[kind](array.type):
        raise ColumnError(f"{found}, {array.null_count} values are null: {expected}")
    return Column(array.to_numpy(), *_row_shapes(offsets))


def _row_shapes(offsets):
    """List offsets of every level -> where rows start, and their shapes."""
    first = np.arange(len(offsets[0]) - 1)
    last = first + 1
    shapes = []
    for level in offsets:
        # Row i's lists on this level are number first[i] to last[i]: all must be equally long.
        lengths = np.diff(level)
        length = lengths[first]
        ragged = lengths[first[0] : last[-1]] != np.repeat(length, last - first)
        for i in np.repeat(np.arange(len(first)), last - first)[ragged][:1]:
            raise ColumnError(f"row {i} is ragged: expected lists of one length")
        for i in np.flatnonzero(length == 0)[:1]:
            raise ColumnError(f"row {i} is empty: expected at least one number")
        shapes.append(length)
        first, last = level[first], level[last]
    return first.astype(np.int64), np.stack(shapes, axis=1).astype(np.int64)
