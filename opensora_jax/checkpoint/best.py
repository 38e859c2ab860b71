"""The best that a training has had so far, beside its last checkpoints."""

from collections.abc import Mapping

from etils import epath

from opensora_jax.checkpoint.manager import BEST, Checkpoints
from opensora_jax.mesh import PyTree


class Best:
    """What had the lowest validation loss so far, under `folder`/best."""

    def __init__(self, folder: epath.PathLike):
        self._checkpoints = Checkpoints(folder, name=BEST, keep=1, may_start_over=True)
        self._loss = float("inf")
        if self._checkpoints.latest_step is not None:
            self._loss = self._checkpoints.notes()["validation_loss"]

    def save_if_better(self, step: int, loss: float, items: Mapping[str, PyTree]) -> None:
        """Starts writing `items` if their loss is lower.

        Raises:
          OSError: these, or the ones before them in the background, could not be written.
        """
        if loss < self._loss:
            self._loss = loss
            # Numbered, because a run that goes on from an earlier step comes by the same steps.
            number = (self._checkpoints.latest_step or 0) + 1
            notes = {"step": step, "validation_loss": loss}
            self._checkpoints.save(step, items, notes, number=number)

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
          OSError: it could not be written.
        """
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpoints.close()
