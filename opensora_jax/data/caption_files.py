"""Where captions come from: JSON, tables, folders of texts beside videos, and WebDataset archives.

Each reader yields (where it stands, as an error names it; the entry, unchecked).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from etils import epath

from opensora_jax import files
from opensora_jax.data import archives
from opensora_jax.data.video_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from opensora_jax.files import short

TABLES = (".csv", ".tsv", ".parquet")
Entries = Iterator[tuple[str, Any]]


class CaptionsError(ValueError):
    """A captions file is not as expected; the message names the file, the entry and the value."""


def read(path: epath.Path, columns: tuple[str, str]) -> Entries:
    """The entries of a file or folder.

    Args:
      columns: of a table: the names of the column of files and of that of captions.

    Raises:
      CaptionsError: it cannot be read.
    """
    try:
        if path.is_dir():
            tars = sorted(p for p in files.walk(path) if p.suffix == archives.SUFFIX)
            yield from _tars(path, tars) if tars else _texts(path)
        elif path.suffix == archives.SUFFIX:
            yield from _tars(path.parent, [path])
        elif path.suffix in TABLES:
            yield from _table(path, columns)
        else:
            yield from _json(path)
    except FileNotFoundError:
        raise CaptionsError(f"{path}: no such file: expected a captions file") from None
    except UnicodeDecodeError as error:
        raise CaptionsError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        raise CaptionsError(f"{path}: {error.strerror}: expected a captions file") from None


# -------------------------------------------------------------------------------------------- JSON


def _json(path: epath.Path) -> Entries:
    text = path.read_bytes().decode("utf-8-sig")
    try:
        if text.lstrip().startswith("["):
            for i, value in enumerate(_loads(str(path), text)):
                yield f"entry {i}", value
        else:
            for i, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield f"line {i}", _loads(f"{path}: line {i}", line)
    except RecursionError:
        raise CaptionsError(
            f"{path}: nested too deeply: expected a list of objects, or one object per line"
        ) from None


def _loads(where, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise CaptionsError(
            f"{where}: not JSON ({error}): expected a list of objects, or one object per line"
        ) from None


# ------------------------------------------------------------------------------------------ tables


def _table(path: epath.Path, columns: tuple[str, str]) -> Entries:
    """Rows of one file are one entry, where the first of them is; numbered from 1."""
    found: dict[Any, tuple[str, dict]] = {}
    number = 0
    for batch in _batches(path, columns):
        for file, captions in zip(*(batch.column(i).to_pylist() for i in (0, 1)), strict=True):
            number += 1
            more = captions if isinstance(captions, list) else [captions]
            if isinstance(file, str) and file in found:
                found[file][1]["captions"] += more
            else:
                key = file if isinstance(file, str) else number
                found[key] = f"row {number}", {"file": file, "captions": list(more)}
    yield from found.values()


def _batches(path: epath.Path, columns: tuple[str, str]) -> Iterator[pa.RecordBatch]:
    if columns[0] == columns[1]:
        raise CaptionsError(f"{path}: column {short(columns[0])} for both: expected two columns")
    try:
        with files.nearby(path) as near:
            if path.suffix == ".parquet":
                opened = pa.parquet.ParquetFile(near)
                _expect_columns(path, opened.schema_arrow.names, columns)
                yield from (_chosen(b, columns) for b in opened.iter_batches(columns=list(columns)))
                return
            delimiter = "\t" if path.suffix == ".tsv" else ","
            opened = pa.csv.open_csv(
                near,
                parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
                # Captions such as "null" or "1" are text.
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()), strings_can_be_null=False
                ),
            )
            _expect_columns(path, opened.schema.names, columns)
            yield from (_chosen(batch, columns) for batch in opened)
    except pa.ArrowException as error:
        kind = path.suffix.removeprefix(".")
        raise CaptionsError(f"{path}: not a {kind} file: {short(str(error))}") from None


def _expect_columns(path, names, columns):
    for flag, column in zip(("--file_column", "--caption_column"), columns, strict=True):
        if column not in names:
            raise CaptionsError(
                f"{path}: no column {short(column)}, only {short(names)}: {flag} names another"
            )


def _chosen(batch, columns):
    return batch.select(list(columns))


# --------------------------------------------------------------------------- texts beside videos


def _texts(folder: epath.Path) -> Entries:
    """Videos and images with a .txt of the same name beside them, a caption a line."""
    paths = list(files.walk(folder))
    texts = {path.with_suffix(""): path for path in paths if path.suffix == ".txt"}
    for path in paths:
        if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
            continue
        name = str(path.relative_to(folder))
        text = texts.get(path.with_suffix(""))
        lines = [] if text is None else text.read_bytes().decode("utf-8-sig").splitlines()
        yield name, {"file": name, "captions": [line for line in lines if line.strip()]}


def _tars(folder: epath.Path, paths: list[epath.Path]) -> Entries:
    """WebDataset: the files of a sample have one name but for what follows its first dot."""
    for path in paths:
        name = str(path.relative_to(folder))
        try:
            with files.nearby(path) as near:
                for video, captions in archives.samples(Path(near)):
                    yield f"{name}/{video}", {"file": f"{name}/{video}", "captions": captions}
        except archives.ArchiveError as error:
            raise CaptionsError(f"{path}: {error}") from None
