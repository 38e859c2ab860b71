"""Reads and writes video files; arrays are uint8 (T, H, W, 3), RGB.

Reading keeps to what a file really holds: frames are counted, timestamps decide which frame is
shown when, and everything that is wrong with a file becomes a `VideoError` that names it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

# Frames repeated over a longer gap than this are a broken timestamp, not a slow video.
_LONGEST_GAP_SECONDS = 60
# Matroska and others round times to 1/1000 s: the end is not known better than this.
_TIME_ERROR_SECONDS = 0.002
# Titles and tags in unknown encodings are nothing to fail for; PyAV 19 never does, and has no
# such option.
_OPEN_OPTIONS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


class VideoError(ValueError):
    """A video file cannot be read or written; the message names the file and the reason."""


class TooLong(VideoError):
    """A video has more frames than the caller allows."""


@dataclass(frozen=True)
class VideoInfo:
    n_frames: int
    fps: float
    height: int  # as shown, after rotation
    width: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Counts the frames (without decoding them) and reads rate and size.

    Raises:
      VideoError: missing, truncated, not a video, or without any frame.
    """
    path = Path(path)
    with _opened(path) as (container, stream):
        pts = [packet.pts for packet in _packets(container, stream)]
        fps = _usual_rate(stream)
        if len(pts) > 1 and None not in pts and max(pts) > min(pts):
            # The mean rate; what a container claims is often a guess from its first frames.
            fps = (len(pts) - 1) / float((max(pts) - min(pts)) * stream.time_base)
    with _opened(path) as (container, stream):
        frame = next(_decode(path, container, stream), None)
        if frame is None:
            raise VideoError(f"{path}: no frames")
        height, width = _shown_size(frame)
        return VideoInfo(len(pts), fps, height, width)


def read_video(
    path: str | os.PathLike,
    *,
    resolution: int | tuple[int, int] | None = None,
    fps: float | None = None,
    start: int = 0,
    n_frames: int | None = None,
    max_frames: int | None = None,
) -> np.ndarray:
    """Reads frames as uint8 (T, H, W, 3) RGB; decodes no further than it has to.

    Args:
      resolution: (height, width), or one number for both: the video is resized (antialiased) until
        it just covers this size, then cropped to it around the centre. None keeps the file's size.
      fps: resample to this rate: output k is the frame whose timestamp is nearest to k / fps
        seconds after the first. None gives each frame once, whatever its timestamp.
      start: how many output frames (at `fps`) to skip.
      n_frames: how many output frames to read at most; the result is shorter where the video ends.
      max_frames: refuse a file with more frames than this, before decoding it.

    Raises:
      TooLong: more than max_frames frames in the file.
      VideoError: missing, truncated, damaged, not a video, or no frame left after `start`. A file
        without an index (.mkv, .webm, .ts) does not tell that its end is missing: it is read as far
        as it goes.
    """
    path = Path(path)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    _check_arguments(size, fps, start, n_frames)
    if max_frames is not None:
        with _opened(path) as (container, stream):
            for count, _ in enumerate(_packets(container, stream), start=1):
                if count > max_frames:
                    raise TooLong(f"{path}: more than {max_frames} frames")
    images = []
    reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
    with _opened(path) as (container, stream):
        frames = _decode(path, container, stream)
        if fps is not None:
            frames = _resample(path, frames, stream, fps)
        for k, frame in enumerate(frames):
            if n_frames is not None and k >= start + n_frames:
                break
            if k < start:
                continue
            # Frames of another size (a stream may change its own) follow the first one's.
            shape = size or (images[0].shape[:2] if images else None)
            images.append(_to_image(reformatter, frame, shape))
    if not images:
        raise VideoError(f"{path}: no frames" + (f" from frame {start} on" if start else ""))
    return np.stack(images)


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, crf: int = 12) -> None:
    """Writes frames to .mp4 (H.264, yuv420p) or .gif, by suffix; same frames, same bytes.

    The file appears under its name only when it is whole. A .gif's frame times are rounded to
    1/100 s, and equal neighbouring frames become one longer frame.

    Args:
      frames: uint8 (T, H, W, 3).
      crf: H.264's constant rate factor, 0 (lossless) to 51; not used for .gif.

    Raises:
      VideoError: another suffix, no such folder, wrong frames or rate, or an odd height or width
        for .mp4.
    """
    path = Path(path)
    frames = np.asarray(frames)
    if path.suffix not in _ENCODERS:
        raise VideoError(f"{path}: suffix {path.suffix!r}: expected .mp4 or .gif")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise VideoError(
            f"{path}: frames are {frames.dtype} {frames.shape}: expected uint8 (T, H, W, 3)"
        )
    if not fps > 0:
        raise VideoError(f"{path}: fps={fps}: expected more than 0")
    if not path.parent.is_dir():
        raise VideoError(f"{path}: the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _ENCODERS[path.suffix](temporary, frames, fps, crf, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_mp4(temporary, frames, fps, crf, path):
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise VideoError(f"{path}: {height} x {width} pixels: .mp4 needs an even height and width")
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(temporary), "w", format="mp4") as container:
        # One thread: thousands of tiny videos are written, and threads cost more than they bring.
        # No macroblock tree: with it x264 writes small frames differently from time to time.
        options = {"crf": str(crf), "preset": "fast", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(temporary, frames, fps, crf, path):
    milliseconds = max(10, round(100 / fps) * 10)
    iio.imwrite(temporary, frames, extension=".gif", plugin="pillow", duration=milliseconds, loop=0)


_ENCODERS = {".mp4": _write_mp4, ".gif": _write_gif}


def _check_arguments(size, fps, start, n_frames):
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"resolution={size}: expected (height, width), both at least 1")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps={fps}: expected more than 0")
    if start < 0 or (n_frames is not None and n_frames < 1):
        raise ValueError(f"start={start}, n_frames={n_frames}: expected at least 0 and at least 1")


@contextmanager
def _opened(path):
    """Opens the file and its first real video stream; libav's errors become VideoErrors."""
    path = Path(path)
    if not path.is_file():  # checked first: libav also opens addresses, devices and pipes
        raise VideoError(f"{path}: no such file")
    try:
        with av.open(str(path), **_OPEN_OPTIONS) as container:
            stream = _video_stream(path, container)
            stream.codec_context.thread_count = 1  # callers run many files at once
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(f"{path}: cannot be read as a video: {error.strerror}") from error
    except IndexError as error:  # PyAV, where a damaged file starts a new stream half-way
        raise VideoError(f"{path}: damaged: the number of streams changes") from error


def _video_stream(path, container):
    # libav also "plays" pictures and text files.
    name = container.format.name
    if name in ("tty", "image2") or name.endswith("_pipe"):
        raise VideoError(f"{path}: not a video (read as {name!r})")
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            break
    else:
        raise VideoError(f"{path}: has no video stream")
    if stream.codec_context is None:
        raise VideoError(f"{path}: damaged, or made with a codec that is not known")
    file_size = path.stat().st_size
    if any(entry.pos + entry.size > file_size for entry in stream.index_entries):
        raise VideoError(f"{path}: truncated: its index points past the end of the file")
    if name == "gif" and not _ends_with_gif_trailer(path):
        raise VideoError(f"{path}: truncated: no GIF trailer at the end of the file")
    return stream


def _ends_with_gif_trailer(path):
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip(b"\0").endswith(b";")


def _packets(container, stream) -> Iterator[av.Packet]:
    """The packets that hold a frame to show: one a frame, and cheap to count."""
    return (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _usual_rate(stream):
    return float(stream.average_rate or stream.guessed_rate or 25)  # 25: libav's own guess


def _decode(path, container, stream) -> Iterator[av.VideoFrame]:
    for i, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise VideoError(f"{path}: frame {i} is damaged")
        yield frame


def _resample(path, frames, stream, fps) -> Iterator[av.VideoFrame]:
    """Yields, for k = 0, 1, ..., the frame whose time is nearest to k / fps after the first."""
    usual = 1 / _usual_rate(stream)
    k, first, shown, time, length = 0, None, None, 0.0, usual
    for frame in frames:
        if shown is None:
            first = frame.time or 0.0
        else:
            # A frame without a time, or with an earlier one, follows at the usual rate.
            now = time + usual if frame.time is None else frame.time - first
            length = now - time if now > time else usual
            if length > _LONGEST_GAP_SECONDS:
                raise VideoError(f"{path}: timestamps jump by {length:.0f} s at {time:.3f} s")
            while k / fps <= time + length / 2:
                yield shown
                k += 1
            time += length
        shown = frame
    while shown is not None and k / fps < time + length - _TIME_ERROR_SECONDS:
        yield shown
        k += 1


def _shown_size(frame):
    turned = frame.rotation % 180 != 0
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _to_image(reformatter, frame, size):
    """Converts to RGB, rotates as the file says, resizes to cover `size`, crops the centre."""
    height, width = _shown_size(frame)
    out_height, out_width = size or (height, width)
    scale = max(out_height / height, out_width / width)
    covered = (max(out_height, round(height * scale)), max(out_width, round(width * scale)))
    to_height, to_width = covered[::-1] if frame.rotation % 180 else covered
    # swscale widens the bicubic kernel when it shrinks: no aliasing.
    image = reformatter.reformat(
        frame, to_width, to_height, "rgb24", interpolation=Interpolation.BICUBIC, threads=1
    ).to_ndarray()
    image = np.rot90(image, round(frame.rotation / 90) % 4)
    top, left = (covered[0] - out_height) // 2, (covered[1] - out_width) // 2
    return image[top : top + out_height, left : left + out_width]
