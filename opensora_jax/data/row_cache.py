"""A folder of this machine's that keeps pieces of datasets that lie elsewhere, up to a size.

A piece is a file: what it holds, and a CRC-32 of that. It is written under another name, renamed,
and taken for absent where it is damaged all the same (a power cut). Any number of processes and
threads may share the folder. Pieces of one dataset are in one folder below it.

What is there stays: when the cache is full nothing is added, until a folder of a dataset that
nobody has open makes room. Trainings read all rows in an order that is new in every epoch. If half
of them fit, those that stay are found in half of all cases; to keep the last used ones instead
finds 15%, as most were thrown out before they come again.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# In the folder: the bytes of all pieces, and locked by who changes them; locked by all who use it.
_TOTAL, _USERS = "total", "users"
# In a dataset's folder: locked by all who have it open.
_OPEN = "open"
_CRC = 4  # bytes
_BLOCK = 4096  # bytes, of which disks make files


class RowCache:
    """Pieces of the dataset that is called `name`, by their keys, which are file names.

    Args:
      most_bytes: that all pieces in `folder`, of whatever dataset, take on the disk.

    Attributes:
      n_found, n_missing: how often `get` found a piece, or none.

    Raises:
      OSError: the folder cannot be used.
    """

    def __init__(self, folder: Path, name: str, most_bytes: int):
        self._root, self._most, self._folder = folder, most_bytes, folder / name
        self._thread_lock, self._full = threading.Lock(), False
        self._being_written: set[str] = set()
        self.n_found = self.n_missing = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._total, self._users = _open(folder / _TOTAL), _open(folder / _USERS)
        with self._locked():
            if _is_free(self._users):
                self._write_total(_clean(folder))  # nobody is at it: what was killed is known
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._folder.mkdir(exist_ok=True)
            self._held = _open(self._folder / _OPEN)
            fcntl.flock(self._held, fcntl.LOCK_SH)

    def get(self, key: str, n_bytes: int | None = None) -> memoryview | None:
        """The piece, of `n_bytes` where that is known; None: it is not there."""
        path = self._path(key)
        try:
            data = memoryview(path.read_bytes())
        except OSError:
            self.n_missing += 1
            return None
        whole, crc = data[:-_CRC], data[-_CRC:]
        if n_bytes not in (None, len(whole)) or _crc(whole) != crc:
            self._remove(path, len(data))
            self.n_missing += 1
            return None
        self.n_found += 1
        return whole

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Keeps a piece, if there is room; that it cannot be written is logged and no error."""
        if self._full:
            return
        path, size = self._path(key), _size(len(data) + _CRC)
        with self._locked():
            if key in self._being_written or path.exists():
                return
            total = self._read_total()
            if total + size > self._most:
                total -= self._make_room()
            if total + size > self._most:
                self._full = True
                self._write_total(total)
                return
            self._write_total(total + size)
            self._being_written.add(key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            if not path.parent.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.write(_crc(data))
            temporary.replace(path)
        except OSError as error:
            self._full = True
            logger.warning("%s: nothing more is kept here: %s", self._root, error)
            temporary.unlink(missing_ok=True)
            with self._locked():
                self._write_total(self._read_total() - size)
        finally:
            with self._thread_lock:
                self._being_written.discard(key)

    def _path(self, key: str) -> Path:
        # Not too many files in a folder.
        return self._folder / f"{zlib.crc32(key.encode()) & 0xFF:02x}" / key

    def _remove(self, path: Path, n_bytes: int) -> None:
        with self._locked(), contextlib.suppress(FileNotFoundError):
            path.unlink()
            self._write_total(self._read_total() - _size(n_bytes))

    def _make_room(self) -> int:
        """Removes datasets that nobody has open; returns the bytes of what they held."""
        removed = 0
        for folder in _datasets(self._root):
            with _open(folder / _OPEN) as opened:
                if folder != self._folder and _is_free(opened):
                    logger.info("%s: removed, to make room", folder)
                    removed += sum(size for _, size in _pieces(folder))
                    shutil.rmtree(folder, ignore_errors=True)
        return removed

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Of all threads and processes only this one changes the total."""
        with self._thread_lock:
            fcntl.flock(self._total, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._total, fcntl.LOCK_UN)

    def _read_total(self) -> int:
        return int.from_bytes(os.pread(self._total.fileno(), 8, 0), "little")

    def _write_total(self, n_bytes: int) -> None:
        os.pwrite(self._total.fileno(), max(n_bytes, 0).to_bytes(8, "little"), 0)


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)


def _is_free(opened: IO[bytes]) -> bool:
    """Whether nobody else has locked a file, which is then locked."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _datasets(root: Path) -> list[Path]:
    """The folders of datasets, which alone are ours, whatever else is there."""
    return sorted(path.parent for path in root.glob(f"*/{_OPEN}"))


def _clean(root: Path) -> int:
    """Removes what was left half-written; returns the bytes of what is whole."""
    total = 0
    for folder in _datasets(root):
        for path, size in _pieces(folder):
            if path.endswith(".tmp"):
                os.unlink(path)
            else:
                total += size
    return total


def _pieces(folder: Path) -> Iterator[tuple[str, int]]:
    """The files of a dataset's pieces, and what they take on the disk."""
    for below in filter(Path.is_dir, folder.iterdir()):
        with os.scandir(below) as found:
            for entry in found:
                yield entry.path, _size(entry.stat().st_size)


def _size(n_bytes: int) -> int:
    return -(-n_bytes // _BLOCK) * _BLOCK


def _crc(data: bytes | memoryview) -> bytes:
    return zlib.crc32(data).to_bytes(_CRC, "little")
