"""The engine of many machines: Ray Data decodes, encodes and writes (the extra `ray`).

Two passes. Videos: tasks on CPUs decode them into windows, actors that hold an accelerator encode
these, and the codes, which are small, come to this process, that has tasks write them as parts.
Captions: actors encode them, and write parts of texts. What number a caption has follows from the
captions file alone, so that neither pass waits for the other, nor one part for another.

Ray restarts what was under way on a machine that is lost, and holds back who is too fast. Parts are
named by their content, and noted by this process when they are whole: written twice, they are the
same, and an interrupted run goes on with what is not noted.
"""

import atexit
import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from etils import epath
from tqdm import tqdm

from opensora_jax import files, process, runtime
from opensora_jax.data import dataset_writer, part_counts, parts
from opensora_jax.data.captions import PROBLEM
from opensora_jax.data.clips import Clip, Decoding, Failed, Filtered, Outcome, Window
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import WindowEncoder, load_tokenizer
from opensora_jax.preprocessing.job import (
    PART_BYTES,
    Job,
    Made,
    PreprocessError,
    expect_none_failed,
    record_of,
)

_TEXTS_PER_PART = 1024
_BLOCK_BYTES = 2**25  # of decoded windows, which go from one machine to another
# Tasks that write, or count, at a time: each holds a part.
_MOST_TASKS = 32


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
    size = job.settings["videos_per_part"]
    groups = [job.entries[start : start + size] for start in range(0, len(job.entries), size)]
    numbers: dict[str, int] = {}
    for entry in job.entries:
        for caption in entry["captions"]:
            numbers.setdefault(caption, len(numbers))
    videos = {f"part-{g:05d}": group for g, group in enumerate(groups)}
    captions = list(numbers)
    starts = range(0, len(captions), _TEXTS_PER_PART)
    texts = {
        f"texts-{j:05d}": captions[start : start + _TEXTS_PER_PART]
        for j, start in enumerate(starts)
    }

    def missing(named: dict[str, list]) -> dict[str, list]:
        return {name: value for name, value in named.items() if name not in done}

    def note(name: str, record: dict[str, Any]) -> None:
        files.write_json(job.output / f"{name}.json", record)
        done[name] = record

    with tqdm(total=len(job.entries), unit="video") as bar:
        bar.update(len(job.entries) - sum(map(len, missing(videos).values())))
        _encode_videos(job, missing(videos), numbers, note, bar)
    if not any(done[name]["kept"] for name in videos):
        return Made([done[name] for name in videos], parts=[])
    with tqdm(total=len(numbers), unit="caption") as bar:
        bar.update(len(numbers) - sum(map(len, missing(texts).values())))
        _encode_texts(job, missing(texts), note, bar)
    records = [done[name] for name in videos]
    made = [part for record in records for part in record["parts"]]
    made += [done[name] for name in texts]
    return Made(records, made, _counts(job, made))


# ------------------------------------------------------------------------------------------ videos


def _encode_videos(
    job: Job,
    groups: dict[str, list[dict]],
    numbers: dict[str, int],
    note: Callable[[str, dict], None],
    bar: tqdm,
) -> None:
    """Writes parts of these entries by name, and notes them."""
    if not groups:
        return
    entries = [(name, entry) for name, group in groups.items() for entry in group]
    n_cpus = int(ray.cluster_resources().get("CPU", 1))
    a_task = max(1, min(job.settings["videos_per_part"], len(entries) // (4 * n_cpus)))
    # Not as strings: a file name need not be text.
    keys = ("file", PROBLEM)
    named = [
        json.dumps({key: entry[key] for key in keys if key in entry}).encode()
        for _, entry in entries
    ]
    blocks = [
        pa.table(
            {
                "entry": pa.array(range(start, min(start + a_task, len(named))), pa.int64()),
                "named": pa.array(named[start : start + a_task], pa.binary()),
            }
        )
        for start in range(0, len(named), a_task)
    ]
    found = (
        ray.data.from_arrow(blocks)
        .map_batches(
            _decode,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            concurrency=n_cpus,  # without a number it would run inside of what follows
            fn_args=(job.decoding, str(job.videos)),
        )
        .map_batches(
            _WindowActor,
            batch_size=job.batch_size,
            batch_format="pyarrow",
            fn_constructor_args=(
                *(job.vqvae, job.settings["window"], job.batch_size),
                job.settings.get("tile"),
            ),
            **_on_accelerators(),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    n_codes = len(job.model.codebook)
    write = ray.remote(num_cpus=0, max_retries=-1, scheduling_strategy="SPREAD")(_write_videos)
    tasks = _Tasks(note)
    windows: dict[int, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
    ended: dict[int, Outcome] = {}
    over: set[int] = set()
    made: dict[str, dict[int, tuple[Outcome, list[dict]]]] = defaultdict(dict)
    for batch in found:
        for row in batch.to_pylist():
            i = row["entry"]
            if i in over:
                continue  # known: of a task that was run again
            if row["outcome"]:
                ended[i] = _from_json(row["outcome"])
            else:
                windows[i][row["clip"], row["window"]] = np.frombuffer(row["codes"], np.int32)
            videos = _videos(job, entries[i][1], numbers, ended.get(i), windows[i])
            if videos is None:
                continue
            over.add(i)
            del windows[i]
            outcome, (name, _) = ended.pop(i), entries[i]
            expect_none_failed(job, outcome)
            made[name][i] = outcome, videos
            bar.update()
            if len(made[name]) == len(groups[name]):
                ordered = [one for _, one in sorted(made.pop(name).items())]
                tasks.add(name, write.remote(str(job.output), name, ordered, n_codes))
    tasks.finish()


def _videos(
    job: Job,
    entry: dict[str, Any],
    numbers: dict[str, int],
    outcome: Outcome | None,
    windows: dict[tuple[int, int], np.ndarray],
) -> list[dict] | None:
    """What `dataset_writer.write_videos` takes, of each clip that is kept; None: not all is known.

    Args:
      outcome: None as long as it is not known.
      windows: codes by the numbers of their clip and window, those that have come.
    """
    if outcome is None:
        return None
    videos = []
    for k, clip in enumerate(outcome):
        if isinstance(clip, Clip):
            codes = [windows.get((k, w)) for w in range(clip.n_windows)]
            if any(codes_w is None for codes_w in codes):
                return None
            videos.append(
                {
                    "video_file": entry["file"],
                    "fps": clip.fps,
                    **({} if clip.start is None else {"start": clip.start}),
                    parts.CODES: np.concatenate(codes).reshape(-1, *job.grid),
                    "texts": [numbers[caption] for caption in entry["captions"]],
                }
            )
    return videos


def _decode(table: pa.Table, decoding: Decoding, folder: str) -> Iterator[pa.Table]:
    """Entries -> windows of their frames, as bytes, and last what became of their clips."""
    columns = (table.column(key).to_pylist() for key in ("entry", "named"))
    for i, named in zip(*columns, strict=True):
        n_windows: dict[int, int] = Counter()
        for piece in decoding(folder, json.loads(named)):
            if isinstance(piece, Window):
                n, height = piece.frames_THWC.shape[:2]
                yield _rows(
                    entry=i,
                    clip=piece.clip,
                    window=n_windows[piece.clip],
                    n=n,
                    frames=piece.frames_THWC.tobytes(),
                    height=height,
                )
                n_windows[piece.clip] += 1
            else:
                yield _rows(entry=i, outcome=_to_json(piece))


def _to_json(outcome: Outcome) -> str:
    return json.dumps([[type(clip).__name__, dataclasses.asdict(clip)] for clip in outcome])


def _from_json(text: str) -> Outcome:
    kinds = {kind.__name__: kind for kind in (Clip, Filtered, Failed)}
    return [kinds[name](**values) for name, values in json.loads(text)]


_COLUMNS = {
    "entry": pa.int64(),
    "clip": pa.int64(),
    "window": pa.int64(),
    "n": pa.int64(),
    "height": pa.int64(),
    "frames": pa.large_binary(),
    "codes": pa.binary(),
    "outcome": pa.string(),
}


def _rows(**values: Any) -> pa.Table:
    columns = {name: pa.array([values.get(name)], of) for name, of in _COLUMNS.items()}
    return pa.table(columns)


class _WindowActor:
    """Holds a tokenizer: windows -> codes."""

    def __init__(self, vqvae: str, window: int, batch_size: int, tile: int | None):
        runtime.keep_compiled_programs()
        self._encoder = WindowEncoder(load_tokenizer(vqvae), window, batch_size, tile)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        with_frames = [row for row in rows if row["frames"] is not None]
        for row in with_frames:
            frames = np.frombuffer(row.pop("frames"), np.uint8)
            self._encoder.add(frames.reshape(row["n"], row["height"], -1, 3))
        for row, codes in zip(with_frames, self._encoder.finish(), strict=True):
            row["codes"] = np.ascontiguousarray(codes, np.int32).tobytes()
        return pa.table(
            {
                name: pa.array([row.get(name) for row in rows], of)
                for name, of in _COLUMNS.items()
                if name != "frames"
            }
        )


def _write_videos(
    output: str, name: str, made: list[tuple[Outcome, list[dict]]], n_codes: int
) -> dict[str, Any]:
    """Writes parts of a group; returns what is to be noted."""
    itemsize = dataset_writer.code_dtype(n_codes).itemsize
    written, some, size = [], [], 0
    for video in (video for _, videos in made for video in videos):
        some.append(video)
        size += video[parts.CODES].size * itemsize
        if size >= PART_BYTES:
            written.append(dataset_writer.write_videos(output, name, some, n_codes))
            some, size = [], 0
    if some:
        written.append(dataset_writer.write_videos(output, name, some, n_codes))
    return {**record_of([outcome for outcome, _ in made]), "parts": written}


# ------------------------------------------------------------------------------------------- texts


def _encode_texts(
    job: Job, chunks: dict[str, list[str]], note: Callable[[str, dict], None], bar: tqdm
) -> None:
    """Writes parts of these captions by name, and notes them."""
    if not chunks:
        return
    blocks = [pa.table({"name": [name], "captions": [texts]}) for name, texts in chunks.items()]
    found = (
        ray.data.from_arrow(blocks)
        .map_batches(
            _TextActor,
            batch_size=1,
            batch_format="pyarrow",
            fn_constructor_args=(job.text_model, str(job.output)),
            **_on_accelerators(),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    for batch in found:
        for row in batch.to_pylist():
            note(row["name"], row["part"])
            bar.update(row["part"]["texts"])


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


# ----------------------------------------------------------------------------------------- cluster


def _on_accelerators() -> dict[str, Any]:
    """How many actors there are at most, and what each holds: a GPU, the TPU chips of a host, or,
    where there are neither, a CPU, of which half are for decoding."""
    resources = ray.cluster_resources()
    if n_gpus := int(resources.get("GPU", 0)):
        held, most = {"num_gpus": 1}, n_gpus
    elif resources.get("TPU"):
        hosts = [node["Resources"].get("TPU", 0) for node in ray.nodes() if node["Alive"]]
        chips = [n for n in hosts if n]
        held, most = {"resources": {"TPU": min(chips)}}, len(chips)
    else:
        held, most = {"num_cpus": 1}, max(1, int(resources.get("CPU", 1)) // 2)
    return {**held, "compute": ray.data.ActorPoolStrategy(min_size=1, max_size=most)}


def _counts(job: Job, made: list[dict[str, Any]]) -> Iterator[part_counts.Counts]:
    """What each part holds, in order."""
    n_codes = len(job.model.codebook)
    count = ray.remote(num_cpus=0, max_retries=-1, scheduling_strategy="SPREAD")(_count)
    under_way: list[ray.ObjectRef] = []
    with tqdm(total=len(made), unit="part") as bar:
        for part in made:
            under_way.append(count.remote(str(job.output), part, n_codes))
            if len(under_way) == _MOST_TASKS:
                yield ray.get(under_way.pop(0))
                bar.update()
        for task in under_way:
            yield ray.get(task)
            bar.update()


def _count(output: str, part: dict[str, Any], n_codes: int) -> part_counts.Counts:
    return part_counts.count_part(epath.Path(output) / part["name"], part, n_codes)


class _Tasks:
    """Tasks under way whose results are noted as they come; not too many at a time."""

    def __init__(self, note: Callable[[str, dict], None]):
        self._note, self._names = note, {}

    def add(self, name: str, task: ray.ObjectRef) -> None:
        self._names[task] = name
        self._collect(timeout=0)
        while len(self._names) > _MOST_TASKS:
            self._collect(timeout=None)

    def finish(self) -> None:
        while self._names:
            self._collect(timeout=None)

    def _collect(self, timeout: float | None) -> None:
        ended, _ = ray.wait(list(self._names), num_returns=1, timeout=timeout)
        for task in ended:
            self._note(self._names.pop(task), ray.get(task))
