"""Reads and writes videos; arrays are uint8 (T, H, W, 3), RGB.

Reading keeps to what a file really holds: frames are counted, and timestamps decide which frame is
shown when. imageio writes the .gif files, but not the .mp4 files: its plugin for PyAV hands no
options (crf) to the encoder, and takes a quarter of a second to close a file.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import imageio.v3 as iio
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from opensora_jax.data import video_file
from opensora_jax.data.video_file import VideoError

Frame = TypeVar("Frame")

# (top, bottom, left, right), shares of height and width as shown.
Box = tuple[float, float, float, float]

MIN_FPS, MAX_FPS = 0.01, 1000  # frames per second that are written, or resampled to
# Of one read: timestamps can ask for any number of repetitions of a frame.
_MOST_BYTES = 2**31
# Frames repeated over a longer gap than this are a broken timestamp, not a slow video.
_LONGEST_GAP_SECONDS = 60
# Matroska and others round times to 1/1000 s: the end is not known better than this.
_TIME_ERROR_SECONDS = 0.002
# Players take a video of so many lines for BT.709, and one of fewer for BT.601, if it names none.
_HD_LINES = 720
_UNSPECIFIED_MATRIX, _BT709_MATRIX = 2, 1  # libav's AVCOL_SPC_*


class TooLong(VideoError):
    """A video has more frames than the caller allows, or than memory should hold."""


def check_fps(fps: float) -> None:
    """Sees that files can be written, and read, at this rate.

    Raises:
      ValueError: it is not from MIN_FPS to MAX_FPS.
    """
    if not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps={fps}: expected {MIN_FPS} to {MAX_FPS} frames a second")


@dataclass(frozen=True)
class VideoInfo:
    n_frames: int
    fps: float
    height: int  # as shown: after turns, in square pixels
    width: int


def probe(path: str | os.PathLike) -> VideoInfo:
    """Counts the frames (without decoding them) and reads rate and size.

    Raises:
      VideoError: missing, truncated, not a video, without any frame, or with more than MAX_FPS
        frames a second.
    """
    path = Path(path)
    with video_file.opened(path) as (container, stream):
        pts = [packet.pts for packet in video_file.shown_packets(path, container, stream)]
        fps = video_file.usual_rate(stream)
        if len(pts) > 1 and None not in pts and max(pts) > min(pts):
            # The mean rate; what a container claims is often a guess from its first frames.
            fps = (len(pts) - 1) / float((max(pts) - min(pts)) * stream.time_base)
    if fps > MAX_FPS:
        raise VideoError(path, f"{fps:.4g} frames a second: expected at most {MAX_FPS}")
    with video_file.opened(path) as (container, stream):
        frame = next(video_file.decode(path, container, stream), None)
        if frame is None:
            raise VideoError(path, "no frames")
        _, turns = _orientation(frame)
        height, width = _shown_size(frame, video_file.pixel_aspect(path, stream), turns)
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
        it just covers this size, then cropped to it around the centre. None keeps the size that
        is shown: the file's, made wider or narrower where its pixels are not square.
      fps: resample to this rate, MIN_FPS to MAX_FPS: output k is the frame whose timestamp is
        nearest to k / fps seconds after the first. None gives each frame once, whatever its
        timestamp.
      start: how many output frames (at `fps`) to skip.
      n_frames: how many output frames to read at most; the result is shorter where the video ends.
      max_frames: refuse a video with more output frames (at `fps`) than this.

    Raises:
      ValueError: an argument out of range.
      TooLong: more than max_frames frames, or more than 2 GiB of frames to return.
      VideoError: missing, truncated, damaged, not a video, or no frame left after `start`. In a
        file without an index (.mkv, .webm) only a read to the end finds that the end is missing,
        and in one that does not state its length (.ts) none does.
    """
    _check_arguments(start, n_frames)
    images, indices = [], []  # a frame that is shown several times is one image
    frames = read_frames(path, resolution=resolution, fps=fps, start=start)
    for k, image in enumerate(itertools.islice(frames, n_frames), start):
        if max_frames is not None and k >= max_frames:
            raise TooLong(path, f"more than {max_frames} frames")
        if not images or image is not images[-1]:
            images.append(image)
        indices.append(len(images) - 1)
        if len(indices) * image.nbytes > _MOST_BYTES:
            raise TooLong(path, f"more than {_MOST_BYTES >> 30} GiB of frames")
    if not images:
        raise VideoError(path, "no frames" + (f" from frame {start} on" if start else ""))
    video = np.stack(images)
    return video if len(images) == len(indices) else video[indices]


def read_frames(
    path: str | os.PathLike,
    *,
    resolution: int | tuple[int, int] | None = None,
    fps: float | None = None,
    start: int = 0,
    box: Box | None = None,
) -> Iterator[np.ndarray]:
    """Yields frames as `read_video` gives them, uint8 (H, W, 3), one by one as they are decoded.

    One that is shown several times is the same array each time.

    Args:
      box: what of each frame is there; None: all. With a resolution alone.

    Raises:
      ValueError, VideoError: as `read_video`, but for what has no frames.
    """
    path = Path(path)
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    _check_size(size, fps)
    reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
    with video_file.opened(path) as (container, stream):
        aspect = video_file.pixel_aspect(path, stream)
        frames = video_file.decode(path, container, stream)
        if fps is not None:
            timed = ((frame, frame.time) for frame in frames)
            frames = resample(path, timed, video_file.usual_rate(stream), fps)
        previous = image = None
        for frame in itertools.islice(frames, start, None):
            if frame is not previous:
                # Frames of another size (a stream may change its own) follow the first one's.
                shape = size or (None if image is None else image.shape[:2])
                image = to_image(reformatter, frame, aspect, shape, box)
                previous = frame
            yield image


def write_video(path: str | os.PathLike, frames: np.ndarray, fps: float, crf: int = 12) -> None:
    """Writes frames to .mp4 (H.264, yuv420p), .mkv (H.264, RGB, every pixel as it is) or .gif, by
    suffix; same frames, same bytes.

    The file appears under its name only when it is whole. A .gif's frame times are rounded to
    1/100 s, and equal neighbouring frames become one longer frame.

    Args:
      frames: uint8 (T, H, W, 3).
      fps: MIN_FPS to MAX_FPS.
      crf: H.264's constant rate factor, 0 (lossless) to 51; of .mp4.

    Raises:
      VideoError: another suffix, no such folder or none that can be written, wrong frames or rate,
        or an odd height or width for .mp4.
    """
    path = Path(path)
    frames = np.asarray(frames)
    if path.suffix not in _ENCODERS:
        raise VideoError(path, f"suffix {path.suffix!r}: expected one of {' '.join(_ENCODERS)}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise VideoError(
            path, f"frames are {frames.dtype} {frames.shape}: expected uint8 (T, H, W, 3)"
        )
    height, width = frames.shape[1:3]
    if path.suffix == ".mp4" and (height % 2 or width % 2):
        raise VideoError(path, f"{height} x {width} pixels: .mp4 needs an even height and width")
    try:
        check_fps(fps)
    except ValueError as error:
        raise VideoError(path, str(error)) from None
    if not path.parent.is_dir():
        raise VideoError(path, f"the folder {path.parent} does not exist")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _ENCODERS[path.suffix](temporary, frames, fps, crf)
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise VideoError(path, f"cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _write_mp4(temporary, frames, fps, crf):
    height, width = frames.shape[1:3]
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(temporary), "w", format="mp4") as container:
        # One thread: thousands of tiny videos are written, and threads cost more than they bring.
        # No macroblock tree: with it x264 writes small frames differently from time to time.
        options = {"crf": str(crf), "preset": "fast", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        is_hd = height >= _HD_LINES
        if is_hd:
            stream.codec_context.colorspace = _BT709_MATRIX
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if is_hd:  # else the encoder's own conversion, by BT.601
                frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_mkv(temporary, frames, fps, crf):
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(temporary), "w", format="matroska") as container:
        options = {"qp": "0", "preset": "fast", "threads": "1", "mbtree": "0"}
        stream = container.add_stream("libx264rgb", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(temporary, frames, fps, crf):
    milliseconds = max(10, round(100 / fps) * 10)
    iio.imwrite(temporary, frames, extension=".gif", plugin="pillow", duration=milliseconds, loop=0)


_ENCODERS = {".mp4": _write_mp4, ".mkv": _write_mkv, ".gif": _write_gif}


def _check_size(size, fps):
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"resolution={size}: expected (height, width), both at least 1")
    if fps is not None:
        check_fps(fps)


def _check_arguments(start, n_frames):
    if start < 0 or (n_frames is not None and n_frames < 1):
        raise ValueError(f"start={start}, n_frames={n_frames}: expected at least 0 and at least 1")


def resample(
    path: Path, timed: Iterable[tuple[Frame, float | None]], rate: float, fps: float
) -> Iterator[Frame]:
    """Yields, for k = 0, 1, ..., the frame whose time is nearest to k / fps after the first.

    Args:
      timed: frames, or what stands for them, in order, and the seconds at which they are shown.
      rate: frames a second as the file claims.

    Raises:
      VideoError: times jump.
    """
    usual = min(1 / rate, _LONGEST_GAP_SECONDS)
    k, first, shown, time, length = 0, None, None, 0.0, usual
    for frame, seconds in timed:
        if shown is None:
            first = seconds or 0.0
        else:
            # A frame without a time, or with an earlier one, follows at the usual rate.
            now = time + usual if seconds is None else seconds - first
            length = now - time if now > time else usual
            if length > _LONGEST_GAP_SECONDS:
                raise VideoError(path, f"timestamps jump by {length:.0f} s at {time:.3f} s")
            while k / fps <= time + length / 2:
                yield shown
                k += 1
            time += length
        shown = frame
    while shown is not None and (k == 0 or k / fps < time + length - _TIME_ERROR_SECONDS):
        yield shown
        k += 1


def _orientation(frame):
    """(whether it is mirrored, left to right; quarter turns counterclockwise that follow)."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, 0
    # A pixel at (x, y), y downwards, is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrix, np.int32, 5).tolist()
    is_mirrored = a * d < b * c
    angle = math.atan2(-b, -a) if is_mirrored else math.atan2(b, a)  # clockwise
    return is_mirrored, round(-angle / (math.pi / 2)) % 4


def _shown_size(frame, aspect, turns):
    """(height, width) in square pixels, `aspect` being a pixel's width over its height."""
    width = max(1, round(frame.width * aspect))
    return (width, frame.height) if turns % 2 else (frame.height, width)


def to_image(
    reformatter: VideoReformatter,
    frame: av.VideoFrame,
    aspect: float,
    size: tuple[int, int] | None,
    box: Box | None = None,
) -> np.ndarray:
    """Converts to RGB, turns and mirrors as the file says, resizes to cover `size`, crops the
    centre.

    Args:
      box: the part of the frame, as it is shown, that is to cover `size`; None: all of it.
    """
    is_mirrored, turns = _orientation(frame)
    height, width = _shown_size(frame, aspect, turns)
    out_height, out_width = size or (height, width)
    top, bottom, left, right = box or (0, 1, 0, 1)
    scale = max(out_height / (height * (bottom - top)), out_width / (width * (right - left)))
    covered = (max(out_height, round(height * scale)), max(out_width, round(width * scale)))
    to_height, to_width = covered[::-1] if turns % 2 else covered
    is_hd = frame.colorspace == _UNSPECIFIED_MATRIX and frame.height >= _HD_LINES
    # swscale widens the bicubic kernel when it shrinks: no aliasing.
    image = reformatter.reformat(
        frame,
        to_width,
        to_height,
        "rgb24",
        src_colorspace=Colorspace.ITU709 if is_hd else None,
        interpolation=Interpolation.BICUBIC,
        threads=1,
    ).to_ndarray()
    image = np.rot90(image[:, ::-1] if is_mirrored else image, turns)
    first_row = _first(covered[0], out_height, top + bottom)
    first_column = _first(covered[1], out_width, left + right)
    return image[first_row : first_row + out_height, first_column : first_column + out_width]


def _first(n: int, n_out: int, ends: float) -> int:
    """The first of `n_out` of `n` pixels around the centre of a box with these ends, added up."""
    return min(max(int(n * ends - n_out) // 2, 0), n - n_out)
