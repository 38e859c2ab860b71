"""Where a training writes what it measures: metrics.jsonl and TensorBoard."""

import io
import json
import logging
import os
import socket
import time
from collections.abc import Mapping

import jax
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

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
        line = json.dumps({"step": step, **metrics}) + "\n"
        files.append(self._path, line.encode())
        self._tensorboard.write(step, metrics)


class _TensorBoard:
    """A file of TensorBoard's events, written at once: a thread of its writers', once it could not
    write, would let the training wait for it for ever.

    What cannot be written is told and left out: metrics.jsonl has it, too.
    """

    def __init__(self, folder: epath.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads what is named so, in the order of the times.
        run = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path, self._ended = folder / f"events.out.tfevents.{run}", False
        self._path.write_bytes(b"")
        # What there is of later steps, of a run before this one, is not to be shown.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(session_log=start, step=step + 1))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(summary=Summary(value=values), step=step))

    def _write(self, *events: Event) -> None:
        if self._ended:
            return
        data = io.BytesIO()
        records = RecordWriter(data)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        try:
            files.append(self._path, data.getvalue())
        except OSError as error:
            logger.warning("%s: TensorBoard's logs end here: %s", self._path.parent, error)
            self._ended = True


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl, in order; a last line cut off by a kill is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line.endswith("}")]
