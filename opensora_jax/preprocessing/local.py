"""The engine of one machine: decodes, encodes and writes part by part, in order."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from opensora_jax.data import dataset_writer, parts
from opensora_jax.data.clips import Clip, Outcome, Window, decode_clips
from opensora_jax.inference.tokenizer import WindowEncoder
from opensora_jax.preprocessing import job as jobs
from opensora_jax.preprocessing.duplicates import Duplicates


def encode(job: jobs.Job) -> jobs.Made:
    """Writes the parts that are still missing."""
    output, settings = job.output, job.settings
    records = dataset_writer.read_records(output)
    videos_per_part = settings["videos_per_part"]
    done = sum(map(jobs.n_entries, records))
    n_entries = len(job.entries)
    known = dataset_writer.known_texts(output, len(records))
    n_codes = len(job.model.codebook)
    code_bytes = dataset_writer.code_dtype(n_codes).itemsize
    duplicates = Duplicates(settings.get("near_duplicates", 0))
    for record in records:
        duplicates.recall(record)
    all_encoded = _encoded(job, job.entries.between(done, n_entries))
    bar = tqdm(total=n_entries, initial=done, unit="video")
    with bar, contextlib.closing(all_encoded):
        pairs = zip(job.entries.between(done, n_entries), all_encoded, strict=True)
        while done < n_entries:
            names, outcomes, rows, size = [], [], [], 0
            for entry, (outcome, codes) in itertools.islice(pairs, videos_per_part):
                outcome = duplicates.without(entry["file"], outcome)
                names.append(entry["file"])
                outcomes.append(outcome)
                for clip, codes_thw in zip(outcome, codes, strict=True):
                    if isinstance(clip, Clip):
                        row = {"video_file": entry["file"], "fps": clip.fps}
                        row |= {"start": clip.start} if job.cuts else {}
                        row[parts.CODES] = codes_thw
                        rows += [row | {"caption": caption} for caption in entry["captions"]]
                        size += codes_thw.size * code_bytes
                bar.update()
                if size >= jobs.PART_BYTES:
                    break
            done += len(names)
            # Of texts that earlier parts hold nothing is written, unless each row has them all.
            new = list(dict.fromkeys(t for row in rows if (t := row["caption"]) not in known))
            features = dict(zip(new, job.text_encoder.encode(new), strict=True))
            for row in rows:
                row[parts.TEXT] = features.get(row["caption"])
            record = jobs.record_of(outcomes, names)
            dataset_writer.write_part(
                *(output, len(records), rows, n_codes, record),
                texts=known,
                flat=settings.get("flat", False),
            )
            records.append(record)
    return jobs.Made(records)


def _encoded(
    job: jobs.Job, entries: Iterable[dict[str, Any]]
) -> Iterator[tuple[Outcome, list[np.ndarray | None]]]:
    """Yields of each entry, in order, what became of its clips, and the codes of those kept.

    Only the windows of two batches are held, whatever the length of their videos.
    """
    codes: dict[int, dict[int, list[np.ndarray]]] = {}  # of entries, of their clips, of windows
    outcomes: dict[int, Outcome] = {}
    turn = 0
    for i, piece in _pieces(job, entries):
        if isinstance(piece, list):
            jobs.expect_none_failed(job, piece)  # at once: the others may take long
            outcomes[i] = piece
        elif i >= turn:  # else of one that is over, as it failed
            clip, codes_thw = piece
            codes.setdefault(i, {}).setdefault(clip, []).append(codes_thw)
        while turn in outcomes and _is_complete(outcomes[turn], codes.get(turn, {})):
            outcome, found = outcomes.pop(turn), codes.pop(turn, {})
            turn += 1
            yield (
                outcome,
                [
                    np.concatenate(found[k]) if isinstance(clip, Clip) else None
                    for k, clip in enumerate(outcome)
                ],
            )


def _pieces(
    job: jobs.Job, entries: Iterable[dict[str, Any]]
) -> Iterator[tuple[int, Outcome | tuple[int, np.ndarray]]]:
    """Yields, with its entry's number, what became of its clips, and (clip, codes) of a window."""
    decoded = decode_clips(job.decoding, job.videos, entries, job.video_timeout)
    with contextlib.closing(decoded), ThreadPoolExecutor(1) as pool:
        batches = _Batches(job, pool)
        for i, piece in decoded:
            if isinstance(piece, Window):
                yield from batches.add(i, piece)
            else:
                yield i, piece
        yield from batches.finish()


def _is_complete(outcome: Outcome, codes: dict[int, list[np.ndarray]]) -> bool:
    return all(
        len(codes.get(k, ())) == clip.n_windows
        for k, clip in enumerate(outcome)
        if isinstance(clip, Clip)
    )


class _Batches:
    """Encodes windows, a batch of them while the next one is gathered."""

    def __init__(self, job: jobs.Job, pool: ThreadPoolExecutor):
        tile = job.settings.get("tile")
        self._encoder = WindowEncoder(job.model, job.window, job.batch_size, tile)
        self._pool = pool
        self._waiting: list[tuple[int, Window]] = []
        self._under_way: tuple[list[tuple[int, Window]], Future] = [], pool.submit(list)

    def add(self, i: int, window: Window) -> list[tuple[int, tuple[int, np.ndarray]]]:
        """Takes a window of entry i; returns (entry, (clip, codes)) of those known by now."""
        self._waiting.append((i, window))
        return self._turn() if len(self._waiting) == self._encoder.batch_size else []

    def finish(self) -> list[tuple[int, tuple[int, np.ndarray]]]:
        """Returns the others."""
        return self._turn() + self._turn()

    def _turn(self):
        windows, codes = self._under_way
        self._under_way = self._waiting, self._pool.submit(self._encode, self._waiting)
        self._waiting = []
        return [
            (i, (window.clip, codes_thw))
            for (i, window), codes_thw in zip(windows, codes.result(), strict=True)
        ]

    def _encode(self, windows: list[tuple[int, Window]]) -> list[np.ndarray]:
        for _, window in windows:
            self._encoder.add(window.frames_THWC)
        return self._encoder.finish()


def look(job: jobs.Job) -> dict[str, Any]:
    """What would become of the videos, without encoding any: the record of all and, of the clips
    that would be kept, seconds and motion."""
    outcomes: dict[int, Outcome] = {}
    decoding = dataclasses.replace(job.decoding, measure=True)
    decoded = decode_clips(decoding, job.videos, job.entries, job.video_timeout)
    bar = tqdm(total=len(job.entries), unit="video")
    with bar, contextlib.closing(decoded):
        for i, piece in decoded:
            if not isinstance(piece, Window):
                jobs.expect_none_failed(job, piece)
                outcomes[i] = piece
                bar.update()
    duplicates = Duplicates(job.settings.get("near_duplicates", 0))
    names = [entry["file"] for entry in job.entries]
    in_order = [duplicates.without(name, outcomes[i]) for i, name in enumerate(names)]
    kept = [clip for outcome in in_order for clip in outcome if isinstance(clip, Clip)]
    return jobs.record_of(in_order, names) | {
        "seconds": [round(clip.n_frames / clip.fps, 3) for clip in kept],
        "motion": [round(clip.figures["motion"], 3) for clip in kept],
    }
