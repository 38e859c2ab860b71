"""What a command sets up before it touches devices: processes, logs, compiled programs."""

import glob
import logging
import os
import secrets
import urllib.error
import urllib.request

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath
from jax.experimental import multihost_utils

from opensora_jax import coordinator, files, peers

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

_LONGEST_TEXT = 400  # bytes


def start() -> None:
    """Joins the other processes, if there are any, sets up logs, and keeps compiled programs."""
    logging.basicConfig(
        format="%(levelname).1s%(asctime)s %(filename)s:%(lineno)d] %(message)s",
        datefmt="%m%d %H:%M:%S",
    )
    # Ours speak, in one process; Orbax and JAX only when something is wrong.
    absl_logging.set_verbosity(absl_logging.WARNING)
    if n_processes() > 1:
        _join_processes()
    level = logging.INFO if jax.process_index() == 0 else logging.ERROR
    logging.getLogger("opensora_jax").setLevel(level)
    keep_compiled_programs()


def keep_compiled_programs() -> None:
    """Lets later runs of the same programs start without compiling them."""
    if jax.config.jax_compilation_cache_dir is None:  # JAX_COMPILATION_CACHE_DIR names another
        jax.config.update("jax_compilation_cache_dir", str(files.cache() / "compiled"))


def _join_processes() -> None:
    """`jax.distributed.initialize`, which finds what is not given here in the cluster itself."""
    given = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    # Who is dead is found out by `peers`, sooner and in one line.
    with coordinator.apart():
        jax.distributed.initialize(
            **{name: int(os.environ[key]) for name, key in given.items() if key in os.environ},
            heartbeat_timeout_seconds=300,
        )
    peers.watch()


def expect_shared(folder: epath.Path) -> None:
    """Stops every process if one does not see what the first writes to the workdir, which exists.

    Raises:
      ValueError: naming those that do not.
    """
    if jax.process_count() == 1:
        return
    is_first = jax.process_index() == 0
    # A new name: network file systems remember for a while what was not there.
    name = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31)))
    mark = folder / f".seen-{name}"
    if is_first:
        mark.touch()
    multihost_utils.sync_global_devices("workdir")
    sees = multihost_utils.process_allgather(np.array(mark.exists()))
    if is_first:
        mark.unlink()
    if not sees.all():
        blind = ", ".join(map(str, np.flatnonzero(~sees)))
        raise ValueError(
            f"--workdir={folder}: process {blind} does not see what process 0 writes there; "
            "expected one folder for all: gs://, or on a file system that the hosts share"
        )


def first_text(text: str | None) -> str | None:
    """Of the texts that processes have, a problem of theirs say, the first one's, in all of them.

    To be called by all together. Of a long text the beginning passes from one to another.
    """
    if jax.process_count() == 1:
        return text
    mine = (text or "").encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(mine, np.uint8))
    texts = (row.tobytes().rstrip(b"\0") for row in rows)
    first = next((text for text in texts if text), None)
    return None if first is None else first.decode(errors="replace")


def n_processes() -> int:
    """How many processes the environment says this run has: JAX_NUM_PROCESSES (beside
    JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID), Slurm, Open MPI or a TPU pod."""
    for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    platforms = jax.config.jax_platforms or "tpu"
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return n_tpu_hosts() if chips and "tpu" in platforms else 1


def n_tpu_hosts() -> int:
    """How many hosts a TPU pod has: the environment says it, or the metadata of a Cloud TPU VM."""
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES", 1))
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts is None:
        request = urllib.request.Request(
            _METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
        )
        try:
            hosts = urllib.request.urlopen(request, timeout=5).read().decode()
        except (urllib.error.URLError, TimeoutError):  # not on Google's cloud: one host
            hosts = ""
    return slices * len(hosts.split(","))
