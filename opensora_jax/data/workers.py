"""Calls that may hang or crash, by processes that are ended one by one: `Workers`.

Threads cannot be ended, and `concurrent.futures` gives all its processes up where one dies. These
load only what they need, not the program's main module, and end when this process does.
"""

import contextlib
import multiprocessing.connection
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

_START = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started it
from opensora_jax.data import workers
workers._serve(int(sys.argv[1]), sys.argv[2])
"""
_END_SECONDS = 5.0  # for a process that was killed; one that waits for a disk can take for ever


class Ended(Exception):
    """A call gives no more, since its process had to be ended or crashed.

    Attributes:
      reason: which of the two.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Workers:
    """Processes that call one function, which yields: one for each call under way.

    Args:
      function: it, what it takes (not None) and what it yields are such as can be pickled. Arrays
        are not copied for that.
      seconds: that a call may take, not counted while nobody waits for what it yields next; None:
        any number.
    """

    def __init__(self, function: Callable[[Any], Iterator[Any]], seconds: float | None):
        self._function, self._seconds = function, seconds
        self._idle: list[_Worker] = []
        self._workers: set[_Worker] = set()
        self._is_closed, self._lock = False, threading.Lock()

    def __call__(self, item: Any) -> Iterator[Any]:
        """Yields what the function yields, which goes on to the next value when that is asked for.

        Raises:
          Ended: no more, after too long, or its process died. Others are not touched.
          OSError: what the function raised, or a process that cannot be started.
          RuntimeError: another error in the function, with its traceback.
        """
        worker, is_over, spent = self._take(), False, 0.0
        try:
            while not is_over:
                begin = time.monotonic()
                error, values = worker.call(item, self._seconds, spent)
                spent += time.monotonic() - begin
                item, is_over = None, not values
                yield from values
        finally:
            if is_over:
                self._idle.append(worker)
            else:  # also where nobody wants the rest
                self._end(worker)
        if error is not None:
            raise error

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends all processes; calls under way are `Ended`."""
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        for worker in workers:
            self._end(worker)

    def _take(self) -> "_Worker":
        with contextlib.suppress(IndexError):
            return self._idle.pop()
        with self._lock:
            if self._is_closed:
                raise Ended("closed")
            worker = _Worker()
            self._workers.add(worker)
        try:
            worker.call(self._function, None)
        except Ended as error:
            self._end(worker)
            if self._is_closed:
                raise
            raise OSError(f"a process for decoding cannot be started: {error.reason}") from None
        return worker

    def _end(self, worker: "_Worker") -> None:
        worker.end()
        with self._lock:
            self._workers.discard(worker)


class _Worker:
    """A process that is sent a function, then items, and after each value None for the next."""

    def __init__(self):
        self._folder = tempfile.mkdtemp()  # what it leaves there when it is ended goes with it
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno()), self._folder],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "TMPDIR": self._folder,
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )
        self._file = self._socket.makefile("rwb")

    def call(
        self, item: Any, seconds: float | None, spent: float = 0.0
    ) -> tuple[Exception | None, list[Any]]:
        """(what was raised, the next value); if there is none, the call is over.

        Args:
          spent: of these seconds.
        """
        left = None if seconds is None else max(seconds - spent, 0)
        try:
            _send(self._file, item)
            if not multiprocessing.connection.wait([self._socket], left):
                raise Ended(f"not decoded after {seconds:g} seconds")
            return _receive(self._file)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise Ended(self._status()) from None

    def end(self) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # whoever waits for it waits no more
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _status(self) -> str:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "its decoder closed the connection"
        if status < 0:
            return f"its decoder crashed: {signal.Signals(-status).name}"
        return f"its decoder ended with status {status}"


def _serve(number: int, folder: str) -> None:
    """What the process does.

    Args:
      number: of the file descriptor of its socket.
      folder: of its temporary files.
    """
    file = socket.socket(fileno=number).makefile("rwb")
    received: queue.SimpleQueue = queue.SimpleQueue()

    def receive() -> None:
        while True:
            try:
                received.put(_receive(file))
            except BaseException:
                # Nobody waits for an answer any more, whatever this is at.
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)

    function = _receive(file)
    _send(file, (None, []))
    threading.Thread(target=receive, daemon=True).start()
    while True:
        item = received.get()
        try:
            for value in function(item):
                _send(file, (None, [value]))
                received.get()
            answer = None, []
        except OSError as error:
            said = (str(error),)
            if error.errno is not None:
                said = (error.errno, error.strerror, error.filename)
            answer = OSError(*said), []
        except Exception:
            answer = RuntimeError(traceback.format_exc()), []
        _send(file, answer)


def _send(file: BinaryIO, value: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    body = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    pickle.dump([array.nbytes for array in arrays], file)
    for array in arrays:
        file.write(array)
    file.write(body)
    file.flush()


def _receive(file: BinaryIO) -> Any:
    arrays = [np.empty(n, np.uint8) for n in pickle.load(file)]
    for array in arrays:
        if file.readinto(array) < array.nbytes:
            raise EOFError
    return pickle.load(file, buffers=arrays)
