"""Which video has which captions: read from whatever holds them, and checked.

A captions file is
- JSON: a list of `{"file": "video0.mp4", "captions": ["...", "..."]}`, or the same objects one per
  line (JSONL); other keys are kept as they are;
- a table (.csv, .tsv, .parquet) with a column of files and one of captions, strings or lists of
  them; rows of one file belong together;
- a folder of videos, each with a .txt of the same name beside it, a caption a line;
- a WebDataset archive (.tar) of videos, each with a .txt or .json, or a folder of such.
`file` is relative to the video folder: for the last two that folder, or the archive's.
"""

import operator
import os
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from opensora_jax import files
from opensora_jax.data import caption_files
from opensora_jax.data.caption_files import CaptionsError
from opensora_jax.data.on_disk import Entries
from opensora_jax.files import short

__all__ = ["COLUMNS", "PROBLEM", "CaptionsError", "expect_a_video", "read_captions"]

COLUMNS = ("file", "captions")
# Of an entry that cannot be used: why.
PROBLEM = "problem"


def read_captions(
    path: epath.PathLike, columns: tuple[str, str] = COLUMNS, *, strict: bool = True
) -> Entries:
    """Reads and checks captions.

    Args:
      columns: of a table: the names of the column of files and of that of captions.
      strict: whether an entry that cannot be used is an error; else it says why under PROBLEM, and
        has no captions. A file that cannot be read at all is an error always.

    Returns:
      The entries in the file's order, of rows of a table where the first of a file is: each a dict
      with `file` (str, relative, forward slashes), `captions` (list of at least one str that is not
      blank) and whatever else the entry holds. What is no character in a caption, as half of an
      emoji that was cut, is a question mark.

    Raises:
      CaptionsError: the file cannot be read, is no JSON, or an entry is not as described above: two
        entries for one video, a path that leaves the video folder, an empty or blank caption, ...
    """
    path = epath.Path(path)
    entries, n_usable, problem = Entries(), 0, ""
    for where, value in caption_files.read(path, columns):
        try:
            entry = _check(f"{path}: {where}", value)
            place = entries.add(where, entry)
            if place is None:
                n_usable += 1
            elif path.suffix in caption_files.TABLES:
                entries.add_captions(entry["file"], entry["captions"])
            else:
                raise CaptionsError(
                    f"{path}: {where}: file={short(entry['file'])} is already at {place}: "
                    "expected one entry per video with all its captions"
                )
        except CaptionsError as error:
            if strict:
                raise
            file = value.get("file") if isinstance(value, dict) else None
            found = str(error).removeprefix(f"{path}: ")
            name = file if isinstance(file, str) and file.strip() else where
            entries.add(where, {"file": name, "captions": [], PROBLEM: found}, is_usable=False)
            problem = problem or found
    if not entries:
        raise CaptionsError(f"{path}: no entries: expected at least one video with captions")
    if not n_usable:
        raise CaptionsError(f"{path}: not one entry can be used: {problem}")
    return entries


def expect_a_video(entries: Iterable[dict[str, Any]], folder: epath.PathLike) -> None:
    """Sees that a folder holds the video, or its archive, of at least one entry.

    Raises:
      CaptionsError: not one is there.
    """
    is_there = os.path.isfile  # unlike epath, it takes any name for what it is
    if files.is_remote(folder):
        is_there = operator.methodcaller("exists")
    first = None
    for entry in entries:
        if PROBLEM in entry:
            continue
        if is_there(files.inside(folder, _on_disk(entry["file"]))):
            return
        first = first or entry["file"]
    raise CaptionsError(f"{folder}: none of the captions' videos is there, not {short(first)}")


def _on_disk(file: str) -> str:
    """The file, or the archive that it lies in."""
    start, is_archived, _ = file.partition(".tar/")
    return f"{start}.tar" if is_archived else file


def _check(where, entry):
    if not isinstance(entry, dict):
        raise CaptionsError(f'{where}: {short(entry)}: expected {{"file": ..., "captions": [...]}}')
    for key in ("file", "captions"):
        if key not in entry:
            raise CaptionsError(f"{where}: no {key!r}, only {short(sorted(entry))}")
    file, captions = entry["file"], entry["captions"]
    if not isinstance(file, str) or not file.strip():
        raise CaptionsError(f"{where}: file={short(file)}: expected the name of a video file")
    relative = PurePosixPath(file)
    if relative.is_absolute() or ".." in relative.parts or not relative.name:
        raise CaptionsError(f"{where}: file={short(file)}: expected a path inside the video folder")
    if not isinstance(captions, list) or not captions:
        raise CaptionsError(
            f"{where}: captions={short(captions)}: expected a list of at least one string"
        )
    for i, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise CaptionsError(
                f"{where}: captions[{i}]={short(caption)}: expected a string, not blank"
            )
    captions = [caption.encode(errors="replace").decode() for caption in captions]
    others = {key: value for key, value in entry.items() if key != PROBLEM}
    return {**others, "file": str(relative), "captions": captions}
