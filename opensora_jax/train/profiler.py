"""A trace of some steps: what the host and the devices did, and when."""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

logger = logging.getLogger(__name__)


class Profiler:
    """Traces some steps into `folder`/profile, every process into files of its own.

    The first step that a run takes is left out, because it is compiled then; a trace of a run that
    ends early is of the steps until there.

    Args:
      steps: the first and the last to trace; empty: none.
      done: how many steps the training had taken before this run.
    """

    def __init__(self, folder: epath.PathLike, steps: Sequence[int], done: int):
        first, last = steps or (0, 0)
        self._steps = range(max(first, done + 2), last + 1)
        # XProf calls the folder a run, and lists its files as the run's hosts.
        run = f"steps{first}-{last}"
        self._folder = epath.Path(folder) / "profile" / "plugins" / "profile" / run
        self._temporary: tempfile.TemporaryDirectory | None = None
        if done < last and not self._steps:
            logger.warning("profile=%s: no trace: step %d is the first of this run", steps, last)

    def start_before(self, step: int) -> None:
        """To be called before each step."""
        if self._steps and step == self._steps[0]:
            # An object store is nothing that JAX writes to.
            self._temporary = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._temporary.name)

    def stop_after(self, step: int, results: Any) -> None:
        """To be called after each step, with arrays that it computes."""
        if self._temporary is not None and step == self._steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if a trace is being taken."""
        if self._temporary is None:
            return
        with self._temporary as written:
            self._temporary = None
            jax.profiler.stop_trace()
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in filter(Path.is_file, Path(written).rglob("*")):
                target = self._folder / f"process{jax.process_index()}.{path.name}"
                copy = target.with_name(target.name + ".tmp")
                copy.write_bytes(path.read_bytes())
                copy.replace(target)
        logger.info("a trace: %s", self._folder)
