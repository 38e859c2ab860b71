"""Where captions come from: JSON, tables, folders of texts beside videos, and WebDataset archives.

Each reader yields (where it stands, as an error names it; the entry, unchecked).
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
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

# Rows of one file in these belong together.
TABLES = (".csv", ".tsv", ".parquet")

_PIECE = 2**20  # bytes that are read at a time
_LONGEST_VALUE = 2**26  # characters of an entry
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()

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
            _expect_one_byte_characters(path)
            yield from _table(path, columns)
        else:
            _expect_one_byte_characters(path)
            yield from _json(path)
    except FileNotFoundError:
        raise CaptionsError(f"{path}: no such file: expected a captions file") from None
    except UnicodeDecodeError as error:
        raise CaptionsError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    except OSError as error:
        said = error.strerror or str(error).removeprefix(f"{path}: ")
        raise CaptionsError(f"{path}: {said}: expected a captions file") from None


def _expect_one_byte_characters(path):
    """Sees that a text is not UTF-16 or UTF-32, as some programs save it."""
    with path.open("rb") as file:
        start = file.read(2)
    has_half = start.count(0) == 1  # of a character of two bytes
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or has_half:
        raise CaptionsError(f"{path}: UTF-16 or UTF-32 text: expected UTF-8")


# -------------------------------------------------------------------------------------------- JSON


def _json(path: epath.Path) -> Entries:
    """Read bit by bit: there may be any number of entries."""
    pieces = _pieces(path)
    start = ""
    while not start.strip() and (piece := next(pieces, "")):
        start += piece
    try:
        if start.lstrip().startswith("["):
            for i, value in enumerate(_List(path, itertools.chain([start], pieces))):
                yield f"entry {i}", value
        else:
            for i, line in enumerate(_lines(itertools.chain([start], pieces)), start=1):
                if line.strip():
                    yield f"line {i}", _loads(f"{path}: line {i}", line)
    except RecursionError:
        raise CaptionsError(
            f"{path}: nested too deeply: expected a list of objects, or one object per line"
        ) from None


def _pieces(path: epath.Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    place = 0  # of the bytes that are decoded next
    with path.open("rb") as file:
        while True:
            data = file.read(_PIECE)
            place -= len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                error.start += place
                raise
            if text:
                yield text
            if not data:
                return
            place += len(decoder.getstate()[0]) + len(data)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        yield from lines
    yield rest


class _List:
    """The values of a JSON list, one by one."""

    def __init__(self, path: epath.Path, pieces: Iterator[str]):
        self._path, self._pieces = path, pieces
        self._text, self._at = "", 0  # what is at hand, and where in it the next character is
        self._line, self._column = 1, 1  # of its first character

    def __iter__(self) -> Iterator[Any]:
        self._take("[")
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self._take(",")
                yield self._value()
        self._take("]")
        if self._next():
            raise self._error("Extra data", self._at)

    def _next(self) -> str:
        """The next character that is no space; at the end there is none."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or not self._fill():
                return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> None:
        if self._next() != character:
            raise self._error(f"Expecting {character!r}", self._at)
        self._at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._fill():
                    self._at = end
                    return value
            except json.JSONDecodeError as error:  # if only of a value that is not all at hand
                if not self._fill():
                    raise self._error(error.msg, error.pos) from None
            except ValueError as error:
                raise self._error(str(error), self._at) from None

    def _fill(self) -> bool:
        """Drops what was read and adds the next piece; False: there is none, or too much of one
        value."""
        if len(self._text) - self._at > _LONGEST_VALUE:
            return False
        piece = next(self._pieces, "")
        if piece:
            self._line, self._column = self._place(self._at)
            self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _place(self, at: int) -> tuple[int, int]:
        """(line, column) of a character at hand, from 1 on."""
        n_lines = self._text.count("\n", 0, at)
        if n_lines:
            return self._line + n_lines, at - self._text.rfind("\n", 0, at)
        return self._line, self._column + at

    def _error(self, what: str, at: int) -> CaptionsError:
        line, column = self._place(at)
        return _not_json(self._path, f"{what} at line {line} column {column}")


def _loads(where, text):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(where, f"{error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise _not_json(where, error) from None


def _not_json(where, what):
    return CaptionsError(
        f"{where}: not JSON ({what}): expected a list of objects, or one object per line"
    )


# ------------------------------------------------------------------------------------------ tables


def _table(path: epath.Path, columns: tuple[str, str]) -> Entries:
    """Each row, numbered from 1."""
    number = 0
    for batch in _batches(path, columns):
        for file, captions in zip(*(batch.column(i).to_pylist() for i in (0, 1)), strict=True):
            number += 1
            some = captions if isinstance(captions, list) else [captions]
            yield f"row {number}", {"file": file, "captions": some}


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
            how = {
                "read_options": pa.csv.ReadOptions(use_threads=False),  # whose errors name the row
                "parse_options": pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            }
            _expect_columns(path, pa.csv.open_csv(near, **how).schema.names, columns)
            # Captions such as "null" or "1" are text; what is in other columns is not looked at.
            options = pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                strings_can_be_null=False,
                include_columns=list(columns),
            )
            opened = pa.csv.open_csv(near, **how, convert_options=options)
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
        if names.count(column) > 1:
            raise CaptionsError(f"{path}: column {short(column)} is there twice: expected it once")


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
        try:
            lines = [] if text is None else text.read_bytes().decode("utf-8-sig").splitlines()
            captions = [line for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:  # no list: of this entry, not of all
            captions = f"{text.name}: not UTF-8 text ({getattr(error, 'reason', error)})"
        yield name, {"file": name, "captions": captions}


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
