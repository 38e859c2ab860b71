"""The engine of many machines: Ray Data decodes, encodes and writes (the extra `ray`).

Two passes. Videos: tasks on CPUs decode them into windows, actors that hold an accelerator encode
these, and the codes, which are small, come to this process, that has tasks write them as parts.
Captions: actors encode them, and write parts of texts. What number a caption has follows from the
captions file alone, so that neither pass waits for the other, nor one part for another but to learn
whether its clips look like earlier ones.

Ray restarts what was under way on a machine that is lost, and holds back who is too fast. Parts are
named by their content, and noted by this process when they are whole: written twice, they are the
same, and an interrupted run goes on with what is not noted.
"""

import atexit
import contextlib
import itertools
import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import pyarrow as pa
import ray
import ray.data
from etils import epath
from tqdm import tqdm

from opensora_jax import files, process, runtime
from opensora_jax.data import dataset_writer, part_counts
from opensora_jax.data.on_disk import Numbers
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.preprocessing.cluster_tasks import MOST_TASKS, on_accelerators
from opensora_jax.preprocessing.cluster_videos import encode_videos
from opensora_jax.preprocessing.job import Chunks, Job, Made
from opensora_jax.preprocessing.options import PreprocessError

_TEXTS_PER_PART = 1024
_BLOCK_BYTES = 2**25  # of decoded windows, which go from one machine to another


def run(job: Job, address: str | None, finish: Callable[[Made], None]) -> None:
    """Writes the parts that are still missing, then lets `finish` do what is left.

    Args:
      address: of the cluster; None: this machine alone.

    Raises:
      PreprocessError: no cluster there, or what a worker of it said.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    started, outcome = threading.Event(), futures.Future()

    def work() -> None:
        try:
            with _connected(address), _one_line():
                started.set()
                made = _make(job)
                dataset_writer.remove_all_but(job.output, (part["name"] for part in made.parts))
                finish(made)
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)
            started.set()

    # In a thread of its own: Ray handles signals, and exceptions that they raise, in its own way,
    # and what it starts dies with the thread that did.
    threading.Thread(target=work, daemon=True).start()
    try:
        started.wait()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        outcome.result()
    except process.Stopped as stopped:
        atexit.register(os._exit, stopped.code)  # that thread may be anywhere
        raise


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of this run
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are for its developers
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # exec follows
    options = {} if address else {"num_cpus": max(2, os.cpu_count() or 1)}
    quiet = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    try:
        _expect_answer(address)
        ray.init(address or "local", **quiet, **options)
    except (OSError, ValueError, RuntimeError) as error:
        problem = files.short(str(error).strip().splitlines()[0])
        raise PreprocessError(f"ray_address={address}: no cluster there: {problem}") from None
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = _BLOCK_BYTES
    _silence(logging.getLogger("ray.data"))
    try:
        yield
    finally:
        ray.shutdown()


def _expect_answer(address: str | None) -> None:
    """Sees that somebody listens at host:port, which Ray would wait minutes for."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _silence(logger: logging.Logger) -> None:
    """What goes wrong is told in one line, by `_one_line`."""
    logger.setLevel(logging.CRITICAL)
    for handler in logger.handlers:
        handler.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What a worker raised is an error of ours, without the traces of all that is in between."""
    try:
        yield
    except ray.exceptions.RayError as error:
        # Its text is the traces of all workers that it went through, what happened in the end.
        lines = [line for line in str(error).splitlines() if line.strip()]
        what = lines[-1].strip() if lines else ""
        raise PreprocessError(f"ray: {type(error).__name__}: {what}") from error


def _make(job: Job) -> Made:
    # Of a run that was killed in the end there are other files of JSON, too.
    noted = (path for kind in ("part", "texts") for path in job.output.glob(f"{kind}-*.json"))
    done = {path.stem: files.read_json(path) for path in noted}
    numbers = Numbers()
    for entry in job.entries:
        for caption in entry["captions"]:
            if caption not in numbers:
                numbers[caption] = len(numbers)
    videos = Chunks("part", len(job.entries), job.settings["videos_per_part"])
    texts = Chunks("texts", len(numbers), _TEXTS_PER_PART)

    def note(name: str, record: dict[str, Any]) -> None:
        files.write_json(job.output / f"{name}.json", record)
        done[name] = record

    def missing(chunks: Chunks) -> list[int]:
        return [k for k in range(len(chunks)) if chunks.name(k) not in done]

    def progress(chunks: Chunks, unit: str) -> tqdm:
        left = sum(len(chunks.range(k)) for k in missing(chunks))
        return tqdm(total=chunks.n, initial=chunks.n - left, unit=unit)

    with progress(videos, "video") as bar:
        encode_videos(job, videos, numbers, dict(done), note, bar)
    records = [done[videos.name(k)] for k in range(len(videos))]
    if not any(record["kept"] for record in records):
        return Made(records, parts=[])
    with progress(texts, "caption") as bar:
        _encode_texts(job, texts, missing(texts), numbers, note, bar)
    made = [part for record in records for part in record["parts"]]
    made += [done[texts.name(k)] for k in range(len(texts))]
    return Made(records, made, _counts(job, made))


def _encode_texts(
    job: Job,
    chunks: Chunks,
    missing: list[int],
    numbers: Numbers,
    note: Callable[[str, dict], None],
    bar: tqdm,
) -> None:
    """Writes the parts of these chunks of captions, and notes them."""
    if not missing:
        return
    captions, wanted, blocks = _distinct(job, numbers), set(missing), []
    for k in range(len(chunks)):
        texts = list(itertools.islice(captions, chunks.size))
        if k in wanted:
            blocks.append(ray.put(pa.table({"name": [chunks.name(k)], "captions": [texts]})))
    found = (
        ray.data.from_arrow_refs(blocks)
        .map_batches(
            _TextActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(job.text_model, str(job.output)),
            **on_accelerators(),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    for batch in found:
        for row in batch.to_pylist():
            note(row["name"], row["part"])
            bar.update(row["part"]["texts"])


def _distinct(job: Job, numbers: Numbers) -> Iterator[str]:
    """The captions in the order of their numbers, which is that of their first uses."""
    n = 0
    for entry in job.entries:
        for caption in entry["captions"]:
            if numbers[caption] == n:
                yield caption
                n += 1


class _TextActor:
    """Holds a text encoder: captions -> a part."""

    def __init__(self, text_model: str, output: str):
        runtime.keep_compiled_programs()
        self._encoder, self._output = TextEncoder(text_model), output

    def __call__(self, table: pa.Table) -> pa.Table:
        (row,) = table.to_pylist()
        features = self._encoder.encode(row["captions"])
        part = dataset_writer.write_texts(self._output, row["name"], row["captions"], features)
        return pa.table({"name": [row["name"]], "part": [part]})


def _counts(job: Job, made: list[dict[str, Any]]) -> Iterator[part_counts.Counts]:
    """What each part holds, in order."""
    n_codes = len(job.model.codebook)
    count = ray.remote(num_cpus=0, max_retries=-1, scheduling_strategy="SPREAD")(_count)
    under_way: list[ray.ObjectRef] = []
    with tqdm(total=len(made), unit="part") as bar:
        for part in made:
            under_way.append(count.remote(str(job.output), part, n_codes))
            if len(under_way) == MOST_TASKS:
                yield ray.get(under_way.pop(0))
                bar.update()
        for task in under_way:
            yield ray.get(task)
            bar.update()


def _count(output: str, part: dict[str, Any], n_codes: int) -> part_counts.Counts:
    return part_counts.count_part(epath.Path(output) / part["name"], part, n_codes)
