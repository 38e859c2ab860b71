"""Watching over the other processes of a run: when one dies or stands still, all end.

A collective waits for a process that is gone for ever, or fails with a page of words that do not
say whom it misses. So each process counts up in the coordinator's store every few seconds, and
looks at what the others count; one that has not counted for long is named in one line, and the
process ends with a status of its own, by which whoever started it knows to start all again.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

BEAT_SECONDS = 2.0
DEAD_SECONDS = 30.0
# Exit status (sysexits' EX_TEMPFAIL): nothing is wrong with this process.
PEER_DIED = 75

_KEY = "opensora_jax/alive"
# What the collectives on CPUs raise, as a ValueError, when a process is gone.
_COLLECTIVES = re.compile("Gloo|Connection (closed|reset) by peer")
# That processes wait for one another in the end: the first may write a report meanwhile.
_END_SECONDS = 3600


class _Watch:
    """Of this process, once it has joined the others."""

    def __init__(self, client: Any):
        self._client = client
        self._me, self._n = jax.process_index(), jax.process_count()
        self._answered = time.monotonic()  # when the coordinator last did
        self._hosts: dict[int, str] = {}
        self._ended = threading.Event()
        self.tell("0")
        self._client.wait_at_barrier("opensora_jax/told", _END_SECONDS * 1000)
        for key, value in self._client.key_value_dir_get(_KEY):
            self._hosts[int(key.rpartition("/")[2])] = value.partition(" ")[0]
        for target in (self._beat, self._look):
            threading.Thread(target=target, daemon=True).start()

    def tell(self, state: str) -> None:
        """Says what this process is at: a count, or why it ends."""
        value = f"{socket.gethostname()} {state}"
        self._client.key_value_set(f"{_KEY}/{self._me}", value, allow_overwrite=True)

    def wait_for_all(self) -> None:
        self._client.wait_at_barrier("opensora_jax/end", _END_SECONDS * 1000)

    def end(self, why: str) -> None:
        """Says to the others why this process ends, and that it watches no more."""
        self._ended.set()
        thread = threading.Thread(target=self._try_to_tell, args=(why,), daemon=True)
        thread.start()
        thread.join(BEAT_SECONDS)

    def _try_to_tell(self, why: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.tell(why)

    def _beat(self) -> None:
        count = 0
        others = set(range(self._n)) - {self._me}
        counted = dict.fromkeys(others, ("", time.monotonic()))
        while not self._ended.wait(BEAT_SECONDS if count else 0):
            count += 1
            try:
                self.tell(str(count))
                found = self._client.key_value_dir_get(_KEY)
            except jax.errors.JaxRuntimeError:
                continue  # `_look` sees that nothing is answered
            now = self._answered = time.monotonic()
            states = {int(key.rpartition("/")[2]): value for key, value in found}
            for other in others:
                state = states.get(other, "").partition(" ")[2]
                if counted[other][0] != state:
                    counted[other] = state, now
                host = self._hosts[other]
                if state.startswith("failed"):
                    _end(f"process {other} on {host} {state}")
                if state != "done" and now - counted[other][1] > DEAD_SECONDS:
                    _end(
                        f"process {other} on {host} has not been heard of for {DEAD_SECONDS:.0f} s"
                    )

    def _look(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if time.monotonic() - self._answered > DEAD_SECONDS:
                _end(f"process 0 on {self._hosts[0]} has not answered for {DEAD_SECONDS:.0f} s")


_watch: _Watch | None = None


def watch() -> None:
    """Begins to watch; to be called once, after `jax.distributed.initialize`."""
    global _watch
    # JAX has no public name for the store that its own libraries use.
    _watch = _Watch(jax._src.distributed.global_state.client)


def done() -> None:
    """This process is about to end as it should; it waits for the others, who need its store."""
    if _watch is not None:
        _watch.wait_for_all()
        _watch.end("done")


def failed(error: BaseException) -> bool:
    """This process is about to end by an error; whether there are others, who are told.

    Where that may come of another's end, which is to be named instead, this waits for it.
    """
    if _watch is None:
        return False
    if isinstance(error, jax.errors.JaxRuntimeError) or _COLLECTIVES.search(str(error)):
        time.sleep(DEAD_SECONDS + 3 * BEAT_SECONDS)
    _watch.end(f"failed: {type(error).__name__}")
    if jax.process_index() == 0:
        time.sleep(3 * BEAT_SECONDS)  # with this process its store goes, from which others know it
    return True


def _end(why: str) -> NoReturn:
    print(
        f"error: {why}: this process ends too; the same command, run on all, goes on from the last "
        "checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(PEER_DIED)
