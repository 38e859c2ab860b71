"""Where a training writes what it measures: metrics.jsonl and TensorBoard."""

import json
import logging
import time
from collections.abc import Mapping

import jax
from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import directory_check

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
        self._tensorboard = _TensorBoard(folder / "tensorboard", step)

    def has(self, step: int, name: str) -> bool:
        """Whether a run before this one wrote metric `name` at `step`; process 0 knows."""
        return (step, name) in self._known

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._is_writer:
            return
        files.append_text(self._path, json.dumps({"step": step, **metrics}) + "\n")
        self._tensorboard.write(step, metrics)

    def close(self) -> None:
        if self._is_writer:
            self._tensorboard.close()


class _TensorBoard:
    """A file of TensorBoard's events, written at once: SummaryWriter's thread, once it could not
    write, would let the training wait for it for ever.

    What cannot be written is told and left out: metrics.jsonl has it, too.
    """

    def __init__(self, folder: epath.Path, step: int):
        self._folder = folder
        directory_check(str(folder))
        self._events = EventsWriter(str(folder / "events"))
        # What there is of later steps, of a run before this one, is not to be shown.
        self._write(Event(session_log=SessionLog(status=SessionLog.START), step=step + 1))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(summary=Summary(value=values), step=step))

    def _write(self, event: Event) -> None:
        if self._events is None:
            return
        event.wall_time = time.time()
        try:
            self._events.write_event(event)
            self._events.flush()
        except OSError as error:
            logger.warning("%s: TensorBoard's logs end here: %s", self._folder, error)
            self._events = None

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl, in order; a last line cut off by a kill is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.endswith("}")]
