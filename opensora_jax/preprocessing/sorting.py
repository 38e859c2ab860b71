"""Which entries of a captions file go to which bucket, by a look at their files' headers."""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from etils import epath
from tqdm import tqdm

from opensora_jax.data import archives, buckets, video_io
from opensora_jax.data.buckets import Size
from opensora_jax.data.captions import PROBLEM
from opensora_jax.data.clips import UNUSABLE, content_of, expect_inside
from opensora_jax.data.on_disk import Entries
from opensora_jax.data.video_window import Timeline
from opensora_jax.data.workers import Ended, Workers
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
      timeout: seconds after which a size cannot be told; None: there is no limit.
    """

    fps: float | None
    clip_frames: int = 0
    crop_bars: bool = False
    timeout: float | None = None

    def __call__(self, folder: epath.PathLike, entry: dict[str, Any]) -> Iterator[Size | None]:
        """Yields the size of an entry's clips, without decoding more than a few frames.

        None where it cannot be told: whoever decodes it says why.
        """
        size = None
        # What `Decoding` takes for a failed video; what is wrong with a disk or a server is not.
        with contextlib.suppress(*UNUSABLE, UnicodeEncodeError):
            if PROBLEM not in entry:
                entry["file"].encode()
                expect_inside(epath.Path(folder), entry["file"])
                with archives.member(folder, entry["file"]) as path:
                    size = self._size(path)
        yield size

    def _size(self, path: Path) -> Size:
        info = video_io.probe(path)
        n_frames, sides = info.n_frames, (info.height, info.width)
        if self.fps is not None and n_frames > 1:
            n_frames = len(Timeline.read(path, self.fps))
        if self.crop_bars:
            _, sides = content_of(path, sides)
        return Size(min(n_frames, self.clip_frames or n_frames), *sides)

    def all(self, folder: epath.PathLike, entries: Entries) -> Iterator[Size | None]:
        """That of each entry, in order, by processes."""
        n, function = min(16, os.cpu_count() or 1), functools.partial(self, folder)
        with (
            ThreadPoolExecutor(n) as pool,
            Workers(function, self.timeout) as workers,
            tqdm(total=len(entries), desc="sizes", unit="video") as bar,
        ):
            todo = iter(entries)
            while some := list(itertools.islice(todo, _AT_ONCE)):
                for size in pool.map(functools.partial(_ask, workers), some):
                    bar.update()
                    yield size


def _ask(workers: Workers, entry: dict[str, Any]) -> Size | None:
    try:
        (size,) = workers(entry)
    except Ended:
        return None
    return size


def sort(
    entries: Entries,
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
    once: dict[Size | None, Size | None] = {}  # each size, of which there are few
    clips = [once.setdefault(size, size) for size in measuring.all(videos, entries)]
    if asked["buckets"] == buckets.AUTO:
        known = [clip for clip in clips if clip is not None]
        limits = (asked["bucket_tokens"], asked["most_frames"])
        sizes = buckets.suitable(known, windows, cell, *limits)
    else:
        sizes = buckets.parse(asked["buckets"])
    numbers = {size: k for k, size in enumerate(sizes)}
    return sizes, [numbers[buckets.nearest(clip, sizes)] if clip else 0 for clip in clips]
