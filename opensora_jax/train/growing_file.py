"""Logs that grow while a training runs, on disks and on object stores."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from opensora_jax import files

# From one piece to the next, at least.
PIECE_SECONDS = 60.0

_DIGITS = 6


class GrowingFile:
    """A file to whose end lines or records are added: on a disk at once.

    An object store cannot append, and writing all of a log again with every line would take the
    longer the more there is. There the new lines gather, and once a minute a thread writes them as
    an object of their own, the next of the file's `pieces`.
    """

    def __init__(self, path: epath.PathLike):
        self._path, self._is_remote = epath.Path(path), files.is_remote(path)
        self._gathered: list[bytes] = []
        self._n_pieces, self._next_piece = 0, 0.0
        self._thread, self._writing = ThreadPoolExecutor(1), None

    def append(self, data: bytes) -> None:
        """Adds whole lines or records.

        Raises:
          OSError: they, or what came before them, could not be written.
        """
        if not self._is_remote:
            files.append(self._path, data)
            return
        self._gathered.append(data)
        if time.monotonic() >= self._next_piece and (not self._writing or self._writing.done()):
            self._start_piece()

    def flush(self) -> None:
        """Waits until all is written.

        Raises:
          OSError: it could not be.
        """
        if self._gathered:
            self._start_piece()
        self._wait()
        if self._path.exists():
            files.sync(self._path)

    def _start_piece(self) -> None:
        self._wait()
        self._n_pieces += 1
        data, self._gathered = b"".join(self._gathered), []
        self._writing = self._thread.submit(self._piece(self._n_pieces).write_bytes, data)
        self._next_piece = time.monotonic() + PIECE_SECONDS

    def _wait(self) -> None:
        if self._writing:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                raise OSError(f"{self._path}: could not be written: {error}") from error

    def _piece(self, number: int) -> epath.Path:
        return self._path.with_name(f"{self._path.stem}-{number:0{_DIGITS}d}{self._path.suffix}")


def pieces(path: epath.PathLike) -> list[epath.Path]:
    """What a `GrowingFile` wrote beside `path`, whose folder is there, in order."""
    path = epath.Path(path)
    name = rf"{re.escape(path.stem)}-\d{{{_DIGITS}}}{re.escape(path.suffix)}"
    return sorted(piece for piece in path.parent.iterdir() if re.fullmatch(name, piece.name))
