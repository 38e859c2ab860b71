"""The engine of one machine: decodes, encodes and writes part by part, in order."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from opensora_jax.data import clips, dataset_writer, parts
from opensora_jax.data.clips import Clip, decode_clips
from opensora_jax.inference.tokenizer import WindowEncoder
from opensora_jax.preprocessing import job as jobs


def encode(job: jobs.Job) -> jobs.Made:
    """Writes the parts that are still missing."""
    output, settings, windows = job.output, job.settings, job.windows
    records = dataset_writer.read_records(output)
    videos_per_part = settings["videos_per_part"]
    done = sum(r["kept"] + len(r["filtered"]) + len(r["failed"]) for r in records)
    entries, todo = job.entries, job.entries[done:]
    known = dataset_writer.known_texts(output, len(records))
    n_codes = len(job.model.codebook)
    code_bytes = dataset_writer.code_dtype(n_codes).itemsize
    latent_bytes = math.prod(job.grid) * code_bytes
    encoder = WindowEncoder(job.model, settings["window"], job.batch_size, settings.get("tile"))
    features = _CaptionFeatures(job.text_encoder.encode, todo)
    decoded = decode_clips(job.decoding, job.videos, todo)
    with tqdm(total=len(entries), initial=len(entries) - len(todo), unit="video") as bar:
        pairs = zip(todo, decoded, strict=True)
        while done < len(entries):
            part, kept, left_out, size = [], [], [], 0
            for entry, clip in islice(pairs, videos_per_part):
                part.append(entry)
                if isinstance(clip, Clip):
                    encoder.add(clip.frames_THWC)
                    kept.append((entry, clip.fps))
                    size += windows.latents(len(clip.frames_THWC)) * latent_bytes
                else:
                    left_out.append(clip)
                    jobs.expect_none_failed(job, clip)
                bar.update()
                if size >= jobs.PART_BYTES:
                    break
            done += len(part)
            rows = [
                {"video_file": entry["file"], parts.CODES: codes_thw, "caption": text, "fps": fps}
                for (entry, fps), codes_thw in zip(kept, encoder.finish(), strict=True)
                for text in entry["captions"]
            ]
            text_features = features.compute([row["caption"] for row in rows])
            for row, text_SD in zip(rows, text_features, strict=True):
                row[parts.TEXT] = text_SD
            features.forget([caption for entry in part for caption in entry["captions"]])
            record = jobs.record_of(len(kept), left_out)
            dataset_writer.write_part(
                *(output, len(records), rows, n_codes, record),
                texts=known,
                flat=settings.get("flat", False),
            )
            records.append(record)
    return jobs.Made(records)


def look(job: jobs.Job) -> dict[str, Any]:
    """What would become of the videos, without encoding any: the record of all and, of those that
    would be kept, seconds and motion."""
    left_out, seconds, motion = [], [], []
    decoded = decode_clips(job.decoding, job.videos, job.entries)
    for clip in tqdm(decoded, total=len(job.entries), unit="video"):
        if isinstance(clip, Clip):
            seconds.append(round(len(clip.frames_THWC) / clip.fps, 3))
            motion.append(round(clips.motion(clip.frames_THWC), 3))
        else:
            left_out.append(clip)
            jobs.expect_none_failed(job, clip)
    return jobs.record_of(len(seconds), left_out) | {"seconds": seconds, "motion": motion}


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
