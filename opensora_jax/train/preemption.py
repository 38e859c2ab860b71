"""Being told to stop while training: after a step, with the state saved.

In one process `process` listens. With several JAX listens for SIGTERM instead, and all stop after
the same step; Ctrl-C in one of them is passed on to it as a SIGTERM.
"""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from opensora_jax import process


@contextlib.contextmanager
def deferred(name: str) -> Iterator[None]:
    """Signals stop the training `name` only where `check` and `interruptible` are.

    Raises:
      Stopped: from there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
    elif jax.process_count() == 1:
        with process.deferred(name):
            yield
    else:
        with process.deferred(name, (signal.SIGINT,)):
            yield


# JAX agrees on the number of the call after which all stop, and counts from 1 in each process that
# starts: a step's number, of a training that goes on, would never be the one that is agreed on.
_calls = itertools.count(1)


def check() -> None:
    """To be called after each step, by all processes equally often.

    Raises:
      Stopped: it is time to stop.
    """
    if jax.process_count() == 1:
        process.check()
        return
    if process.received() is not None:
        os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the others of
    if multihost_utils.reached_preemption_sync_point(next(_calls)):
        process.stop(process.received() or signal.SIGTERM)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """Around what may be broken off anywhere, and can take long: raises `Stopped` at once.

    Not with several processes, where it would be in one of them alone.
    """
    return process.interruptible() if jax.process_count() == 1 else contextlib.nullcontext()
