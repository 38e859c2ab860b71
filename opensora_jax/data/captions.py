"""The captions file: which video has which captions.

A JSON list of `{"file": "video0.mp4", "captions": ["...", "..."]}`, or the same objects one per
line (JSONL). `file` is relative to the video folder. Other keys are kept as they are.
"""

import json
import os
from pathlib import PurePosixPath

from etils import epath

from opensora_jax import files
from opensora_jax.files import short


class CaptionsError(ValueError):
    """A captions file is not as expected; the message names the file, the entry and the value."""


def read_captions(path: str | os.PathLike) -> list[dict]:
    """Reads and checks a captions file.

    Returns:
      The entries in the file's order: each a dict with `file` (str, relative, forward slashes),
      `captions` (list of at least one str that is not blank) and whatever else the entry holds.
      What is no character in a caption, as half of an emoji that was cut, is a question mark.

    Raises:
      CaptionsError: the file cannot be read, is no JSON, or an entry is not as described above: two
        entries for one video, a path that leaves the video folder, an empty or blank caption, ...
    """
    path = epath.Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise CaptionsError(f"{path}: no such file: expected a captions file") from None
    except OSError as error:
        raise CaptionsError(f"{path}: {error.strerror}: expected a captions file") from None
    except UnicodeDecodeError as error:
        raise CaptionsError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})"
        ) from None
    try:
        entries = {}  # file -> (where in the captions file, entry)
        for where, value in _parse(path, text):
            entry = _check(f"{path}: {where}", value)
            file = entry["file"]
            if file in entries:
                raise CaptionsError(
                    f"{path}: {where}: file={short(file)} is already at {entries[file][0]}: "
                    "expected one entry per video with all its captions"
                )
            entries[file] = where, entry
    except RecursionError:
        raise CaptionsError(
            f"{path}: nested too deeply: expected a list of objects, or one object per line"
        ) from None
    if not entries:
        raise CaptionsError(f"{path}: no entries: expected at least one video with captions")
    return [entry for _, entry in entries.values()]


def expect_a_video(entries: list[dict], folder: str | os.PathLike) -> None:
    """Sees that a folder holds the video of at least one entry.

    Raises:
      CaptionsError: not one is there.
    """
    is_there = epath.Path.is_file if files.is_remote(folder) else os.path.isfile
    if not any(is_there(epath.Path(folder) / entry["file"]) for entry in entries):
        first = short(entries[0]["file"])
        raise CaptionsError(f"{folder}: none of the captions' videos is there, not {first}")


def _parse(path, text):
    """Yields (where in the file, parsed value)."""
    if text.lstrip().startswith("["):
        for i, value in enumerate(_loads(str(path), text)):
            yield f"entry {i}", value
    else:
        for i, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield f"line {i}", _loads(f"{path}: line {i}", line)


def _loads(where, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise CaptionsError(
            f"{where}: not JSON ({error}): expected a list of objects, or one object per line"
        ) from None


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
    return {**entry, "file": str(relative), "captions": captions}
