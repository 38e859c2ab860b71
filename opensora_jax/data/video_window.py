"""Reads some frames from the middle of a video, and decodes little more than these.

A file's packets say when each frame is shown and where decoding can begin, and are read without
decoding. From the key frame before the first wanted frame on, frames that neither are wanted nor
refer to others are skipped by the decoder.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from opensora_jax.data import video_file, video_io
from opensora_jax.data.video_file import VideoError


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Which frames a video shows when, at some rate.

    Attributes:
      frames: (T,) of the frames as they are stored, in the order in which they are shown, the one
        that is shown at each time of that rate.
      pts: (number of stored frames,) presentation timestamps in ticks of the stream, ascending;
        None where the file does not say them all, so that it must be read from its begin.
      keys: pts of the frames at which decoding can begin, ascending.
      tick: seconds of a tick.
    """

    path: Path
    fps: float | None
    frames: np.ndarray
    pts: np.ndarray | None
    keys: np.ndarray
    tick: float

    def __len__(self) -> int:
        return len(self.frames)

    @classmethod
    def read(cls, path: str | os.PathLike, fps: float | None = None) -> "Timeline":
        """That of a file, resampled to `fps` as by `video_io.read_video`, without decoding it.

        Raises:
          VideoError: missing, truncated or not a video.
        """
        path = Path(path)
        with video_file.opened(path) as (container, stream):
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in video_file.shown_packets(path, container, stream)
            ]
            tick, rate = float(stream.time_base), video_file.usual_rate(stream)
        known = {pts for pts, _ in packets}
        if None in known or len(known) < len(packets):
            n = len(packets)
            if fps is not None:
                n = sum(1 for _ in video_io.read_frames(path, resolution=8, fps=fps))
            frames = np.arange(n)
            return cls(path, fps, frames, None, np.zeros(0, np.int64), tick)
        pts = np.array(sorted(known), np.int64)
        frames = np.arange(len(pts))
        if fps is not None:
            timed = ((i, tick * int(ticks)) for i, ticks in enumerate(pts))
            frames = np.fromiter(video_io.resample(path, timed, rate, fps), np.int64)
        keys = np.array(sorted(pts for pts, is_key in packets if is_key), np.int64)
        return cls(path, fps, frames, pts, keys, tick)

    def seconds(self, number: int, fps: float) -> float:
        """When a frame is shown, from the first one on.

        Args:
          fps: frames per second where the file says no times.
        """
        if self.fps is not None or self.pts is None:
            return number / (self.fps or fps)
        return float((self.pts[number] - self.pts[0]) * self.tick)

    def window(self, start: int, n_frames: int, resolution: int) -> np.ndarray:
        """Frames `start` to `start + n_frames` at this rate, uint8 (n_frames, H, W, 3).

        The same as `video_io.read_video` gives.

        Args:
          resolution: height and width that they are resized and cropped to.

        Raises:
          VideoError: a frame that is needed is damaged or missing.
        """
        return np.stack(list(self.images(range(start, start + n_frames), resolution)))

    def images(
        self,
        numbers: Sequence[int],
        resolution: int | tuple[int, int],
        box: video_io.Box | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields the frames of these numbers at this rate, ascending, uint8 (H, W, 3).

        The same as `video_io.read_video` gives; little more than these is decoded.

        Args:
          resolution: (height, width) that they are resized and cropped to, or one number for both.
          box: what of each frame is there; None: all.

        Raises:
          VideoError: a frame that is needed is damaged or missing.
        """
        n = 0
        if self.pts is not None and len(numbers):
            for image in self._found(self.pts[self.frames[numbers]], resolution, box):
                yield image
                n += 1
        if n == len(numbers):
            return
        # Not all of them were found, whole, where they were said to be.
        numbers, place = numbers[n:], numbers[n]
        frames = video_io.read_frames(
            self.path, resolution=resolution, fps=self.fps, start=place, box=box
        )
        wanted = iter(numbers)
        for number in wanted:
            image = next(itertools.islice(frames, number - place, None), None)
            if image is None:
                raise VideoError(self.path, f"frames {numbers[0]} to {numbers[-1]} are not there")
            yield image
            place = number + 1

    def _found(
        self,
        pts: np.ndarray,
        resolution: int | tuple[int, int],
        box: video_io.Box | None,
    ) -> Iterator[np.ndarray]:
        """Images of the frames with these timestamps, up to the first that is not found whole."""
        size = (resolution, resolution) if isinstance(resolution, int) else resolution
        reformatter = VideoReformatter()
        with video_file.opened(self.path) as (container, stream):
            aspect = video_file.pixel_aspect(self.path, stream)
            is_begin = True
            for run in self._runs(pts):
                key = self.keys[: np.searchsorted(self.keys, run[0], "right")]
                if len(key) and key[-1] > self.pts[0]:
                    if is_begin:
                        # The decoder has to see the begin, where x264 says which of its versions
                        # wrote it: of 4:4:4 by older ones the rest means something else.
                        next(container.demux(stream)).decode()
                    container.seek(int(key[-1]), stream=stream)
                is_begin = False
                images = self._decode(container, stream, run)
                for time, n in zip(*np.unique(run, return_counts=True), strict=True):
                    frame = next(images, None)
                    if frame is None or frame.pts != time:
                        return
                    image = video_io.to_image(reformatter, frame, aspect, size, box)
                    yield from itertools.repeat(image, n)

    def _runs(self, pts: np.ndarray) -> list[np.ndarray]:
        """Timestamps parted where a key frame lets the decoder leave out what is between."""
        key = np.searchsorted(self.keys, pts, "right")  # the number of key frames up to each
        next_stored = np.searchsorted(self.pts, pts, "right")
        after = self.pts[np.minimum(next_stored, len(self.pts) - 1)]
        # A key frame lies after the frame that follows the one, and not after the other.
        is_gap = key[1:] > np.searchsorted(self.keys, after[:-1], "right")
        return np.split(pts, np.flatnonzero(is_gap) + 1)

    def _decode(self, container, stream, pts: np.ndarray) -> Iterator[av.VideoFrame]:
        """The frames with these timestamps, as far as they are found and whole."""
        wanted, last = set(pts.tolist()), int(pts[-1])
        for packet in container.demux(stream):
            # None marks the end, where the decoder gives what it still holds.
            is_wanted = packet.pts is None or packet.pts in wanted
            stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            for frame in packet.decode():
                if frame.pts in wanted:
                    if frame.is_corrupt:
                        return
                    yield frame
                if frame.pts is not None and frame.pts >= last:
                    return
