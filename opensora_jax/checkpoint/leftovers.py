"""Removing checkpoints: old ones, and what runs that were killed left of them."""

import logging

import orbax.checkpoint as ocp
from etils import epath

from opensora_jax import files

logger = logging.getLogger(__name__)

# In the names of those that Orbax has not ended, nor we to remove.
TEMPORARY = ".orbax-checkpoint-tmp"


def remove(path: epath.Path) -> None:
    """Removes a whole checkpoint; interrupted, it leaves none that looks like one."""
    if not files.is_remote(path):
        path = path.rename(path.with_name(f"{path.name}{TEMPORARY}-removed"))
    path.rmtree(missing_ok=True)


def remove_half_written(folder: epath.Path) -> None:
    """Removes what runs that were killed left half-written, or half-removed, in `folder`."""
    # Object stores have no empty folders.
    for path in folder.iterdir() if folder.exists() else ():
        # On object stores they have their names from the start, and a file when they are whole.
        is_step = path.name.isdigit() and not ocp.utils.is_checkpoint_finalized(path)
        if TEMPORARY in path.name or is_step:
            logger.warning("%s: a half-written checkpoint; removed", path)
            path.rmtree()
