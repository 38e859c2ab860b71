"""Being told to stop: SIGTERM, as clusters send it before they take a machine away."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """Ends the program with exit status 0."""

    def __init__(self):
        super().__init__(0)


class Preemption:
    """Listens for SIGTERM while it is entered, and raises `Preempted` where it is safe to stop.

    With several processes JAX listens instead, and all stop after the same step.

    Args:
      name: of what is stopped, for the log.
    """

    def __init__(self, name: str):
        self._name = name
        self._received = self._interruptible = False

    def __enter__(self) -> "Preemption":
        self._listens = (
            jax.process_count() == 1 and threading.current_thread() is threading.main_thread()
        )
        if self._listens:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._previous)
        if kind is Preempted:
            logger.warning("%s: stopped by SIGTERM; the same command goes on from here", self._name)

    def _receive(self, signum, frame):
        self._received = True
        if self._interruptible:
            raise Preempted

    def check(self, step: int) -> None:
        """To be called after each step.

        Raises:
          Preempted: it is time to stop.
        """
        several = jax.process_count() > 1
        if multihost_utils.reached_preemption_sync_point(step) if several else self._received:
            raise Preempted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Around what may be broken off anywhere, and can take long: raises `Preempted` at once."""
        self._interruptible = True
        try:
            if self._received:
                raise Preempted
            yield
        finally:
            self._interruptible = False
