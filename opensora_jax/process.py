"""What a command sets up before its imports, which take seconds: signals, and memory pages.

SIGTERM, as clusters send it before they take a machine away, ends a command with exit status 0 and
Ctrl-C with 130: at once, or where a training has `deferred` them, after its state is saved. The
second Ctrl-C always ends it at once.
"""

import _thread
import contextlib
import logging
import os
import platform
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# A main thread that compiles, say, does not see a signal; after so long it is not waited for.
GRACE_SECONDS = 8.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_WAIT_SECONDS = 0.1

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_HUGE_PAGES_SETTING = "glibc.malloc.hugetlb"


class Stopped(SystemExit):
    """Ends the program with the exit status that `signum` has."""

    def __init__(self, signum: int):
        super().__init__(_status(signum))
        self.signum = signum


def start() -> None:
    """To be called by a command's main module before anything else is imported."""
    use_huge_pages()
    listen()


def use_huge_pages() -> None:
    """Starts the command over with huge pages behind what it allocates, where it has to ask.

    A train step on a CPU allocates its gigabytes anew each time, and to enter them page by page
    takes a quarter of it (docs/performance.md). The C library reads the setting when a process
    starts, so this comes before anything else.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    asks = _HUGE_PAGES.exists() and "[madvise]" in _HUGE_PAGES.read_text()
    if not asks or platform.libc_ver()[0] != "glibc" or _HUGE_PAGES_SETTING in given:
        return
    os.environ["GLIBC_TUNABLES"] = f"{given}:{_HUGE_PAGES_SETTING}=1".removeprefix(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class _State:
    """Of the signals that came, and of what the main thread is at."""

    received: int | None = None
    received_at = 0.0  # by time.monotonic
    name = ""  # of what is stopped, for the line that says so
    is_deferred = False
    told = False
    is_lost = False  # whether an exception that was to stop the program did not


def listen() -> None:
    """Handles SIGTERM and SIGINT from here on, in the main thread and beside it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in _SIGNALS:
        signal.signal(number, _handle)
    sys.unraisablehook = _noting_lost(sys.unraisablehook)
    threading.Thread(target=_watch, args=(read,), daemon=True).start()


@contextlib.contextmanager
def deferred(name: str, signals: tuple[int, ...] = _SIGNALS) -> Iterator[None]:
    """Within, signals are kept until `check` is called or `interruptible` entered.

    To be entered in the main thread: others get no signals.

    Args:
      name: of what is stopped, for the log.
      signals: that are handled here; others are as they were.
    """
    previous = _State.name, _State.is_deferred
    # One whose exception was lost was told of, and comes again.
    _State.received, _State.told = None, _State.is_lost
    handlers = {number: signal.signal(number, _handle) for number in signals}
    _State.name, _State.is_deferred = name, True
    try:
        yield
    finally:
        _State.name, _State.is_deferred = previous
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around what may be broken off anywhere, and can take long: raises `Stopped` at once."""
    was_deferred, _State.is_deferred = _State.is_deferred, False
    try:
        check()
        yield
    finally:
        _State.is_deferred = was_deferred


def received() -> int | None:
    """The signal that came, if one did."""
    return _State.received


def seconds_since_signal() -> float:
    """How long ago the last one came; 0 where none did."""
    return time.monotonic() - _State.received_at if _State.received_at else 0.0


def check() -> None:
    """Raises `Stopped` if a signal came."""
    if _State.received is not None:
        stop(_State.received)


def stop(signum: int) -> None:
    """Says that it is one signal or the other that ends the command, and raises `Stopped`."""
    if not _State.told:
        _State.told = True
        what = f"{_State.name}: " if _State.name else ""
        name = signal.Signals(signum).name
        logger.warning("%sstopped by %s; the same command goes on from here", what, name)
    raise Stopped(signum)


def _handle(signum: int, frame: FrameType | None) -> None:
    _State.received, _State.received_at = signum, time.monotonic()
    if not _State.is_deferred:
        stop(signum)


def _noting_lost(hook: Callable[[Any], Any]) -> Callable[[Any], None]:
    """An unraisablehook: of exceptions that nobody can catch, as in garbage collection."""

    def note(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Stopped):
            _State.is_lost = True
        else:
            hook(unraisable)

    return note


def _watch(pipe: int) -> None:
    """Ends the process where the main thread cannot."""
    signum, n_interrupts, n_echoes, stuck = None, 0, 0, 0.0
    while True:
        ready, _, _ = select.select([pipe], [], [], None if signum is None else _WAIT_SECONDS)
        if ready:
            (number,) = os.read(pipe, 1)
            if n_echoes:
                n_echoes -= 1
            elif number in _SIGNALS:
                signum = signum or number
                n_interrupts += number == signal.SIGINT
                if n_interrupts > 1:
                    os._exit(_status(number))
            continue
        # A training that saves its state may take its time.
        stuck = 0.0 if _State.is_deferred else stuck + _WAIT_SECONDS
        if stuck >= GRACE_SECONDS:
            with contextlib.suppress(Stopped):
                stop(signum)
            os._exit(_status(signum))
        if _State.is_lost:
            _State.is_lost, n_echoes = False, n_echoes + 1
            _thread.interrupt_main(signum)


def _status(signum: int) -> int:
    return 0 if signum == signal.SIGTERM else 128 + signum
