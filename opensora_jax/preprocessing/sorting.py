"""Which entries of a captions file go to which bucket, by a look at their files' headers."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath
from tqdm import tqdm

from opensora_jax.data import archives, buckets, video_io
from opensora_jax.data.buckets import Size
from opensora_jax.data.captions import PROBLEM
from opensora_jax.data.clips import content_of, expect_inside
from opensora_jax.data.video_window import Timeline
from opensora_jax.windows import Windows


@dataclasses.dataclass(frozen=True)
class Share:
    """What goes into one bucket.

    Attributes:
      entries: numbers of entries of the captions file.
      settings: what was asked for of all buckets.
    """

    size: Size
    entries: Sequence[int]
    settings: dict[str, Any]


# Files whose sizes are asked for at a time.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Measuring:
    """What of a file is a clip, as `Decoding` says it: so it goes to a bucket.

    Attributes:
      clip_frames: of a clip at most; 0: those of the video.
    """

    fps: float | None
    clip_frames: int = 0
    crop_bars: bool = False

    def __call__(self, folder: epath.PathLike, entry: dict[str, Any]) -> Size | None:
        """The size of an entry's clips, without decoding more than a few frames.

        None where it cannot be told: whoever decodes it says why.
        """
        if PROBLEM in entry:
            return None
        try:
            expect_inside(epath.Path(folder), entry["file"])
            with archives.member(folder, entry["file"]) as path:
                info = video_io.probe(path)
                n_frames, size = info.n_frames, (info.height, info.width)
                if self.fps is not None and n_frames > 1:
                    n_frames = len(Timeline.read(path, self.fps))
                if self.crop_bars:
                    _, size = content_of(path, size)
        except (OSError, ValueError):  # whatever the name or the file is
            return None
        return Size(min(n_frames, self.clip_frames or n_frames), *size)

    def all(
        self, folder: epath.PathLike, entries: Sequence[dict[str, Any]]
    ) -> Iterator[Size | None]:
        """That of each entry, in order, by threads."""
        with (
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
            tqdm(total=len(entries), desc="sizes", unit="video") as bar,
        ):
            todo = iter(entries)
            while some := list(itertools.islice(todo, _AT_ONCE)):
                for size in pool.map(functools.partial(self, folder), some):
                    bar.update()
                    yield size


def sort(
    entries: Sequence[dict[str, Any]],
    videos: epath.PathLike,
    asked: dict[str, Any],
    *,
    measuring: Measuring,
    windows: Windows,
    cell: tuple[int, int],
) -> tuple[tuple[Size, ...], list[int]]:
    """The buckets, and which of them each entry goes to, by `buckets.nearest`.

    What cannot be read, or fits no bucket, goes to one too, and is counted there.

    Args:
      asked: `buckets`, sizes or auto; of auto `bucket_tokens` and `most_frames`.
      windows: how clips are cut in time.
      cell: (height, width) in pixels of a token of auto's.

    Raises:
      ValueError: of auto, there is nothing that it could choose by.
    """
    clips = list(measuring.all(videos, entries))
    if asked["buckets"] == buckets.AUTO:
        known = [clip for clip in clips if clip is not None]
        limits = (asked["bucket_tokens"], asked["most_frames"])
        sizes = buckets.suitable(known, windows, cell, *limits)
    else:
        sizes = buckets.parse(asked["buckets"])
    numbers = {size: k for k, size in enumerate(sizes)}
    return sizes, [numbers[buckets.nearest(clip, sizes)] if clip else 0 for clip in clips]
