"""What an engine is given to do, and what it hands back."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from opensora_jax import files
from opensora_jax.data.clips import Decoding, Failed, Filtered, LeftOut
from opensora_jax.data.part_counts import Counts
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.models.tokenizer import Tokenizer
from opensora_jax.windows import Windows

# Codes of a part, in bytes: it is read whole when it is first used.
PART_BYTES = 2**26


# Of settings, what videos have to show at least to be kept.
FILTERS = ("min_side", "min_motion", "min_brightness")


class PreprocessError(ValueError):
    """The arguments do not fit each other, or the output folder."""


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
    """

    entries: list[dict[str, Any]]
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

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the codes."""
        sides = zip(self.settings["resolution"], self.model.downsample[1:], strict=True)
        height, width = (pixels // stride for pixels, stride in sides)
        return height, width

    @property
    def decoding(self) -> Decoding:
        keys = ("fps", "max_frames", "n_frames", *FILTERS)
        sizes = {key: self.settings[key] for key in keys if key in self.settings}
        return Decoding(tuple(self.settings["resolution"]), **sizes, windows=self.windows)


@dataclasses.dataclass(frozen=True)
class Made:
    """Attributes:
    records: of what became of the videos: kept (a number), filtered and failed (lists), in order.
    parts: what is known of each part; None: it stands beside them.
    counts: what each part holds; None: still to be counted.
    """

    records: list[dict[str, Any]]
    parts: list[dict[str, Any]] | None = None
    counts: Iterable[Counts] | None = None


def expect_none_failed(job: Job, clip: LeftOut) -> None:
    """Raises PreprocessError, of a strict job, for a video that cannot be read."""
    if job.strict and isinstance(clip, Failed):
        raise PreprocessError(f"{files.short(clip.file)}: {clip.reason} (strict=True)")


def record_of(n_kept: int, left_out: list[LeftOut]) -> dict[str, Any]:
    """What became of some videos, as JSON."""
    return {
        "kept": n_kept,
        "filtered": [dataclasses.asdict(clip) for clip in left_out if isinstance(clip, Filtered)],
        "failed": [dataclasses.asdict(clip) for clip in left_out if isinstance(clip, Failed)],
    }
