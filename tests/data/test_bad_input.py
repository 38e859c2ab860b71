"""Files as people have them: every one of a folder becomes a clip, or is left out with a reason."""

import os
import shutil
import struct
from collections import Counter

import av
import numpy as np
import pytest
from videos import decoded_whole, gradient_video, mean_error, write_encoded, write_lossless

from opensora_jax.data import video_file
from opensora_jax.data.clips import Clip, Decoding, Failed, Filtered
from opensora_jax.data.video_io import VideoError, probe, read_video, write_video
from opensora_jax.windows import Windows

DECODING = Decoding((16, 24), None, None, None, Windows(4, False, 4))
FRAMES = gradient_video(8)


def decode(folder, names, decoding=DECODING):
    """By name, what became of it, and its frames."""
    found = decoded_whole(decoding, folder, [{"file": name} for name in names])
    return dict(zip(names, found, strict=True))


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000)
        silence = np.zeros((1, 48000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_header(path):
    """A video stream that holds no frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width = FRAMES.shape[1:3]
        container.start_encoding()
        container.mux(stream.encode())


def test_what_is_no_video_is_left_out_with_its_reason(tmp_path):
    write_video(tmp_path / "good.mp4", FRAMES, fps=8)
    good = (tmp_path / "good.mp4").read_bytes()
    expected = {}

    def make(name, what, reason):
        what(tmp_path / name) if callable(what) else (tmp_path / name).write_bytes(what)
        expected[name] = reason

    for suffix in (".mp4", ".webm", ".gif", ".png"):
        make(f"empty{suffix}", b"", "empty: 0 bytes")
    make("zeros.mp4", bytes(5000), "cannot be read as a video: Invalid data")
    make("text.mp4", b"a caption\n" * 99, "cannot be read as a video: Invalid data")
    make("page.mkv", b"<html>404</html>" * 99, "cannot be read as a video: Invalid data")
    make("archive.mp4", b"PK\x03\x04" + bytes(range(256)) * 20, "cannot be read as a video")
    make("half.mp4", good[: len(good) // 2], "cannot be read as a video: Invalid data")
    for suffix in (".mp4", ".mkv", ".webm"):
        make(f"sound{suffix}", write_sound, "has no video stream")
    make("header.avi", write_header, "no frames")
    make("header.mp4", write_header, "has no video stream")
    make("pipe.mp4", os.mkfifo, "not a regular file")
    make("folder.mp4", os.mkdir, "not a regular file")
    make("one.mp4", lambda path: write_video(path, FRAMES[:1], fps=8), "1 frames, expected at")
    make("video.txt", good, "suffix '.txt': expected one of .mp4")
    expected["missing.mp4"] = "no such file"
    found = decode(tmp_path, ["good.mp4", *expected])
    assert isinstance(found.pop("good.mp4")[0], Clip)
    for name, reason in expected.items():
        left_out, _ = found[name]
        assert left_out.reason.startswith(reason), (name, left_out)
        assert isinstance(left_out, Filtered if name == "one.mp4" else Failed)


def test_damage_in_the_middle_of_a_stream_is_found(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), np.uint8)
    names = ["a.mp4", "a.mkv", "a.webm", "a.mov"]
    for name in names:
        path = tmp_path / name
        write_encoded(path, noise, "libvpx" if path.suffix == ".webm" else "libx264")
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 9000] = bytes(range(200)) * 45
        path.write_bytes(data)
    found = decode(tmp_path, names)
    assert {type(clip) for clip, _ in found.values()} == {Failed}, found


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "error"),
    [
        ("a.mov", "libx264", None, 3),
        ("a.mkv", "libx265", "yuv420p10le", 3),
        ("a.webm", "libvpx-vp9", None, 3),
        ("a.avi", "mpeg4", None, 5),
        ("ten.mp4", "libx264", "yuv420p10le", 3),
        ("four.mp4", "libx264", "yuv444p", 3),
        ("deep.mkv", "ffv1", "gbrp16le", 1),
        ("alpha.webm", "libvpx-vp9", "yuva420p", 3),
        ("alpha.mov", "qtrle", "argb", 1),
        ("png.mov", "png", "rgba", 1),
        ("studio.mov", "prores_ks", "yuv422p10le", 3),
    ],
)
def test_codecs_and_depths_show_the_same_frames(tmp_path, name, codec, pixel_format, error):
    write_encoded(tmp_path / name, FRAMES, codec, pixel_format=pixel_format)
    write_lossless(tmp_path / "exact.mkv", FRAMES)
    (_, shown), (_, exact) = decode(tmp_path, [name, "exact.mkv"]).values()
    assert mean_error(shown, exact) < error


@pytest.mark.parametrize("pixel_format", ["gray", "gray10le"])
def test_gray_is_gray(tmp_path, pixel_format):
    gray = np.repeat(FRAMES[..., 1:2], 3, axis=-1)
    write_encoded(tmp_path / "a.mkv", gray, "ffv1", pixel_format=pixel_format)
    assert mean_error(read_video(tmp_path / "a.mkv"), gray) < 3


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (1, 4096), (2160, 3840)])
def test_any_size_is_resized(tmp_path, size):
    write_lossless(tmp_path / "a.mkv", np.full((4, *size, 3), (10, 120, 230), np.uint8))
    ((_, frames),) = decode(tmp_path, ["a.mkv"]).values()
    assert frames.shape == (4, 16, 24, 3)
    assert np.abs(frames.astype(int) - (10, 120, 230)).max() <= 2
    assert (probe(tmp_path / "a.mkv").height, probe(tmp_path / "a.mkv").width) == size


# The matrix of a track's header, (a, b, c, d): the pixel at (x, y) is shown at (ax + cy, bx + dy).
ORIENTATIONS = {
    "as it is": (1, 0, 0, 1),
    "quarter turn clockwise": (0, 1, -1, 0),
    "half turn": (-1, 0, 0, -1),
    "quarter turn counterclockwise": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside down mirrored": (1, 0, 0, -1),
    "mirrored along the diagonal": (0, 1, 1, 0),
    "mirrored along the other": (0, -1, -1, 0),
}


def turn(path, matrix):
    """Writes a matrix into a file of write_video."""
    one = 1 << 16
    a, b, c, d = (round(one * x) for x in matrix)
    upright = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    header, track = path.read_bytes().split(b"tkhd", 1)
    assert upright in track
    path.write_bytes(header + b"tkhd" + track.replace(upright, turned, 1))


@pytest.mark.parametrize("matrix", ORIENTATIONS.values(), ids=ORIENTATIONS)
def test_a_video_is_turned_and_mirrored_as_players_show_it(tmp_path, matrix):
    frames = FRAMES.copy()
    frames[:, :12, :20] = 255
    write_video(tmp_path / "a.mp4", frames, fps=8)
    turn(tmp_path / "a.mp4", matrix)
    a, b, c, d = matrix
    y, x = np.indices(frames.shape[1:3])
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = np.zeros((8, np.ptp(to_y) + 1, np.ptp(to_x) + 1, 3), np.uint8)
    expected[:, to_y - to_y.min(), to_x - to_x.min()] = frames
    shown = read_video(tmp_path / "a.mp4")
    assert shown.shape == expected.shape
    assert mean_error(shown, expected) < 2
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == expected.shape[1:3]


@pytest.mark.parametrize("degrees", [15, 75])
def test_a_slanted_video_is_shown_by_its_nearest_quarter_turn(tmp_path, degrees):
    write_video(tmp_path / "a.mp4", FRAMES, fps=8)
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn(tmp_path / "a.mp4", (cos, sin, -sin, cos))
    expected = FRAMES if degrees < 45 else np.rot90(FRAMES, -1, axes=(1, 2))
    assert mean_error(read_video(tmp_path / "a.mp4"), expected) < 3


def test_a_turned_video_of_pixels_that_are_not_square(tmp_path):
    """4:3 from 48 x 72 pixels, then upright: 64 x 48."""
    write_encoded(tmp_path / "a.mp4", gradient_video(4, 48, 72), aspect="8/9")
    turn(tmp_path / "a.mp4", ORIENTATIONS["quarter turn clockwise"])
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == (64, 48)
    assert read_video(tmp_path / "a.mp4").shape == (4, 64, 48, 3)


def test_any_name_that_a_file_can_have(tmp_path):
    names = ["with space.mp4", "ünï 影片 😀.mp4", "quote'\".mp4", "new\nline.mp4", "-dash.mp4"]
    names += ["a%20b.mp4", "c?d#e.mp4", "[0-9]%03d.mp4", "tab\t.mp4", "back\\slash.mp4"]
    names += ["co:lon.mp4", " lead.mp4", "trail .mp4", "~.mp4", "$HOME.mp4", "*.mp4"]
    write_video(tmp_path / "a.mp4", FRAMES, fps=8)
    for name in names:
        shutil.copy(tmp_path / "a.mp4", tmp_path / name)
    found = decode(tmp_path, names)
    assert Counter(type(clip) for clip, _ in found.values()) == {Clip: len(names)}, found


@pytest.mark.parametrize("error", [ValueError("shapes"), ZeroDivisionError("1/0"), MemoryError()])
def test_an_error_that_nobody_thought_of_names_the_file(tmp_path, error):
    write_video(tmp_path / "a.mp4", FRAMES, fps=8)
    message = rf"a\.mp4: damaged: {type(error).__name__}: "
    with pytest.raises(VideoError, match=message), video_file.opened(tmp_path / "a.mp4"):
        raise error
