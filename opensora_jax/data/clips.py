"""Decodes videos as they go into a dataset, by processes, a few ahead of whoever takes them.

A video is never held whole: its frames come in windows, as they are encoded, and in the end what
becomes of the clips that they belong to.
"""

import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from opensora_jax import files, web
from opensora_jax.data import archives, shots, video_io
from opensora_jax.data.captions import PROBLEM
from opensora_jax.data.looks import FIGURES, Look, content
from opensora_jax.data.video_window import Timeline
from opensora_jax.data.workers import Ended, Workers
from opensora_jax.windows import Windows


@dataclass(frozen=True)
class Window:
    """Frames of a clip that are encoded together.

    Attributes:
      clip: the clip's number in its video.
      frames_THWC: uint8, of a T that fits (`Windows.fit`).
    """

    clip: int
    frames_THWC: np.ndarray


@dataclass(frozen=True)
class Clip:
    """A clip that goes into the dataset.

    Attributes:
      fps: frames per second.
      n_frames, n_windows: that were given of it.
      start: seconds from the video's begin to its own; None of a whole video.
      figures: what it shows, of `looks.FIGURES` those that were asked for.
      hash: what it looks like, as `Look.hash` says, if it was asked for.
    """

    fps: float
    n_frames: int
    n_windows: int
    start: float | None = None
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    hash: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A video, or a clip of it, that does not go into the dataset: `Filtered` or `Failed`.

    Attributes:
      like: the file of the clip that it is a near-duplicate of.
    """

    file: str
    reason: str
    start: float | None = None
    figures: dict[str, float] = field(default_factory=dict, compare=False)
    like: str | None = None


class Filtered(LeftOut):
    """Too long or too short, or does not show enough."""


class Failed(LeftOut):
    """Cannot be read: the whole video."""


# What became of the clips of a video, in order; one `Failed` alone where it cannot be read.
Outcome = list[Clip | LeftOut]


# Videos that are begun while one before them is not over: of these codes are held.
_MOST_AHEAD = 1000

# What is the matter with one video, and not with a disk or a server.
UNUSABLE = (video_io.VideoError, FileNotFoundError, web.WebError, archives.ArchiveError)

# Frames by which bars are found.
_LOOKED_AT = 8
# Of a clip: timestamps can ask for any number of repetitions of a frame.
_MOST_FRAMES = 2**20


@dataclass(frozen=True)
class Decoding:
    """How videos are decoded.

    Attributes:
      resolution: (height, width) in pixels that videos are resized and cropped to.
      fps: frames per second that videos are resampled to; None keeps each video's own rate.
      max_frames: a video with more frames than this (after resampling) is filtered, unless it is
        cut to `n_frames` or `clip_frames` anyway. None: none is but beyond _MOST_FRAMES.
      n_frames: cut every video, or clip, to this many frames, and filter shorter ones. None keeps
        all frames but for a rest that does not fit.
      windows: which lengths fit.
      images: only images are kept, each a clip that is repeated to `n_frames`.
      clip_frames: cut every video into clips of this many frames, and filter those of fewer than
        `n_frames` or, without it, than this; a rest is dropped. 0: a video is one clip.
      clip_stride: frames from the begin of a clip to that of the next; 0: clip_frames.
      split_scenes: cut every video where another shot begins, so that no clip spans two.
      crop_bars: cut black bars off before videos are resized, where they are throughout.
      min_side: pixels of the file's shorter side, without these bars; smaller ones are filtered.
      min_motion: by which pixels differ on average from one frame to the next, of 255; what moves
        less is filtered. Of one frame there is none to tell.
      min_brightness: of pixels on average in the brightest frame, of 255; darker ones are filtered.
      max_frozen: share of frames in the longest run of equal ones; what stands still for longer is
        filtered. 0: nothing is.
      near_duplicates: whether clips get a hash, by which they can be told; 0: they do not.
      measure: whether all figures are measured, also those that nothing is filtered by.
    """

    resolution: tuple[int, int]
    fps: float | None
    max_frames: int | None
    n_frames: int | None
    windows: Windows
    images: bool = False
    clip_frames: int = 0
    clip_stride: int = 0
    split_scenes: bool = False
    crop_bars: bool = False
    min_side: int = 0
    min_motion: float = 0.0
    min_brightness: float = 0.0
    max_frozen: float = 0.0
    near_duplicates: int = 0
    measure: bool = False

    def __call__(self, folder: epath.PathLike, entry: dict[str, Any]) -> Iterator[Window | Outcome]:
        """What becomes of an entry of `read_captions`.

        Yields windows, those of each clip in order, and last the outcome: of each clip, by its
        number, whether it goes into the dataset. Of what does not, windows have come in vain.

        Args:
          folder: where its file is, of this machine or in an object store.
        """
        name = entry["file"]
        if PROBLEM in entry:
            yield [Failed(name, entry[PROBLEM])]
            return
        try:
            name.encode()
            expect_inside(epath.Path(folder), name)
            with archives.member(folder, name) as path:
                outcome = yield from self._clips(path, name)
        except UnicodeEncodeError:  # the dataset's columns are UTF-8
            outcome = [Failed(name, "its name is not Unicode text")]
        except UNUSABLE as error:
            outcome = [Failed(name, _reason(error))]
        yield outcome

    def _clips(self, path: Path, name: str) -> Iterator[Window]:
        """Yields windows; returns the outcome."""
        info = video_io.probe(path)  # to its end, which is to be there even if it is cut
        box, size = None, (info.height, info.width)
        if self.crop_bars:
            box, size = content_of(path, size)
        if min(size) < self.min_side:
            found = f"{size[1]} x {size[0]} pixels"
            reason = f"{found}, expected a side of at least {self.min_side}"
            return [Filtered(name, reason, figures=self._side(size))]
        if self.images and info.n_frames > 1:
            return [Filtered(name, f"{info.n_frames} frames, expected an image")]
        fps = self.fps or info.fps
        if (self.clip_frames or self.split_scenes) and not self.images:
            timeline = Timeline.read(path, self.fps)
            parts = [range(len(timeline))]
            if self.split_scenes:
                parts = shots.of_timeline(timeline, (info.height, info.width))
            spans = [span for part in parts for span in self._spans(part)]
            is_wanted = np.zeros(len(timeline), bool)
            clips = []
            for span in spans:
                clip = _Growing(self, name, len(clips), fps, timeline.seconds(span.start, fps))
                is_wanted[span.start : span.stop] = clip.may_have(len(span))
                clips.append(clip)
            numbers = np.flatnonzero(is_wanted).tolist()
            images = timeline.images(numbers, self.resolution, box)
            numbered = zip(numbers, images, strict=True)
        else:
            images = video_io.read_frames(path, resolution=self.resolution, fps=self.fps, box=box)
            most = self.n_frames or self._limit + 1
            if self.images:
                images = itertools.repeat(next(images))
            spans, clips = [range(most)], [_Growing(self, name, 0, fps)]
            numbered = enumerate(itertools.islice(images, most))
        for clip in clips:
            clip.figures |= self._side(size)
        first = 0  # of the clips that are not over
        for number, frame_HWC in numbered:
            while spans[first].stop <= number:
                yield from clips[first].end()
                first += 1
            k = first
            while k < len(spans) and spans[k].start <= number:
                yield from clips[k].add(frame_HWC)
                k += 1
        for clip in clips[first:]:
            yield from clip.end()
        return [clip.outcome for clip in clips]

    def _spans(self, shot: range) -> list[range]:
        """The frames of each clip of a shot; of one that is too short, all of them."""
        n = self.clip_frames or max(len(shot), 1)
        starts = range(0, max(len(shot) - n, 0) + 1, self.clip_stride or n)
        return [shot[i : i + n][: self.n_frames] for i in starts]

    @property
    def _least(self) -> int:
        """Frames of the shortest clip."""
        return self.n_frames or self.clip_frames or self.windows.least

    @property
    def _limit(self) -> int:
        """Frames of the longest."""
        is_cut = self.n_frames or self.clip_frames
        return (None if is_cut else self.max_frames) or _MOST_FRAMES

    @property
    def _figures(self) -> frozenset[str]:
        """Those that are to be measured."""
        filters = {
            "motion": self.min_motion,
            "brightness": self.min_brightness,
            "frozen": self.max_frozen,
            "side": self.min_side,
        }
        return frozenset(name for name in FIGURES if self.measure or filters[name])

    def _side(self, size: tuple[int, int]) -> dict[str, float]:
        return {"side": min(size)} if "side" in self._figures else {}

    def _why_filtered(self, figures: dict[str, float], is_image: bool) -> str | None:
        if self.min_brightness and figures["brightness"] < self.min_brightness:
            found = figures["brightness"]
            return f"dark: {found:.2f} of 255, expected at least {self.min_brightness:g}"
        if self.min_motion and not is_image and figures["motion"] < self.min_motion:
            found = figures["motion"]
            return f"still: moves by {found:.2f} of 255, expected at least {self.min_motion:g}"
        if self.max_frozen and figures["frozen"] > self.max_frozen:
            found = figures["frozen"]
            return f"frozen: for {found:.2f} of its length, expected at most {self.max_frozen:g}"
        return None


class _Growing:
    """A clip whose frames come one by one: gives windows of them and, when it ends, `outcome`."""

    def __init__(
        self, decoding: Decoding, name: str, number: int, fps: float, start: float | None = None
    ):
        self._decoding, self._name, self._number = decoding, name, number
        self._fps, self._start = fps, start
        self._waiting: list[np.ndarray] = []
        self._n_frames, self._n_windows = 0, 0
        self._look = Look(decoding._figures, bool(decoding.near_duplicates))
        self.figures: dict[str, float] = {}
        self.outcome: Clip | LeftOut | None = None

    def may_have(self, n_frames: int) -> bool:
        """Whether a clip may have so many frames; it is left out where it may not."""
        least, limit = self._decoding._least, self._decoding._limit
        if n_frames < least:
            self._leave_out(f"{n_frames} frames, expected at least {least}")
        if n_frames > limit:
            self._leave_out(f"more than {limit} frames")
        return not self.outcome

    def add(self, frame_HWC: np.ndarray) -> Iterator[Window]:
        self._n_frames += 1
        self._waiting.append(frame_HWC)
        if len(self._waiting) == self._decoding.windows.frames:
            yield self._window()

    def end(self) -> Iterator[Window]:
        if self.outcome or not self.may_have(self._n_frames):
            return
        n_frames = self._decoding.windows.fit(self._n_frames)
        rest = n_frames % self._decoding.windows.frames
        del self._waiting[rest:]
        if rest:
            yield self._window()
        self.figures |= self._look.figures()
        is_image = self._decoding.images or self._n_frames == 1
        if reason := self._decoding._why_filtered(self.figures, is_image):
            self._leave_out(reason)
            return
        counted = (self._fps, n_frames, self._n_windows, self._start)
        self.outcome = Clip(*counted, self.figures, self._look.hash())

    def _leave_out(self, reason: str) -> None:
        if not self.outcome:
            self.outcome = Filtered(self._name, reason, self._start, self.figures)

    def _window(self) -> Window:
        frames_THWC = np.stack(self._waiting)
        self._waiting.clear()
        self._look.add(frames_THWC[:1] if self._decoding.images else frames_THWC)
        self._n_windows += 1
        return Window(self._number, frames_THWC)


def _reason(error: Exception) -> str:
    match error:
        case video_io.VideoError():
            return error.reason
        case FileNotFoundError():
            return "no such file"
    return str(error)


def content_of(path: Path, size: tuple[int, int]) -> tuple[video_io.Box | None, tuple[int, int]]:
    """Where in a video of this (height, width), by frames spread over it, its content is without
    bars, None where there are none, and the size of that."""
    timeline = Timeline.read(path)
    numbers = np.linspace(0, len(timeline) - 1, _LOOKED_AT).round().astype(int)
    box = content(timeline.images(np.unique(numbers).tolist(), size), size)
    top, bottom, left, right = box or (0, 1, 0, 1)
    return box, (round(size[0] * (bottom - top)), round(size[1] * (right - left)))


def expect_inside(folder: epath.Path, name: str) -> None:
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
    decoding: Decoding,
    folder: epath.PathLike,
    entries: Iterable[dict[str, Any]],
    timeout: float | None = None,
    n_ahead: int = 2,
) -> Iterator[tuple[int, Window | Outcome]]:
    """Yields, with the entry's number, what `decoding` gives of each, by processes.

    Those of one entry come in order, those of several mixed.

    Args:
      timeout: seconds of decoding after which a video counts as failed; None: there is no limit.
      n_ahead: videos that are begun although all cores are busy: each holds a process, and a window
        or two.
    """
    n_threads = min(16, os.cpu_count() or 1)
    most = n_threads + n_ahead
    todo = enumerate(entries)
    under_way: dict[Future, tuple[int, Iterator[Window | Outcome]]] = {}
    begun = 0
    function = functools.partial(decoding, folder)
    with ThreadPoolExecutor(n_threads) as pool, Workers(function, timeout) as workers:
        while True:
            oldest = min((i for i, _ in under_way.values()), default=begun)
            n = min(most - len(under_way), oldest + _MOST_AHEAD - begun)
            for i, entry in itertools.islice(todo, n):
                begun = i + 1
                pieces = decode_apart(workers, entry)
                under_way[pool.submit(next, pieces, None)] = i, pieces
            if not under_way:
                return
            ended, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in ended:
                i, pieces = under_way.pop(future)
                if (piece := future.result()) is not None:
                    under_way[pool.submit(next, pieces, None)] = i, pieces
                    yield i, piece


def decode_apart(workers: Workers, entry: dict[str, Any]) -> Iterator[Window | Outcome]:
    """What a process gives of an entry; the outcome is that it failed if it hung or crashed."""
    try:
        yield from workers(entry)
    except Ended as error:
        yield [Failed(entry["file"], error.reason)]
