"""The engine of one machine: decodes, encodes and writes part by part, in order."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
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
    entries, todo = job.entries, job.entries[done:]
    known = dataset_writer.known_texts(output, len(records))
    n_codes = len(job.model.codebook)
    code_bytes = dataset_writer.code_dtype(n_codes).itemsize
    features = _CaptionFeatures(job.text_encoder.encode, todo)
    duplicates = Duplicates(settings.get("near_duplicates", 0))
    for record in records:
        duplicates.recall(record)
    with tqdm(total=len(entries), initial=len(entries) - len(todo), unit="video") as bar:
        encoded = zip(todo, _encoded(job, todo), strict=True)
        while done < len(entries):
            part, outcomes, rows, size = [], [], [], 0
            for entry, (outcome, codes) in itertools.islice(encoded, videos_per_part):
                jobs.expect_none_failed(job, outcome)
                outcome = duplicates.without(entry["file"], outcome)
                part.append(entry)
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
            done += len(part)
            text_features = features.compute([row["caption"] for row in rows])
            for row, text_SD in zip(rows, text_features, strict=True):
                row[parts.TEXT] = text_SD
            features.forget([caption for entry in part for caption in entry["captions"]])
            record = jobs.record_of(outcomes, [entry["file"] for entry in part])
            dataset_writer.write_part(
                *(output, len(records), rows, n_codes, record),
                texts=known,
                flat=settings.get("flat", False),
            )
            records.append(record)
    return jobs.Made(records)


def _encoded(
    job: jobs.Job, entries: list[dict[str, Any]]
) -> Iterator[tuple[Outcome, list[np.ndarray | None]]]:
    """Yields of each entry, in order, what became of its clips, and the codes of those kept.

    Only windows that wait for a full batch are held, whatever the length of their video.
    """
    tile = job.settings.get("tile")
    encoder = WindowEncoder(job.model, job.settings["window"], job.batch_size, tile)
    batch: list[tuple[int, Window]] = []
    codes: dict[int, dict[int, list[np.ndarray]]] = {}  # of entries, of their clips, of windows
    outcomes: dict[int, Outcome] = {}
    turn = 0

    def encode_batch() -> None:
        for _, window in batch:
            encoder.add(window.frames_THWC)
        for (i, window), codes_thw in zip(batch, encoder.finish(), strict=True):
            if i >= turn:  # else of one that failed
                codes.setdefault(i, {}).setdefault(window.clip, []).append(codes_thw)
        batch.clear()

    def ended() -> Iterator[tuple[Outcome, list[np.ndarray | None]]]:
        """Those that are complete and whose turn it is."""
        nonlocal turn
        while turn in outcomes:
            found = codes.get(turn, {})
            kept = {k: clip for k, clip in enumerate(outcomes[turn]) if isinstance(clip, Clip)}
            if any(len(found.get(k, ())) < clip.n_windows for k, clip in kept.items()):
                return
            codes.pop(turn, None)
            outcome = outcomes.pop(turn)
            turn += 1
            yield (
                outcome,
                [np.concatenate(found[k]) if k in kept else None for k in range(len(outcome))],
            )

    for i, piece in decode_clips(job.decoding, job.videos, entries, encoder.batch_size):
        if isinstance(piece, Window):
            batch.append((i, piece))
            if len(batch) < encoder.batch_size:
                continue
            encode_batch()
        else:
            outcomes[i] = piece
        yield from ended()
    encode_batch()
    yield from ended()


def look(job: jobs.Job) -> dict[str, Any]:
    """What would become of the videos, without encoding any: the record of all and, of the clips
    that would be kept, seconds and motion."""
    outcomes: dict[int, Outcome] = {}
    decoding = dataclasses.replace(job.decoding, measure=True)
    with tqdm(total=len(job.entries), unit="video") as bar:
        for i, piece in decode_clips(decoding, job.videos, job.entries):
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


class _CaptionFeatures:
    """Text features, computed once per distinct caption and kept until its last use."""

    def __init__(self, encode: Callable[[list[str]], list[np.ndarray]], entries: list[dict]):
        self._encode = encode
        self._uses_left = Counter(caption for entry in entries for caption in entry["captions"])
        self._features = {}

    def compute(self, captions: list[str]) -> list[np.ndarray]:
        new = list(dict.fromkeys(c for c in captions if c not in self._features))
        self._features.update(zip(new, self._encode(new), strict=True))
        return [self._features[c] for c in captions]

    def forget(self, captions: list[str]) -> None:
        """Says that these uses are over."""
        self._uses_left.subtract(captions)
        for caption in captions:
            if not self._uses_left[caption]:
                self._features.pop(caption, None)
