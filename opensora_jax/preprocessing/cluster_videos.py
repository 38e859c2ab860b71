"""Videos on a Ray cluster: tasks decode them, actors encode windows of them, tasks write parts."""

import dataclasses
import functools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from tqdm import tqdm

from opensora_jax import runtime
from opensora_jax.data import dataset_writer, parts
from opensora_jax.data.captions import PROBLEM
from opensora_jax.data.clips import (
    Clip,
    Decoding,
    Failed,
    Filtered,
    Outcome,
    Window,
    decode_apart,
)
from opensora_jax.data.on_disk import Numbers
from opensora_jax.data.workers import Workers
from opensora_jax.inference.tokenizer import WindowEncoder, load_tokenizer
from opensora_jax.preprocessing.cluster_tasks import Tasks, on_accelerators
from opensora_jax.preprocessing.duplicates import Duplicates
from opensora_jax.preprocessing.job import PART_BYTES, Chunks, Job, expect_none_failed, record_of


def encode_videos(
    job: Job,
    chunks: Chunks,
    numbers: Numbers,
    noted: dict[str, dict[str, Any]],
    note: Callable[[str, dict], None],
    bar: tqdm,
) -> None:
    """Writes the parts of these chunks of entries, and notes them, but for those that are noted.

    Args:
      numbers: of captions.
    """
    missing = [k for k in range(len(chunks)) if chunks.name(k) not in noted]
    if not missing:
        return
    n_cpus = int(ray.cluster_resources().get("CPU", 1))
    n_videos = sum(len(chunks.range(k)) for k in missing)
    a_task = max(1, min(chunks.size, n_videos // (4 * n_cpus)))
    ranges = (
        chunks.range(k)[start : start + a_task]
        for k in missing
        for start in range(0, len(chunks.range(k)), a_task)
    )
    found = (
        ray.data.from_arrow_refs([ray.put(_named(job, some)) for some in ranges])
        .map_batches(
            _decode,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=1,
            concurrency=n_cpus,  # without a number it would run inside of what follows
            fn_args=(job.decoding, str(job.videos), job.video_timeout),
        )
        .map_batches(
            _WindowActor,
            batch_size=job.batch_size,
            batch_format="pyarrow",
            fn_constructor_args=(
                *(job.vqvae, job.window, job.batch_size),
                job.settings.get("tile"),
            ),
            **on_accelerators(),
        )
        .iter_batches(batch_size=None, batch_format="pyarrow")
    )
    writer = _Writer(job, chunks, numbers, noted, note)
    windows: dict[int, dict[tuple[int, int], np.ndarray]] = defaultdict(dict)
    outcomes: dict[int, Outcome] = {}
    over: set[int] = set()
    for batch in found:
        for row in batch.to_pylist():
            i = row["entry"]
            if i in over:
                continue  # known: of a task that was run again
            if row["outcome"]:
                outcomes[i] = _from_json(row["outcome"])
            else:
                windows[i][row["clip"], row["window"]] = np.frombuffer(row["codes"], np.int32)
            codes = _codes(outcomes[i], windows[i]) if i in outcomes else None
            if codes is None:
                continue
            over.add(i)
            del windows[i]
            outcome = outcomes.pop(i)
            expect_none_failed(job, outcome)
            writer.add(i, (job.entries[i], outcome, codes))
            bar.update()
    writer.finish()


def _named(job: Job, numbers: range) -> pa.Table:
    """Of these entries what is needed to decode them."""
    # Not as strings: a file name need not be text.
    named = [
        json.dumps({key: entry[key] for key in ("file", PROBLEM) if key in entry}).encode()
        for entry in job.entries.between(numbers.start, numbers.stop)
    ]
    columns = {"entry": pa.array(numbers, pa.int64()), "named": pa.array(named, pa.binary())}
    return pa.table(columns)


def _codes(
    outcome: Outcome, windows: dict[tuple[int, int], np.ndarray]
) -> list[np.ndarray | None] | None:
    """Of each clip that is kept, its codes; None: they are not all there.

    Args:
      windows: codes by the numbers of their clip and window.
    """
    found = []
    for k, clip in enumerate(outcome):
        numbers = range(clip.n_windows if isinstance(clip, Clip) else 0)
        if any((k, w) not in windows for w in numbers):
            return None
        found.append(np.concatenate([windows[k, w] for w in numbers]) if numbers else None)
    return found


# An entry, what became of its clips, and their codes.
_Encoded = tuple[dict[str, Any], Outcome, list[np.ndarray | None]]


class _Writer:
    """Has chunks of entries written when they are complete; where clips are compared with those
    before them, one after the other."""

    def __init__(
        self,
        job: Job,
        chunks: Chunks,
        numbers: Numbers,
        noted: dict[str, dict[str, Any]],
        note: Callable[[str, dict], None],
    ):
        self._job, self._chunks, self._numbers = job, chunks, numbers
        self._tasks, self._noted = Tasks(note), noted
        self._task = ray.remote(num_cpus=0, max_retries=-1, scheduling_strategy="SPREAD")(
            _write_videos
        )
        self._begun: dict[int, dict[int, _Encoded]] = defaultdict(dict)
        self._complete: dict[int, list[_Encoded]] = {}
        most_bits = job.settings.get("near_duplicates", 0)
        self._duplicates, self._in_order = Duplicates(most_bits), bool(most_bits)
        self._turns = deque(range(len(chunks)))

    def add(self, i: int, encoded: _Encoded) -> None:
        """Takes the i-th of all entries."""
        k = i // self._chunks.size
        self._begun[k][i] = encoded
        if len(self._begun[k]) < len(self._chunks.range(k)):
            return
        chunk = [one for _, one in sorted(self._begun.pop(k).items())]
        if not self._in_order:
            self._write(self._chunks.name(k), chunk)
            return
        self._complete[k] = chunk
        while self._turns:
            k = self._turns[0]
            name = self._chunks.name(k)
            if name in self._noted:
                self._duplicates.recall(self._noted[name])
            elif k in self._complete:
                self._write(name, self._complete.pop(k))
            else:
                return
            self._turns.popleft()

    def finish(self) -> None:
        self._tasks.finish()

    def _write(self, name: str, chunk: list[_Encoded]) -> None:
        outcomes, videos = [], []
        for entry, outcome, codes in chunk:
            outcome = self._duplicates.without(entry["file"], outcome)
            outcomes.append(outcome)
            texts = [self._numbers[caption] for caption in entry["captions"]]
            for clip, codes_k in zip(outcome, codes, strict=True):
                if isinstance(clip, Clip):
                    video = {"video_file": entry["file"], "fps": clip.fps, "texts": texts}
                    video |= {"start": clip.start} if self._job.cuts else {}
                    videos.append(video | {parts.CODES: codes_k.reshape(-1, *self._job.grid)})
        record = record_of(outcomes, [entry["file"] for entry, _, _ in chunk])
        n_codes = len(self._job.model.codebook)
        self._tasks.add(
            name, self._task.remote(str(self._job.output), name, record, videos, n_codes)
        )


@functools.cache
def _workers(decoding: Decoding, folder: str, timeout: float | None) -> Workers:
    """Of this process, as long as it lives."""
    return Workers(functools.partial(decoding, folder), timeout)


def _decode(
    table: pa.Table, decoding: Decoding, folder: str, timeout: float | None
) -> Iterator[pa.Table]:
    """Entries -> windows of their frames, as bytes, and last what became of their clips."""
    workers = _workers(decoding, folder, timeout)
    columns = (table.column(key).to_pylist() for key in ("entry", "named"))
    for i, named in zip(*columns, strict=True):
        n_windows: dict[int, int] = Counter()
        for piece in decode_apart(workers, json.loads(named)):
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
    output: str, name: str, record: dict[str, Any], videos: list[dict], n_codes: int
) -> dict[str, Any]:
    """Writes parts of a chunk; returns what is to be noted: the record, and which parts."""
    itemsize = dataset_writer.code_dtype(n_codes).itemsize
    written, some, size = [], [], 0
    for video in videos:
        some.append(video)
        size += video[parts.CODES].size * itemsize
        if size >= PART_BYTES:
            written.append(dataset_writer.write_videos(output, name, some, n_codes))
            some, size = [], 0
    if some:
        written.append(dataset_writer.write_videos(output, name, some, n_codes))
    return {**record, "parts": written}
