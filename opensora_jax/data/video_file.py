"""Opens video files and images, and goes through their packets and frames as they are stored.

Everything that is wrong with a file becomes a `VideoError` that names it. This is PyAV's work, not
imageio's, whose plugin for PyAV shows no timestamps, rotation or damaged frames.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from opensora_jax.files import short

# By suffix, the formats (libav's demuxers) that are read; a file may hold another of them than its
# suffix says. All others are refused unread: playlists (.m3u8, .ffconcat) make libav open the files
# that they name.
_FORMATS = {
    ".mp4": "mov",
    ".m4v": "mov",
    ".mov": "mov",
    ".3gp": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
    ".gif": "gif",
    ".ts": "mpegts",
    ".mts": "mpegts",
    ".m2ts": "mpegts",
    ".mpg": "mpeg",
    ".mpeg": "mpeg",
    ".flv": "flv",
    ".wmv": "asf",
    ".ogv": "ogg",
}
# A file with one of these suffixes is taken for a video, in a folder as in a captions file.
VIDEO_SUFFIXES = tuple(_FORMATS)

# An image is a video of one frame. By suffix libav would take one for a pattern of names.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGE_FORMATS = {b"\x89PNG": "png_pipe", b"\xff\xd8\xff": "jpeg_pipe", b"RIFF": "webp_pipe"}

_PROTOCOLS = {"protocol_whitelist": "file"}
_OPTIONS = {"format_whitelist": ",".join(_FORMATS.values()), **_PROTOCOLS}
_IMAGE_OPTIONS = {"format_whitelist": ",".join(_IMAGE_FORMATS.values()), **_PROTOCOLS}
# Titles and tags in unknown encodings are nothing to fail for; PyAV 19 never does, and has no
# such argument.
_ARGUMENTS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}

# Pixels of formats in use are 0.7 to 2 times as wide as high.
MOST_ASPECT = 4

# Stated lengths are rough: the end is missing when more than this share of them is.
_MISSING_SHARE = 0.1


class VideoError(ValueError):
    """A video file cannot be read or written; the message names the file and the reason."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{path}: {reason}")
        self.reason = reason


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first real video stream; libav's errors become VideoErrors."""
    _check_name(path)
    try:
        with _open(path) as container:
            stream = _video_stream(path, container)
            stream.codec_context.thread_count = 1  # callers run many files at once
            yield container, stream
    except av.FFmpegError as error:
        raise VideoError(path, f"cannot be read as a video: {error.strerror}") from error
    except IndexError as error:  # PyAV, where a damaged file starts a new stream half-way
        raise VideoError(path, "damaged: the number of streams changes") from error
    except VideoError:
        raise
    except (ValueError, ArithmeticError, MemoryError) as error:  # of sizes and rates out of bounds
        raise VideoError(path, f"damaged: {type(error).__name__}: {short(str(error))}") from error


def packets(path: Path, container, stream) -> Iterator[av.Packet]:
    """The stream's packets, to the end of the file.

    Raises:
      VideoError: the file ends long before it says that it does.
    """
    ends = {}  # stream -> ticks; of all streams, since sound may go on after the pictures
    for packet in container.demux():
        ticks = packet.dts if packet.pts is None else packet.pts
        if ticks is not None:
            i = packet.stream_index
            ends[i] = max(ticks + (packet.duration or 0), ends.get(i, ticks))
        if packet.stream is stream:
            yield packet
    stated = (container.duration or 0) / av.time_base
    end = max((float(n * container.streams[i].time_base) for i, n in ends.items()), default=0.0)
    if stated - end > max(_MISSING_SHARE * stated, 2 / usual_rate(stream)):
        raise VideoError(path, f"truncated: {end:.1f} s of a stated {stated:.1f} s")


def shown_packets(path: Path, container, stream) -> Iterator[av.Packet]:
    """The packets that hold a frame to show: one a frame, and cheaper to count."""
    return (p for p in packets(path, container, stream) if p.size and not p.is_discard)


def decode(path: Path, container, stream) -> Iterator[av.VideoFrame]:
    """The frames to show, in order.

    Raises:
      VideoError: a frame is damaged, or the file is truncated.
    """
    i = 0
    for packet in packets(path, container, stream):
        for frame in packet.decode():
            if frame.is_corrupt:
                raise VideoError(path, f"frame {i} is damaged")
            yield frame
            i += 1


def usual_rate(stream: av.VideoStream) -> float:
    """Frames a second as the container claims or libav guesses."""
    return float(stream.average_rate or stream.guessed_rate or 25)  # 25: libav's own guess


def pixel_aspect(path: Path, stream: av.VideoStream) -> float:
    """Width over height of a pixel as it is shown, 1 where the file says nothing.

    Raises:
      VideoError: it is not from 1/MOST_ASPECT to MOST_ASPECT.
    """
    aspect = float(stream.sample_aspect_ratio or 1)
    if not 1 / MOST_ASPECT <= aspect <= MOST_ASPECT:
        raise VideoError(path, f"pixels {aspect:.4g} times as wide as high: a damaged header")
    return aspect


def _check_name(path):
    try:
        is_file = path.is_file()  # not an address, a device or a pipe, which libav opens as well
    except OSError as error:  # a name longer than any file's, for one
        raise VideoError(short(str(path)), error.strerror) from None
    if not is_file:
        is_there = path.exists()
        raise VideoError(path, "not a regular file" if is_there else "no such file")
    if not path.stat().st_size:
        raise VideoError(path, "empty: 0 bytes")
    if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        expected = " ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
        raise VideoError(path, f"suffix {path.suffix!r}: expected one of {expected}")


def _open(path):
    kind, options = None, _OPTIONS
    if path.suffix.lower() in IMAGE_SUFFIXES:
        kind, options = _image_format(path), _IMAGE_OPTIONS
    try:
        # "file:", or libav takes a name such as "concat:..." for an address.
        return av.open(f"file:{path}", format=kind, options=options, **_ARGUMENTS)
    except av.ArgumentError as error:
        raise VideoError(path, "not a video, or in a format that is not read") from error


def _image_format(path):
    """What an image file holds, whatever its suffix; a VideoError where its end is missing."""
    with path.open("rb") as file:
        start = file.read(12)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 4096))
        end = file.read()
    found = next((of for magic, of in _IMAGE_FORMATS.items() if start.startswith(magic)), None)
    whole = {
        "png_pipe": b"IEND" in end,
        "jpeg_pipe": b"\xff\xd9" in end,
        "webp_pipe": size >= 8 + int.from_bytes(start[4:8], "little"),
    }
    if found is None:
        raise VideoError(path, "not an image, or in a format that is not read")
    if not whole[found]:
        raise VideoError(path, "truncated: the end of the image is missing")
    return found


def _video_stream(path, container):
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            break
    else:
        raise VideoError(path, "has no video stream")
    if stream.codec_context is None:
        raise VideoError(path, "damaged, or made with a codec that is not known")
    file_size = path.stat().st_size
    if any(entry.pos + entry.size > file_size for entry in stream.index_entries):
        raise VideoError(path, "truncated: its index points past the end of the file")
    if container.format.name == "gif" and not _ends_with_gif_trailer(path):
        raise VideoError(path, "truncated: no GIF trailer at the end of the file")
    return stream


def _ends_with_gif_trailer(path):
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return file.read().rstrip(b"\0").endswith(b";")
