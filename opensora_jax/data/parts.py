"""The Arrow files of a dataset's parts: mapped into memory when they are first used, and checked.

Two layouts. In the one that `dataset_writer` writes, a part is a folder of up to three Hugging Face
datasets: `videos`, a row a video, `texts`, a row a distinct caption, and `rows`, which says which
of them belong together. In a flat one, which others may write as well, it is itself a Hugging Face
dataset with a row a caption.
"""

import bisect
import functools
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_jax import files
from opensora_jax.data import arrow
from opensora_jax.files import short

CODES, TEXT = "video_latent_states", "text_latent_states"
VIDEOS, TEXTS, ROWS = "videos", "texts", "rows"
# Of each part its folder, and the checksums of its files by their names in it.
LIST = "parts.json"
# What `save_to_disk` calls the only file of a dataset.
ARROW_FILE = "data-00000-of-00001.arrow"

# Parts that are open at a time: a process may hold some 65,000 maps, and has others.
_MOST_OPEN = 256
_CHUNK = 2**24  # bytes


class DatasetError(ValueError):
    """A dataset is not as expected; the message names the file or key, its value, and what was."""


def name_of(index: int) -> str:
    """The folder of a part."""
    return f"part-{index:05d}"


def listed(folder: Path) -> tuple[list[Path], list[dict[str, str]]]:
    """The parts that parts.json lists: their folders, and the checksums of the files of each.

    Raises:
      DatasetError: not such a list.
    """
    path = folder / LIST
    try:
        entries = files.read_json(path, list)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    folders, sums = [], []
    for k, entry in enumerate(entries):
        # Until parts had names of their own there were only checksums.
        named = entry if "files" in entry else {"name": name_of(k), "files": entry}
        if not is_file_name(named.get("name")) or not isinstance(named["files"], dict):
            raise DatasetError(f"{path}: entry {k}: {short(entry)}: expected a name and files")
        folders.append(folder / named["name"])
        sums.append(named["files"])
    return folders, sums


def find(folder: Path) -> list[Path]:
    """The parts in a folder, in order; the folder itself where it is a dataset of others."""
    if (folder / "state.json").exists():
        return [folder]
    if (folder / LIST).exists():
        return [path for path in listed(folder)[0] if path.exists()]
    found = ((re.fullmatch(r"part-(\d{5,})", path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def checksum(path: Path) -> str:
    """CRC-32 of a file, as eight digits."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def below(sums: Mapping[str, str], name: str) -> dict[str, str]:
    """Of the checksums of a part's files those of the table `name`, by their names in it."""
    start = f"{name}/"
    return {file.removeprefix(start): crc for file, crc in sums.items() if file.startswith(start)}


def expect_checksum(path: Path, expected: str | None) -> None:
    """Sees that a file is as it was written; None: nobody says how.

    Raises:
      DatasetError: it is not, or is not there.
    """
    if expected is None:
        return
    try:
        found = checksum(path)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror}") from None
    if found != expected:
        raise DatasetError(
            f"{path}: checksum {found}, expected {short(expected)}: the file was changed or taken "
            "from elsewhere after it was written; put it back, or make the dataset again"
        )


@dataclass
class Batch:
    """One contiguous Arrow record batch, with the arrays of one column or of both."""

    path: Path
    table: pa.RecordBatch
    codes: arrow.Column | None
    text: arrow.Column | None

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return self.table.schema.names

    def value(self, name: str, i: int) -> Any:
        """Of a column, as a Python value."""
        return self.table.column(name)[i].as_py()


class Table:
    """The rows of the Arrow files of one Hugging Face dataset."""

    def __init__(self, batches: list[Batch]):
        self._batches = batches
        self._ends = np.cumsum([len(batch.table) for batch in batches]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)

    def find(self, i: int) -> tuple[Batch, int]:
        """The batch of row i, and the row's number there."""
        k = bisect.bisect_right(self._ends, i)
        return self._batches[k], i - self._ends[k] + len(self._batches[k].table)


def open_table(
    folder: Path, *, columns: tuple[str, ...], sums: Mapping[str, str] | None = None
) -> Table:
    """Maps the Arrow files of a Hugging Face dataset.

    Args:
      columns: CODES, TEXT, or both: those that are looked at.
      sums: checksums of the files by name; None: of a dataset of others, whose state.json names
        its files.

    Raises:
      DatasetError: a file is missing, damaged or changed, or a column is, or of another kind.
    """
    batches = []
    for path in _data_files(folder) if sums is None else [folder / name for name in sums]:
        if sums is not None:
            expect_checksum(path, sums[path.name])
        try:
            with pa.memory_map(str(path)) as mapped:
                record_batches = pa.ipc.open_stream(mapped).read_all().to_batches()
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: not a whole Arrow file: {short(str(error))}") from None
        for table in record_batches:
            if len(table):
                codes = _column(path, table, CODES, 3, "integer") if CODES in columns else None
                text = _column(path, table, TEXT, 2, "floating") if TEXT in columns else None
                batches.append(Batch(path, table, codes, text))
    return Table(batches)


def _data_files(folder: Path) -> list[Path]:
    path = folder / "state.json"
    found = read_json(path).get("_data_files")
    try:
        names = [entry["filename"] for entry in found]
    except (KeyError, TypeError):
        names = [None]
    if not all(map(is_file_name, names)):
        raise DatasetError(f"{path}: _data_files={short(found)}: expected a list of file names")
    return [folder / name for name in names]


def _column(path, table, name, rank, kind) -> arrow.Column:
    where = f"{path}: column {name!r}"
    if name not in table.schema.names:
        raise DatasetError(f"{where} is missing: the columns are {short(table.schema.names)}")
    try:
        return arrow.from_nested_list(table.column(name), rank, kind)
    except arrow.ColumnError as error:
        raise DatasetError(f"{where}: {error}") from None


class Parts:
    """Access to the parts by number; few of them are open at a time.

    Args:
      folders: of the parts.
      sums: of each part, the checksums of its files by their names in it; empty: of none.
      n_codes: of the codebook.
      grid: (h, w) that all latents have.
      text_width: that all text features have.
    """

    def __init__(
        self,
        folders: list[Path],
        sums: list[Mapping[str, str]],
        *,
        n_codes: int,
        grid: tuple[int, int],
        text_width: int,
    ):
        self._folders, self._sums = folders, sums
        self._n_codes, self._grid, self._text_width = n_codes, grid, text_width
        self._checked: set[tuple[int, str]] = set()
        self.videos = functools.lru_cache(_MOST_OPEN)(functools.partial(self._open, CODES))
        self.texts = functools.lru_cache(_MOST_OPEN)(functools.partial(self._open, TEXT))

    def both(self, k: int) -> Table:
        """The rows of part k, which is flat and without checksums, checked.

        Raises:
          DatasetError: something in it is not as expected.
        """
        return self._first_use(
            k, open_table(self._folders[k], columns=(CODES, TEXT)), (CODES, TEXT)
        )

    def _open(self, column: str, k: int) -> Table:
        """The videos or texts of part k, checked when it is first used.

        Raises:
          DatasetError: something in it is not as expected.
        """
        folder, sums = self._folders[k], self._sums[k] if self._sums else None
        if sums is not None and any("/" in file for file in sums):
            name = VIDEOS if column == CODES else TEXTS
            folder, sums = folder / name, below(sums, name)
        if sums is not None and (k, column) in self._checked:
            sums = dict.fromkeys(sums)
        return self._first_use(k, open_table(folder, columns=(column,), sums=sums), (column,))

    def _first_use(self, k: int, table: Table, columns: tuple[str, ...]) -> Table:
        new = {(k, column) for column in columns} - self._checked
        if new:
            for batch in table:
                self._check(batch)
            self._checked |= new
        return table

    def _check(self, batch: Batch) -> None:
        if batch.text is not None:
            for i in np.flatnonzero(batch.text.shapes[:, 1] != self._text_width)[:1]:
                raise DatasetError(
                    f"{batch.path}: row {i}: {TEXT} is {batch.text.shapes[i, 1]} wide: "
                    f"expected text_width={short(self._text_width)} as in metadata.json"
                )
        if batch.codes is not None:
            for i in np.flatnonzero((batch.codes.shapes[:, 1:] != self._grid).any(axis=1))[:1]:
                h, w = self._grid
                raise DatasetError(
                    f"{batch.path}: row {i}: {CODES} has shape {batch.codes.shapes[i].tolist()}: "
                    f"expected [T, {short(h)}, {short(w)}], resolution over downsample as in "
                    "metadata.json"
                )
            check_codes(batch.codes.flat, self._n_codes, batch.path)


def count_codes(batch: Batch, n_codes: int) -> np.ndarray:
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


def is_file_name(value) -> bool:
    return (
        isinstance(value, str) and value != "" and len(value) <= 255 and Path(value).name == value
    )


def read_json(path) -> dict:
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
