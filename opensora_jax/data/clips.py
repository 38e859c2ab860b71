"""Decodes videos as they go into a dataset, by threads, a few ahead of whoever takes them."""

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.data import archives, video_io
from opensora_jax.data.captions import PROBLEM
from opensora_jax.windows import Windows


@dataclass(frozen=True)
class Clip:
    """A decoded video."""

    frames_THWC: np.ndarray  # uint8
    fps: float


@dataclass(frozen=True)
class LeftOut:
    """A video that does not go into the dataset: `Filtered` or `Failed`."""

    file: str
    reason: str


class Filtered(LeftOut):
    """Too long or too short."""


class Failed(LeftOut):
    """Cannot be read."""


@dataclass(frozen=True)
class Decoding:
    """How videos are decoded.

    Attributes:
      resolution: (height, width) in pixels that videos are resized and cropped to.
      fps: frames per second that videos are resampled to; None keeps each video's own rate.
      max_frames: a video with more frames than this (after resampling) is filtered, unless it is
        cut to `n_frames` anyway. None: none is.
      n_frames: cut every video to this many frames, and filter shorter ones. None keeps all frames
        but for a rest that does not fit.
      windows: which lengths fit.
      min_side: pixels of the file's shorter side; smaller ones are filtered.
      min_motion: by which pixels differ on average from one frame to the next, of 255; what moves
        less is filtered. Of one frame there is none to tell.
      min_brightness: of pixels on average in the brightest frame, of 255; darker ones are filtered.
    """

    resolution: tuple[int, int]
    fps: float | None
    max_frames: int | None
    n_frames: int | None
    windows: Windows
    min_side: int = 0
    min_motion: float = 0.0
    min_brightness: float = 0.0

    def __call__(self, folder: epath.PathLike, entry: dict[str, Any]) -> Clip | LeftOut:
        """What becomes of an entry of `read_captions`.

        Args:
          folder: where its file is, of this machine or in an object store.
        """
        name = entry["file"]
        if PROBLEM in entry:
            return Failed(name, entry[PROBLEM])
        try:
            name.encode()
            _expect_inside(epath.Path(folder), name)
            with archives.member(folder, name) as path:
                info = video_io.probe(path)  # to its end, which is to be there even if it is cut
                frames_THWC = video_io.read_video(
                    path,
                    resolution=self.resolution,
                    fps=self.fps,
                    n_frames=self.n_frames,
                    max_frames=None if self.n_frames else self.max_frames,
                )
        except UnicodeEncodeError:  # the dataset's columns are UTF-8
            return Failed(name, "its name is not Unicode text")
        except video_io.TooLong as error:
            return Filtered(name, error.reason)
        except video_io.VideoError as error:
            return Failed(name, error.reason)
        except FileNotFoundError:  # of an object store
            return Failed(name, "no such file")
        except archives.ArchiveError as error:
            return Failed(name, str(error))
        needed = self.n_frames or self.windows.least
        if len(frames_THWC) < needed:
            return Filtered(name, f"{len(frames_THWC)} frames, expected at least {needed}")
        frames_THWC = frames_THWC[: self.windows.fit(len(frames_THWC))]
        reason = self._why_filtered(frames_THWC, info)
        return Filtered(name, reason) if reason else Clip(frames_THWC, self.fps or info.fps)

    def _why_filtered(self, frames_THWC: np.ndarray, info: video_io.VideoInfo) -> str | None:
        if min(info.height, info.width) < self.min_side:
            size = f"{info.width} x {info.height} pixels"
            return f"{size}, expected a side of at least {self.min_side}"
        if self.min_brightness:
            brightest = max(frame.mean() for frame in frames_THWC)
            if brightest < self.min_brightness:
                return f"dark: {brightest:.2f} of 255, expected at least {self.min_brightness:g}"
        if self.min_motion and len(frames_THWC) > 1:
            moved = motion(frames_THWC)
            if moved < self.min_motion:
                return f"still: moves by {moved:.2f} of 255, expected at least {self.min_motion:g}"
        return None


def motion(frames_THWC: np.ndarray) -> float:
    """By how much pixels differ on average from one frame to the next, of 255; 0 of one frame."""
    pairs = itertools.pairwise(frames_THWC.astype(np.int16))
    return float(np.mean([abs(b - a).mean() for a, b in pairs] or [0.0]))


def _expect_inside(folder: epath.Path, name: str) -> None:
    """Sees that a file of this machine's lies in the folder, also where it is a link.

    Raises:
      VideoError: it does not.
    """
    if files.is_remote(folder) or "\0" in name:
        return
    path = os.path.join(folder, name)
    root, real = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([root, real]) != root:
        raise video_io.VideoError(path, "a link that leads out of the video folder")


def decode_clips(
    decoding: Decoding, folder: epath.PathLike, entries: Iterable[dict[str, Any]]
) -> Iterator[Clip | LeftOut]:
    """Yields what becomes of each entry, in order."""
    n_threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(n_threads) as pool:
        yield from map_ahead(pool, functools.partial(decoding, folder), entries, n_threads + 1)


def map_ahead(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, n_ahead: int
) -> Iterator:
    """As `pool.map`, which begins all at once, with at most `n_ahead` results that wait."""
    under_way = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > n_ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
