"""The one table of the stages that a configuration can list."""

import dataclasses
import importlib
from collections.abc import Mapping

from etils import epath
from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of what `main` does.

    Attributes:
      module: holds its `run(config, workdir)`. Imported only to run it: these imports take seconds.
      remote: whether it can write to an object store.
      processes: whether several processes can run it together.
    """

    module: str
    remote: bool = False
    processes: bool = False

    def run(self, config: ConfigDict, workdir: epath.Path) -> None:
        importlib.import_module(self.module).run(config, workdir)


# In the order in which they can run.
STAGES: Mapping[str, Stage] = {
    "shapes": Stage("opensora_jax.stages.shapes"),
    "vqvae": Stage("opensora_jax.stages.vqvae", remote=True, processes=True),
    "preprocess": Stage("opensora_jax.stages.preprocess"),
    "dit": Stage("opensora_jax.stages.dit", remote=True, processes=True),
    "fidelity": Stage("opensora_jax.stages.fidelity"),
    "report": Stage("opensora_jax.stages.report"),
}
