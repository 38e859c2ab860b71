"""Videos in tar archives, as WebDataset packs them: `shard.tar/0001.mp4` names one.

An archive is read through once for what is where in it; its members are then read by themselves.
"""

import contextlib
import functools
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from etils import epath

from opensora_jax import files
from opensora_jax.data.video_file import IMAGE_SUFFIXES, VIDEO_SUFFIXES

SUFFIX = ".tar"
_CAPTION_KEYS = ("captions", "caption", "text")  # of a sample's .json
_LARGEST_TEXT = 2**20  # bytes


class ArchiveError(ValueError):
    """Not a tar archive, or what is asked for is not in it."""


@contextlib.contextmanager
def member(folder: epath.PathLike, name: str) -> Iterator[Path]:
    """A path of this machine's, for as long as this lasts, with the file `name` in `folder`, which
    may lie in an archive there, or in an object store.

    Raises:
      ArchiveError: no such archive, or no such file in it.
    """
    parts = PurePosixPath(name).parts
    k = next((i for i, part in enumerate(parts[:-1]) if part.endswith(SUFFIX)), None)
    path = files.inside(folder, "/".join(parts[: len(parts) if k is None else k + 1]))
    with files.nearby(path) as near:
        if k is None or near.is_dir():
            yield near.joinpath(*parts[len(parts) if k is None else k + 1 :])
            return
        inside = "/".join(parts[k + 1 :])
        try:
            stat = near.stat()
        except (OSError, ValueError):  # or no name that any could have
            raise ArchiveError(f"no archive {files.short(path.name)}") from None
        place = _places(near, stat.st_size, stat.st_mtime_ns).get(inside)
        if place is None:
            raise ArchiveError(f"not in {path.name}")
        with tempfile.TemporaryDirectory() as made:
            copy = Path(made) / f"member{PurePosixPath(inside).suffix}"
            with near.open("rb") as source, copy.open("wb") as target:
                source.seek(place[0])
                shutil.copyfileobj(_Part(source, place[1]), target)
            yield copy


class _Part:
    """The next `size` bytes of a file."""

    def __init__(self, file: Any, size: int):
        self._file, self._left = file, size

    def read(self, n: int = -1) -> bytes:
        n = self._left if n < 0 else min(n, self._left)
        self._left -= n
        return self._file.read(n)


@functools.lru_cache(64)
def _places(path: Path, size: int, changed: int) -> dict[str, tuple[int, int]]:
    """Where in the archive each file begins, and its bytes."""
    del changed  # another file then
    try:
        with tarfile.open(path, "r:") as archive:
            found = {
                str(PurePosixPath(m.name)): (m.offset_data, m.size) for m in archive if m.isfile()
            }
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ArchiveError(f"not a tar archive, uncompressed: {files.short(str(error))}") from None
    if any(start + length > size for start, length in found.values()):
        raise ArchiveError("truncated: its last file is cut")
    return found


def samples(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Of each video or image in an archive its name and its captions: the lines of the .txt beside
    it, or what its .json says.

    Raises:
      ArchiveError: not a tar archive, or a text in it that is none.
    """
    stat = os.stat(path)
    places = _places(path, stat.st_size, stat.st_mtime_ns)
    with path.open("rb") as file:
        for name in places:
            start, dot, suffix = _split(name)
            if dot and suffix.lower() in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
                yield name, _captions(file, places, start)


def _split(name: str) -> tuple[str, str, str]:
    """(the sample's name, a dot, the suffix) by WebDataset's rule: at the base name's first dot."""
    folder, slash, base = name.rpartition("/")
    start, dot, rest = base.partition(".")
    return f"{folder}{slash}{start}", dot, f".{rest}"


def _captions(file: Any, places: dict[str, tuple[int, int]], sample: str) -> list[Any]:
    def text(suffix: str) -> str | None:
        place = places.get(f"{sample}{suffix}")
        if place is None:
            return None
        if place[1] > _LARGEST_TEXT:
            raise ArchiveError(f"{sample}{suffix}: {place[1]} bytes: expected a text")
        file.seek(place[0])
        try:
            return file.read(place[1]).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ArchiveError(f"{sample}{suffix}: not UTF-8 text ({error.reason})") from None

    lines = text(".txt")
    if lines is not None:
        return [line for line in lines.splitlines() if line.strip()]
    said = text(".json")
    try:
        found = {} if said is None else json.loads(said)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{sample}.json: not JSON: {files.short(str(error))}") from None
    values = [found[key] for key in _CAPTION_KEYS if isinstance(found, dict) and key in found]
    first = values[0] if values else []
    return first if isinstance(first, list) else [first]
