"""One run at a time in a folder.

On a disk the operating system holds the lock and lets go of it when the process ends, however it
ends. An object store has none: there the run keeps an object in the folder and renews it every few
seconds; one that is not renewed any more belongs to a run that is dead.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
from etils import epath

from opensora_jax import files, runtime

logger = logging.getLogger(__name__)

# The lock, and who holds it: to take the lock empties its file.
LOCK, OWNER = ".lock", ".owner.json"
LEASE = ".lease.json"
RENEW_SECONDS = 5.0
# Not renewed for so long, a lease is a dead run's.
DEAD_SECONDS = 30.0


class FolderInUse(OSError):
    """Another run is at work in the folder; the message says which."""


@contextlib.contextmanager
def exclusive(folder: epath.PathLike) -> Iterator[None]:
    """Holds `folder`, which is there, for this run; all its processes enter together.

    Raises:
      FolderInUse: another run holds it.
    """
    folder = epath.Path(folder)
    with contextlib.ExitStack() as held:
        problem = None
        if jax.process_index() == 0:
            try:
                hold = _hold_lease if files.is_remote(folder) else _hold_lock
                held.enter_context(hold(folder))
            except FolderInUse as error:
                problem = str(error)
        problem = runtime.first_text(problem)
        if problem is not None:
            raise FolderInUse(problem)
        yield


def _owner() -> dict[str, Any]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "start": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def _in_use(folder: epath.Path, owner: Any) -> FolderInUse:
    who = "another run"
    if isinstance(owner, dict) and {"process", "host", "start"} <= owner.keys():
        who = "process {process} on {host}, started {start}".format(**owner)
    return FolderInUse(
        f"{folder}: in use by {who}: expected one run at a time; end it or wait for it, or use "
        "another folder"
    )


@contextlib.contextmanager
def _hold_lock(folder: epath.Path) -> Iterator[None]:
    lock = filelock.FileLock(Path(folder) / LOCK, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise _in_use(folder, _read(folder / OWNER)) from None
    except NotImplementedError:
        logger.warning(
            "%s: this file system has no locks: see that one run at a time uses it", folder
        )
        yield
        return
    try:
        files.write_json(folder / OWNER, _owner())
        yield
        (folder / OWNER).unlink(missing_ok=True)
    finally:
        lock.release()


@contextlib.contextmanager
def _hold_lease(folder: epath.Path) -> Iterator[None]:
    path, me = folder / LEASE, {**_owner(), "id": secrets.token_hex(8)}
    _wait_for_death(folder)
    _renew(path, me)
    time.sleep(RENEW_SECONDS)  # of two that begin at once, the later one's stays
    found = _read(path)
    if not _is(found, me):
        raise _in_use(folder, found)
    ended = threading.Event()
    renewing = threading.Thread(target=_keep_renewing, args=(path, me, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if _is(_read(path), me):
            path.unlink(missing_ok=True)


def _wait_for_death(folder: epath.Path) -> None:
    """Returns once the lease there is, if any, is not renewed; clocks are not compared."""
    before = _read(folder / LEASE)
    if before is None:
        return
    logger.warning("%s: a lease of another run; waiting to see whether it lives", folder)
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(DEAD_SECONDS / 30)
        now = _read(folder / LEASE)
        if now is None:
            return
        if now != before:
            raise _in_use(folder, now)


def _keep_renewing(path: epath.Path, me: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(RENEW_SECONDS):
        try:
            found = _read(path)
            if found is not None and not _is(found, me):
                # This process stood still for so long that it was taken for dead.
                print(f"error: {_in_use(path.parent, found)}", file=sys.stderr, flush=True)
                os._exit(1)
            _renew(path, me)
        except OSError as error:
            logger.warning("%s: could not be renewed: %s", path, error)


def _renew(path: epath.Path, me: dict[str, Any]) -> None:
    path.write_text(json.dumps({**me, "renewed": time.time()}))


def _is(found: Any, me: dict[str, Any]) -> bool:
    return isinstance(found, dict) and found.get("id") == me["id"]


def _read(path: epath.Path) -> Any:
    """What the file says; None: there is none, False: nothing that can be read."""
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return None
    except ValueError:
        return False
