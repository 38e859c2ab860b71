"""Reading ranges of files where they are, on a disk or in an object store, with patience."""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn

logger = logging.getLogger(__name__)

# Seconds from the first try of something on after which it is not tried again.
PATIENCE = 180.0
# Seconds after which a try without an answer has failed.
TIMEOUT = 60.0
# Seconds between two tries: at first, and at most. Each is varied, as many machines ask at once.
PAUSE, LONGEST_PAUSE = 0.2, 30.0
# Seconds between two lines in the log that tell of failures.
_QUIET = 10.0

# Characters of an error of another library that ours repeat.
_MOST_WORDS = 300

# By itself it opens ten connections, and lets all but ten requests wait.
_OPTIONS = {"s3": {"config_kwargs": {"max_pool_connections": 64}}}

# What the next try would not change.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Store:
    """Files below an address, such as gs://bucket/folder or a folder of this machine's.

    Any number of threads may use it. What one of them has given up all have.

    Attributes:
      n_retries: how many tries failed.
    """

    def __init__(self, address: str):
        protocol, found, path = address.partition("://")
        if not found:
            protocol, path = "file", str(Path(address).absolute())
        # As `epath` calls them.
        self._fs = fsspec.filesystem(
            {"gs": "gcs"}.get(protocol, protocol), **_OPTIONS.get(protocol, {})
        )
        self._path, self.address = path.rstrip("/"), address.rstrip("/")
        self._lock, self._failure = threading.Lock(), None
        self._given_up = threading.Event()
        self._next_line = 0.0
        self.n_retries = 0

    def close(self) -> None:
        """Nothing more is read, and nothing tried again, which a process would wait for as it
        ends."""
        self._failure = f"{self.address}: closed"
        self._given_up.set()

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
          OSError: as `read`.
        """
        return self._patiently(name, lambda path: self._ask("info", path)["size"])

    def read(self, name: str, start: int, n_bytes: int) -> bytes:
        """`n_bytes` of a file from `start` on.

        Raises:
          OSError: there is no such file or range, or `PATIENCE` is over; the message names the
            address.
        """

        def ask(path: str) -> bytes:
            data = self._ask("cat_file", path, start=start, end=start + n_bytes)
            if len(data) != n_bytes:
                raise OSError(f"{len(data)} bytes from {start} on: expected {n_bytes}")
            return data

        return self._patiently(name, ask)

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*args, **options)

        async def answer():
            asked = getattr(self._fs, f"_{method}")(*args, **options)
            return await asyncio.wait_for(asked, TIMEOUT)

        return fsspec.asyn.sync(self._fs.loop, answer)

    def _patiently(self, name: str, ask: Callable[[str], Any]) -> Any:
        start, n_tries, pause = time.monotonic(), 0, PAUSE
        while True:
            if self._given_up.is_set():
                raise OSError(self._failure)
            n_tries += 1
            try:
                return ask(f"{self._path}/{name}")
            except _FINAL as error:
                raise type(error)(f"{self.address}/{name}: {_words(error)}") from None
            except Exception as error:  # each store's library has its own kinds
                seconds = time.monotonic() - start
                if seconds + pause > PATIENCE:
                    self._failure = (
                        f"{self.address}/{name}: cannot be read: {_words(error)}; tried {n_tries} "
                        f"times in {seconds:.0f} s"
                    )
                    self._given_up.set()
                    raise OSError(self._failure) from None
                self._tell(name, error)
            self._given_up.wait(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, name: str, error: Exception) -> None:
        with self._lock:
            self.n_retries += 1
            if time.monotonic() < self._next_line:
                return
            self._next_line = time.monotonic() + _QUIET
        logger.warning("%s/%s: %s; trying again", self.address, name, _words(error))


def _words(error: Exception) -> str:
    """What an error says, in one line; some say nothing but their kind."""
    return " ".join(str(error).split())[:_MOST_WORDS] or type(error).__name__
