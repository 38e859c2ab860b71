"""The service by which the processes of a run know of each other, in a process of its own.

JAX keeps it in the first process. When that is killed, the service goes with it, and JAX's client
ends the others at once, in a page of words that name nobody. Apart, it outlives the first process
for as long as the others need to see that it is gone, and to say so in one line (`peers`).

This file is also the program of that process, which needs jaxlib alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# How long the service stays when the first process is gone; longer than others take to see it.
LINGER_SECONDS = 60.0
_READY, _END = "ready\n", "end"


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Around `jax.distributed.initialize`: in the first process, the service is not in it."""
    import jax

    # JAX has no public way to start its service elsewhere.
    library = jax._src.distributed._jax
    make = library.get_distributed_runtime_service

    def make_apart(address: str, *args: Any, **options: Any) -> Any:
        try:
            return _Service(address, *args, **options)
        except OSError:
            return make(address, *args, **options)

    library.get_distributed_runtime_service = make_apart
    try:
        yield
    finally:
        library.get_distributed_runtime_service = make


class _Service:
    """Of the first process: it ends the service, or leaves it behind.

    Raises:
      OSError: it did not start.
    """

    def __init__(self, address: str, *args: Any, **options: Any):
        mark = Path(tempfile.gettempdir()) / f"opensora_jax-service-{address.rpartition(':')[2]}"
        _end_older(mark)
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps([[address, *args], options])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
            text=True,
        )
        if self._process.stdout.readline() != _READY:
            self._process.kill()
            raise OSError(f"{address}: the service did not start")
        with contextlib.suppress(OSError):
            mark.write_text(str(self._process.pid))

    def shutdown(self) -> None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(_END, timeout=10)
        self._process.kill()


def _end_older(mark: Path) -> None:
    """Ends the service that a first process before this one left behind: its address is wanted."""
    try:
        pid = int(mark.read_text())
        if __file__.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
            while Path(f"/proc/{pid}/cmdline").read_bytes():
                time.sleep(0.01)
    except (OSError, ValueError):
        pass  # there is none


def _serve(args: list, options: dict[str, Any]) -> None:
    from jaxlib import _jax

    service = _jax.get_distributed_runtime_service(*args, **options)
    print(_READY, end="", flush=True)
    said = sys.stdin.read()  # until the first process ends
    if said != _END:
        time.sleep(LINGER_SECONDS)
    service.shutdown()


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
