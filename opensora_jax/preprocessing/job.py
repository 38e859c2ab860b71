"""What an engine is given to do, and what it hands back."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data.buckets import parse
from opensora_jax.data.clips import Clip, Decoding, Failed, Filtered, LeftOut, Outcome
from opensora_jax.data.looks import FIGURES
from opensora_jax.data.on_disk import Entries
from opensora_jax.data.part_counts import Counts
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.preprocessing.options import CURATION, PreprocessError
from opensora_jax.windows import Windows

# Codes of a part, in bytes: it is read whole when it is first used.
PART_BYTES = 2**26


class NothingKeptError(PreprocessError):
    """Not one video could be kept; `left_out` says why, as metadata.json does."""

    def __init__(self, output: epath.PathLike, left_out: dict[str, list[dict[str, str]]]):
        super().__init__(f"{output}: not one video could be kept: remove it to try again")
        self.left_out = left_out


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    entries: of the captions file.
    videos: the folder that its file names are relative to.
    output: the folder of the dataset, which is there.
    vqvae, text_model: what `load_tokenizer` and `TextEncoder` read.
    model, text_encoder: what they gave.
    settings: that decide what is in the dataset, as metadata.json has them.
    windows: how videos are cut in time.
    batch_size: windows encoded at a time.
    strict: whether one video that cannot be read ends it.
    video_timeout: seconds of decoding after which a video counts as failed; None: no limit.
    """

    entries: Entries
    videos: epath.Path
    output: epath.Path
    vqvae: str
    text_model: str
    model: Tokenizer
    text_encoder: TextEncoder
    settings: dict[str, Any]
    windows: Windows
    batch_size: int
    strict: bool = False
    video_timeout: float | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes."""
        sides = zip(self.settings["resolution"], self.model.downsample[1:], strict=True)
        height, width = (pixels // stride for pixels, stride in sides)
        return height, width

    @property
    def window(self) -> int:
        """Frames that are encoded at once: of a bucket of shorter clips those of one, where the
        tokenizer is causal, since what would follow changes nothing."""
        window, n_frames = self.settings["window"], self.settings["n_frames"]
        return min(window, n_frames) if n_frames and self.model.causal else window

    @property
    def cuts(self) -> bool:
        """Whether a video may be several clips."""
        is_cut = "clip_frames" in self.settings or "split_scenes" in self.settings
        return is_cut and not self.decoding.images

    @property
    def decoding(self) -> Decoding:
        keys = ("fps", "max_frames", "n_frames", *CURATION)
        sizes = {key: self.settings[key] for key in keys if key in self.settings}
        images = "bucket" in self.settings and parse(self.settings["bucket"])[0].is_image
        return Decoding(
            tuple(self.settings["resolution"]), **sizes, windows=self.windows, images=images
        )


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Numbers from 0 to n, in chunks of one size, which have names."""

    kind: str
    n: int
    size: int

    def __len__(self) -> int:
        return -(-self.n // self.size)

    def name(self, k: int) -> str:
        return f"{self.kind}-{k:05d}"

    def range(self, k: int) -> range:
        return range(k * self.size, min((k + 1) * self.size, self.n))


@dataclasses.dataclass(frozen=True)
class Made:
    """Attributes:
    records: of what became of the videos, in order: what `record_of` gives, and more.
    parts: what is known of each part; None: it stands beside them.
    counts: what each part holds; None: still to be counted.
    """

    records: list[dict[str, Any]]
    parts: list[dict[str, Any]] | None = None
    counts: Iterable[Counts] | None = None


def expect_none_failed(job: Job, outcome: Outcome) -> None:
    """Raises PreprocessError, of a strict job, for a video that cannot be read."""
    for clip in outcome:
        if job.strict and isinstance(clip, Failed):
            raise PreprocessError(f"{files.short(clip.file)}: {clip.reason} (strict=True)")


def record_of(outcomes: list[Outcome], names: list[str]) -> dict[str, Any]:
    """What became of some videos, as JSON: how many there are, how many are kept, with one clip at
    least, how many clips are, which were filtered, all of them or clips, and failed; what clips
    show, counted, and what those kept look like, where that was asked for.

    Args:
      names: of the videos' files.
    """
    clips = [clip for outcome in outcomes for clip in outcome]
    kept, filtered = ([x for x in clips if isinstance(x, kind)] for kind in (Clip, Filtered))
    hashes = [
        [file, clip.hash]
        for file, outcome in zip(names, outcomes, strict=True)
        for clip in outcome
        if isinstance(clip, Clip) and clip.hash
    ]
    figures = {
        name: {"kept": _histogram(kept, name), "filtered": _histogram(filtered, name)}
        for name in FIGURES
        if any(name in clip.figures for clip in clips)
    }
    return {
        "entries": len(outcomes),
        "kept": sum(any(isinstance(clip, Clip) for clip in outcome) for outcome in outcomes),
        "clips": len(kept),
        "filtered": [_named(clip) for clip in filtered],
        "failed": [_named(clip) for clip in clips if isinstance(clip, Failed)],
        **({"figures": figures} if figures else {}),
        **({"hashes": hashes} if hashes else {}),
    }


def _histogram(clips: list[Clip | LeftOut], name: str) -> list[int]:
    """How many of the clips show how much, between the edges of FIGURES and beyond the last."""
    edges = FIGURES[name]
    values = [clip.figures[name] for clip in clips if name in clip.figures]
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0].tolist()


def n_entries(record: dict[str, Any]) -> int:
    """How many videos a record, also one of an earlier version, is about."""
    return record.get("entries", record["kept"] + len(record["filtered"]) + len(record["failed"]))


def _named(clip: LeftOut) -> dict[str, Any]:
    start = {} if clip.start is None else {"start": clip.start}
    like = {} if clip.like is None else {"like": clip.like}
    return {"file": clip.file, **start, "reason": clip.reason, **like}
