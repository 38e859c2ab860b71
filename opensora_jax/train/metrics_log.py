"""Where a training writes what it measures: metrics.jsonl and TensorBoard."""

import io
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from opensora_jax import files
from opensora_jax.train.growing_file import GrowingFile, pieces

logger = logging.getLogger(__name__)

_THREADS = 16


class MetricsWriter:
    """Appends one JSON object a log step to `folder`/metrics.jsonl, and the same to TensorBoard.

    On an object store the newest may not be there before `flush` or `close`, see `GrowingFile`.

    On resuming at `step`, lines of later steps, which the interrupted run wrote after its last
    checkpoint, are dropped: they will be written again. Only process 0 writes.
    """

    def __init__(self, folder: epath.PathLike, step: int):
        self._is_writer, self._known = jax.process_index() == 0, set()
        if not self._is_writer:
            return
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["step"] <= step]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda piece: piece.unlink(), pieces(path)))
        self._known = {(line["step"], name) for line in lines for name in line}
        self._file = GrowingFile(path)
        self._tensorboard = _TensorBoard(folder / "tensorboard", step)

    def has(self, step: int, name: str) -> bool:
        """Whether a run before this one wrote metric `name` at `step`; process 0 knows."""
        return (step, name) in self._known

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if not self._is_writer:
            return
        # JSON has no number that is not finite.
        values = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._file.append((json.dumps({"step": step, **values}) + "\n").encode())
        self._tensorboard.write(step, metrics)

    def flush(self) -> None:
        """Waits until all is written.

        To be called before a checkpoint is saved: a run that goes on from it writes only what comes
        after it.
        """
        if self._is_writer:
            self._file.flush()
            self._tensorboard.flush()

    def close(self) -> None:
        self.flush()


class _TensorBoard:
    """A file of TensorBoard's events, without the thread of its own writers: once that could not
    write, it would let the training wait for it for ever.

    What cannot be written is told and left out: metrics.jsonl has it, too.
    """

    def __init__(self, folder: epath.Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads what is named so, in the order of the times.
        run = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._folder, self._ended = folder, False
        self._file = GrowingFile(folder / f"events.out.tfevents.{run}")
        # What there is of later steps, of a run before this one, is not to be shown.
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(session_log=start, step=step + 1))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(summary=Summary(value=values), step=step))

    def flush(self) -> None:
        self._unless_ended(self._file.flush)

    def _write(self, *events: Event) -> None:
        data = io.BytesIO()
        records = RecordWriter(data)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())
        self._unless_ended(self._file.append, data.getvalue())

    def _unless_ended(self, write: Callable[..., None], *data: bytes) -> None:
        if self._ended:
            return
        try:
            write(*data)
        except OSError as error:
            logger.warning("%s: TensorBoard's logs end here: %s", self._folder, error)
            self._ended = True


def read_metrics(path: epath.PathLike) -> list[dict[str, float]]:
    """The objects of a metrics.jsonl, its pieces included, in order; None stands for what was no
    finite number.

    A last line that was cut off by a kill, or that a power cut left as NULs, is left out.

    Raises:
      ValueError: it holds something else.
    """
    path = epath.Path(path)
    paths = [path, *pieces(path)] if path.exists() else []
    with ThreadPoolExecutor(_THREADS) as pool:
        texts = pool.map(lambda path: path.read_bytes().decode(errors="replace"), paths)
        lines = [line for text in texts for line in text.split("\n")[:-1]]
    # A kill between joining the pieces and removing them leaves lines twice.
    lines = [line for line in dict.fromkeys(lines) if line.endswith("}")]
    return [_parse(line.lstrip("\0"), path) for line in lines]


def _parse(line: str, path: epath.Path) -> dict[str, float]:
    try:
        metrics = json.loads(line)
        metrics["step"]  # which all have
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ValueError(
            f"{path}: expected lines with a step and its metrics: {files.short(line)}"
        ) from None
    return metrics
