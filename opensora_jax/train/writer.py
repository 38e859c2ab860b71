"""Where a training writes what it measures: metrics.jsonl and TensorBoard."""

import json
import logging
from collections.abc import Mapping

import jax
from etils import epath
from tensorboardX import SummaryWriter

from opensora_jax import files

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Appends one JSON object a log step to `folder`/metrics.jsonl, and the same to TensorBoard.

    On resuming at `step`, lines of later steps, which the interrupted run wrote after its last
    checkpoint, are dropped: they will be written again. Only process 0 writes.
    """

    def __init__(self, folder: epath.PathLike, step: int):
        self._is_writer, self._known = jax.process_index() == 0, set()
        if not self._is_writer:
            return
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        lines = [m for m in read_metrics(self._path) if m["step"] <= step]
        files.write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        self._known = {(line["step"], name) for line in lines for name in line}
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def has(self, step: int, name: str) -> bool:
        """Whether a run before this one wrote metric `name` at `step`; process 0 knows."""
        return (step, name) in self._known

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._is_writer:
            return
        files.append_text(self._path, json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if not self._is_writer:
            return
        try:
            self._tensorboard.close()
        except OSError as error:  # no reason to stop, and not to hide one there may be
            logger.warning("%s: TensorBoard's logs are not complete: %s", self._path.parent, error)


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl, in order; a last line cut off by a kill is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.endswith("}")]
