"""Reads some frames from the middle of a video, and decodes little more than these.

A file's packets say when each frame is shown and where decoding can begin, and are read without
decoding. From the key frame before the first wanted frame on, frames that neither are wanted nor
refer to others are skipped by the decoder.
"""

import dataclasses
import os
from pathlib import Path

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
    """

    path: Path
    fps: float | None
    frames: np.ndarray
    pts: np.ndarray | None
    keys: np.ndarray

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
            frames = np.arange(len(packets))
            if fps is not None:
                frames = np.arange(len(video_io.read_video(path, resolution=8, fps=fps)))
            return cls(path, fps, frames, None, np.zeros(0, np.int64))
        pts = np.array(sorted(known), np.int64)
        frames = np.arange(len(pts))
        if fps is not None:
            timed = ((i, tick * int(ticks)) for i, ticks in enumerate(pts))
            frames = np.fromiter(video_io.resample(path, timed, rate, fps), np.int64)
        keys = np.array(sorted(pts for pts, is_key in packets if is_key), np.int64)
        return cls(path, fps, frames, pts, keys)

    def window(self, start: int, n_frames: int, resolution: int) -> np.ndarray:
        """Frames `start` to `start + n_frames` at this rate, uint8 (n_frames, H, W, 3).

        The same as `video_io.read_video` gives.

        Args:
          resolution: height and width that they are resized and cropped to.

        Raises:
          VideoError: a frame that is needed is damaged or missing.
        """
        chosen = self.frames[start : start + n_frames]
        images = {} if self.pts is None else self._decode(self.pts[chosen], resolution)
        if len(images) < len(np.unique(chosen)):
            # Not all of them were found, whole, where they were said to be.
            found = video_io.read_video(
                *(self.path,), resolution=resolution, fps=self.fps, start=start, n_frames=n_frames
            )
            if len(found) < n_frames:
                raise VideoError(self.path, f"frames {start} to {start + n_frames} are not there")
            return found
        return np.stack([images[pts] for pts in self.pts[chosen].tolist()])

    def _decode(self, pts: np.ndarray, resolution: int) -> dict[int, np.ndarray]:
        """Images of the frames with these timestamps, as far as they are found and whole."""
        wanted = set(pts.tolist())
        first, last = min(wanted), max(wanted)
        images: dict[int, np.ndarray] = {}
        reformatter = VideoReformatter()
        with video_file.opened(self.path) as (container, stream):
            aspect = video_file.pixel_aspect(self.path, stream)
            keys = self.keys[self.keys <= first]
            if len(keys) and keys[-1] > self.pts[0]:
                # The decoder has to see the begin, where x264 says which of its versions wrote it:
                # of 4:4:4 by older ones the rest means something else.
                next(container.demux(stream)).decode()
                container.seek(int(keys[-1]), stream=stream)
            for packet in container.demux(stream):
                # None marks the end, where the decoder gives what it still holds.
                is_wanted = packet.pts is None or packet.pts in wanted
                stream.codec_context.skip_frame = "DEFAULT" if is_wanted else "NONREF"
                for frame in packet.decode():
                    if frame.pts in wanted:
                        if frame.is_corrupt:
                            return {}
                        shape = (resolution, resolution)
                        images[frame.pts] = video_io.to_image(reformatter, frame, aspect, shape)
                    if frame.pts is not None and (frame.pts > last or len(images) == len(wanted)):
                        return images
        return images
