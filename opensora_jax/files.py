"""Writing files so that none is ever seen half-written, and errors that name the file."""

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import web

logger = logging.getLogger(__name__)


def write_text(path: epath.PathLike, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    # A file name need not be text: what UTF-8 lacks is written as \udc80, JSON's way as well.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: epath.PathLike, data: bytes | memoryview) -> None:
    """Writes under a temporary name and renames it: the file is whole or absent."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with _naming(path):
        with temporary.open("wb") as f:
            f.write(data)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


def sync(path: epath.PathLike) -> None:
    """Sees that a file or a folder's list of files outlives a power cut, on a disk."""
    if is_remote(path):
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not os.path.isdir(path):  # of which not every file system can do it
            raise
    finally:
        os.close(opened)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_array(path: epath.PathLike, array: np.ndarray) -> None:
    """Writes an array as .npy, as `write_bytes` does."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getbuffer())


def read_json(path: epath.PathLike, kind: type = dict) -> Any:
    """What a JSON file holds: an object or, where `kind` is `list`, an array.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not JSON, or something other than `kind`; the message names the file.
    """
    path = epath.Path(path)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {short(str(error))}") from None
    if not isinstance(value, kind):
        expected = {dict: "an object", list: "an array"}[kind]
        raise ValueError(f"{path}: holds a {type(value).__name__}: expected {expected}")
    return value


def short(value: Any) -> str:
    """A value as error messages show it: of a long one its beginning, and a checksum of it all.

    What stands in a file that others made can be of any length.
    """
    text = value if isinstance(value, str) and len(value) > 80 else repr(value)
    return text if len(text) <= 80 else f"{text[:50]!a}... (CRC {_crc(text):08x})"


def _crc(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Each key, dotted in nested objects, in which `new` differs from `old`, with both values."""
    found = []
    for key in sorted(new.keys() | old.keys()):
        here, there = new.get(key), old.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += [f"{key}.{change}" for change in changes(here, there)]
        elif here != there:
            name = key if len(key) <= 80 else short(key)
            found.append(f"{name}={short(here)}, there {short(there)}")
    return found


def expect_settings(path: epath.PathLike, settings: Mapping[str, Any], found: Mapping) -> None:
    """Sees that what a folder was made with, as its file `path` says, is `settings`.

    Raises:
      ValueError: naming every key that differs, with both values.
    """
    # As they come back from JSON: tuples are lists.
    different = changes(json.loads(json.dumps(settings)), found)
    if different:
        raise ValueError(
            f"{path}: made with other settings: {'; '.join(different)}. Use another folder, or "
            "remove this one"
        )


def record_settings(path: epath.PathLike, settings: Mapping[str, Any]) -> None:
    """Writes what a folder is made with, or checks that it was made with the same.

    Raises:
      ValueError: as `expect_settings`.
    """
    if epath.Path(path).exists():
        expect_settings(path, settings, read_json(path))
    else:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def append(path: epath.PathLike, data: bytes) -> None:
    """Adds `data` to the end of a file; not an object store's, which cannot do that."""
    path = epath.Path(path)
    with _naming(path), path.open("ab") as f:
        f.write(data)


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an object store's, as gs://bucket/folder is, or an address."""
    return "://" in str(epath.Path(path))


def absolute(path: epath.PathLike) -> epath.Path:
    """From the root; an object store's path is so already, and `resolve` would break it."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def inside(folder: epath.PathLike, name: str) -> epath.Path:
    """The file of this name, of any characters, in a folder or below an address."""
    folder = epath.Path(folder)
    return folder / (urllib.parse.quote(name) if isinstance(folder, web.WebPath) else name)


@contextlib.contextmanager
def local(path: epath.PathLike) -> Iterator[Path]:
    """A path of this machine's to write a file to, which ends up at `path`."""
    path = epath.Path(path)
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / path.name
        yield written
        path.write_bytes(written.read_bytes())


@contextlib.contextmanager
def nearby(path: epath.PathLike) -> Iterator[Path]:
    """A path of this machine's with what is at `path`, a file or a folder: for as long as this
    lasts, a copy where it is in an object store."""
    path = epath.Path(path)
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for source in walk(path) if path.is_dir() else [path]:
            target = copy / source.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.copy(target)
        yield copy


def walk(folder: epath.PathLike, above: tuple[str, ...] = ()) -> Iterator[epath.Path]:
    """The files in a folder and in those below it, sorted.

    Args:
      above: folders of this machine's that are not gone through again where a link leads to them.
    """
    if not is_remote(folder):
        above = (*above, os.path.realpath(folder))
    for path in sorted(epath.Path(folder).iterdir()):
        if not path.is_dir():
            yield path
        elif is_remote(path) or os.path.realpath(path) not in above:
            yield from walk(path, above)


def remove_leftovers(folder: epath.PathLike) -> None:
    """Removes what runs that were killed left half-written in a folder of this machine's.

    To be called where nobody else is writing there.
    """
    for parent, _, names in [] if is_remote(folder) else os.walk(folder):
        for name in names:
            if name.endswith(".tmp"):
                os.unlink(os.path.join(parent, name))


def cache() -> Path:
    """Where this machine keeps what it can get again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensora_jax"


def fetch(folder: epath.PathLike, key: str, names: Iterable[str] | None = None) -> Path:
    """A folder of this machine's with the files of `folder`: an object store's are copied, once.

    Args:
      key: the file by which versions of the folder are told apart.
      names: of the files that are needed; None: all.
    """
    folder = epath.Path(folder)
    if not is_remote(folder):
        return Path(folder)
    version = hashlib.sha256(f"{folder}\n".encode() + (folder / key).read_bytes()).hexdigest()
    copy = cache() / "fetched" / version[:16]
    for path in walk(folder) if names is None else map(folder.joinpath, names):
        _copy(path, copy / path.relative_to(folder))
    return copy


def fetch_file(path: epath.PathLike) -> Path:
    """As `fetch`, of one file; versions are told apart by size and time."""
    path = epath.Path(path)
    if not is_remote(path):
        return Path(path)
    stat = path.stat()
    version = hashlib.sha256(f"{path}\n{stat.length}\n{stat.mtime}".encode()).hexdigest()
    copy = cache() / "fetched" / version[:16] / path.name
    _copy(path, copy)
    return copy


def _copy(path: epath.Path, target: Path) -> None:
    """Copies a file to this machine if it is not there yet."""
    if target.exists():
        return
    logger.info("copying %s to %s", path, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Other processes of this machine may be at the same file.
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    path.copy(temporary, overwrite=True)
    temporary.replace(target)


@contextlib.contextmanager
def _naming(path: epath.Path) -> Iterator[None]:
    """A full disk, say, raises an error that does not tell where."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
