"""Real files, written and read: every container here is made on the spot with libav."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from videos import gradient_video, mean_error, write_encoded, write_lossless

from opensora_jax.data.video_io import TooLong, VideoError, probe, read_video, write_video

BT709, UNSPECIFIED, SMPTE170M = 1, 2, 6  # libav's AVCOL_SPC_*


def test_mp4_round_trip(tmp_path):
    frames = gradient_video()
    write_video(tmp_path / "a.mp4", frames, fps=8)
    info = probe(tmp_path / "a.mp4")
    assert (info.n_frames, info.height, info.width) == (8, 48, 64)
    assert info.fps == pytest.approx(8)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    assert back.dtype == np.uint8
    assert mean_error(back, frames) < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")


def test_same_frames_give_same_bytes(tmp_path):
    for suffix in (".mp4", ".gif"):
        paths = [tmp_path / f"{name}{suffix}" for name in "ab"]
        for path in paths:
            write_video(path, gradient_video(), fps=8)
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_lower_crf_is_closer(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    errors = []
    for crf in (5, 30, 50):
        write_video(tmp_path / "a.mp4", noise, fps=8, crf=crf)
        errors.append(mean_error(read_video(tmp_path / "a.mp4"), noise))
    assert errors == sorted(errors)


def test_gif_round_trip(tmp_path):
    frames = gradient_video(n_frames=5)
    write_video(tmp_path / "a.gif", frames, fps=10)
    info = probe(tmp_path / "a.gif")
    assert (info.n_frames, info.height, info.width) == (5, 48, 64)
    assert info.fps == pytest.approx(10)
    assert mean_error(read_video(tmp_path / "a.gif"), frames) < 12  # 256 colors


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("a.mp4", np.zeros((2, 33, 32, 3), np.uint8), 8, "33 x 32"),
        ("a.avi", np.zeros((2, 32, 32, 3), np.uint8), 8, r"\.avi"),
        ("a.mp4", np.zeros((2, 32, 32, 3), np.float32), 8, "float32"),
        ("a.mp4", np.zeros((0, 32, 32, 3), np.uint8), 8, r"\(0, 32, 32, 3\)"),
        ("a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 0, r"fps=0: expected 0\.01 to 1000"),
        ("a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 1e-6, "fps=1e-06"),
        ("a.mp4", np.zeros((2, 32, 32, 3), np.uint8), np.inf, "fps=inf"),
        ("a.gif", np.zeros((2, 32, 32, 3), np.uint8), np.nan, "fps=nan"),
        ("a.gif", np.zeros((2, 32, 32, 3), np.uint8), 100_000, "fps=100000"),
        ("no/a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8, "does not exist"),
    ],
)
def test_write_refuses(tmp_path, name, frames, fps, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    for name in ("folder.mp4", "folder.gif"):
        (tmp_path / name).mkdir()
        with pytest.raises(VideoError, match=rf"{name}: cannot be written: Is a directory"):
            write_video(tmp_path / name, gradient_video(), fps=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.gif", "folder.mp4"]
    with pytest.raises(VideoError, match="cannot be written: File name too long"):
        write_video(tmp_path / f"{'x' * 250}.mp4", gradient_video(), fps=8)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, gradient_video(), fps=8)
    before = path.read_bytes()
    with pytest.raises(VideoError):
        write_video(path, gradient_video(height=47), fps=8)
    assert path.read_bytes() == before


def test_start_and_n_frames(tmp_path):
    path = tmp_path / "a.mkv"
    frames = gradient_video(10)
    write_lossless(path, frames)
    np.testing.assert_array_equal(read_video(path, start=3, n_frames=4), frames[3:7])
    np.testing.assert_array_equal(read_video(path, start=8, n_frames=4), frames[8:])
    with pytest.raises(VideoError, match="from frame 10 on"):
        read_video(path, start=10)


def test_rate_is_resampled_by_nearest_timestamp(tmp_path):
    path = tmp_path / "a.mkv"
    frames = gradient_video(12)
    write_lossless(path, frames, rate=12)
    half = read_video(path, fps=6)
    np.testing.assert_array_equal(half, frames[::2])
    np.testing.assert_array_equal(read_video(path, fps=6, start=2, n_frames=3), frames[4:10:2])
    assert len(read_video(path, fps=24)) == 24


def test_variable_frame_rate(tmp_path):
    path = tmp_path / "a.mkv"
    frames = gradient_video(5)
    # Seconds 0, 0.1, 0.2, 1.0, 1.1: the third frame stands for 0.8 s.
    write_lossless(path, frames, pts=[0, 100, 200, 1000, 1100])
    times = np.array([0, 0.1, 0.2, 1.0, 1.1])
    expected = [np.abs(times - k / 5).argmin() for k in range(6)]
    np.testing.assert_array_equal(read_video(path, fps=5), frames[expected])
    np.testing.assert_array_equal(read_video(path), frames)
    assert probe(path).fps == pytest.approx(4 / 1.1)


def test_first_timestamp_need_not_be_zero(tmp_path):
    path = tmp_path / "a.mkv"
    frames = gradient_video(4)
    write_lossless(path, frames, pts=[5000, 5100, 5200, 5300])
    np.testing.assert_array_equal(read_video(path, fps=10), frames)


def test_broken_timestamp_is_named(tmp_path):
    path = tmp_path / "a.mkv"
    write_lossless(path, gradient_video(3), pts=[0, 100, 900_000_000])
    with pytest.raises(VideoError, match=r"a\.mkv.*timestamps jump"):
        read_video(path, fps=10)
    assert len(read_video(path)) == 3


def test_timestamps_cannot_ask_for_any_amount_of_memory(tmp_path):
    path = tmp_path / "a.mkv"
    write_lossless(path, gradient_video(40), pts=[50_000 * t for t in range(40)])
    assert len(read_video(path, fps=1, n_frames=1500)) == 1500
    with pytest.raises(TooLong, match=r"a\.mkv: more than 2 GiB of frames"):
        read_video(path, fps=240)  # 4.4 GB


def test_a_single_frame_does_not_last_for_hours(tmp_path):
    path = tmp_path / "a.mp4"
    write_encoded(path, gradient_video(1), rate=Fraction(1, 10_000))
    assert len(read_video(path, fps=4)) == 4 * 60


def test_a_rate_that_no_video_has_is_refused(tmp_path):
    path = tmp_path / "a.mp4"
    write_encoded(path, gradient_video(3), rate=90_000)
    with pytest.raises(VideoError, match=r"a\.mp4: 9e\+04 frames a second: expected at most 1000"):
        probe(path)


COLORS = np.array([[200, 40, 30], [30, 180, 60], [40, 50, 210], [220, 200, 40]], np.uint8)


def stripes(height):
    """Two frames of four colors side by side."""
    return np.broadcast_to(COLORS.repeat(24, 0), (2, height, 96, 3))


def shown_colors(path):
    return read_video(path)[0, 100, 12::24].astype(int)


@pytest.mark.parametrize(
    ("height", "matrix", "tag"),
    [
        (720, Colorspace.ITU709, UNSPECIFIED),
        (720, Colorspace.ITU601, SMPTE170M),
        (480, Colorspace.ITU601, UNSPECIFIED),
        (480, Colorspace.ITU709, BT709),
    ],
)
@pytest.mark.parametrize("color_range", [ColorRange.MPEG, ColorRange.JPEG])
def test_colors_by_the_files_tags_or_else_its_size(tmp_path, height, matrix, tag, color_range):
    def prepare(frame, stream):
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, color_range
        return frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=color_range)

    path = tmp_path / "a.mp4"
    write_encoded(path, stripes(height), prepare=prepare)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.colorspace == tag
        assert (frame.color_range == ColorRange.JPEG) == (color_range == ColorRange.JPEG)
    np.testing.assert_allclose(shown_colors(path), COLORS, atol=6)


@pytest.mark.parametrize("height", [718, 720])
def test_written_colors_come_back(tmp_path, height):
    write_video(tmp_path / "a.mp4", stripes(height), fps=8)
    np.testing.assert_allclose(shown_colors(tmp_path / "a.mp4"), COLORS, atol=6)


@pytest.mark.parametrize("resolution", [16, (16, 24), (40, 12)])
def test_resize_covers_then_crops_the_centre(tmp_path, resolution):
    path = tmp_path / "a.mkv"
    height, width = 48, 96
    # Red says how far right, green how far down.
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x], -1)
    write_lossless(path, np.round(ramp).astype(np.uint8)[None].repeat(2, 0))
    video = read_video(path, resolution=resolution)
    to_height, to_width = resolution if isinstance(resolution, tuple) else (resolution,) * 2
    assert video.shape == (2, to_height, to_width, 3)
    assert video[0, ..., :2].mean((0, 1)) == pytest.approx([127.5, 127.5], abs=3)  # centred
    scale = max(to_height / height, to_width / width)
    seen = np.ptp(video[0, ..., 0].mean(0).astype(float)) / 255
    assert seen == pytest.approx((to_width - 1) / (scale * width), abs=0.03)  # not squeezed


def test_shrinking_is_antialiased(tmp_path):
    path = tmp_path / "a.mkv"
    checkers = 255 * (np.indices((64, 64)).sum(0) % 2)
    write_lossless(path, checkers[None, ..., None].repeat(3, -1).astype(np.uint8))
    assert np.abs(read_video(path, resolution=16).astype(int) - 127).max() < 12


def test_odd_sizes_gray_and_alpha(tmp_path):
    color = gradient_video(2, height=35, width=51)
    write_lossless(tmp_path / "odd.mkv", color)
    np.testing.assert_array_equal(read_video(tmp_path / "odd.mkv"), color)
    gray = color[..., 1]
    write_lossless(tmp_path / "gray.mkv", gray, pixel_format="gray")
    back = read_video(tmp_path / "gray.mkv")
    assert np.abs(back.astype(int) - gray[..., None]).max() <= 1
    alpha = np.concatenate([color, np.full_like(color[..., :1], 255)], -1)
    write_lossless(tmp_path / "alpha.mkv", alpha, pixel_format="rgba")
    np.testing.assert_array_equal(read_video(tmp_path / "alpha.mkv"), color)


def test_rotation_of_a_phone_is_applied(tmp_path):
    path = tmp_path / "a.mp4"
    frames = gradient_video(2)
    write_video(path, frames, fps=8)
    # A phone held upright writes this matrix: x' = -y, y' = x, a quarter turn clockwise.
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    header, track = path.read_bytes().split(b"tkhd", 1)
    path.write_bytes(header + b"tkhd" + track.replace(upright, turned, 1))
    info = probe(path)
    assert (info.height, info.width) == (64, 48)
    back = read_video(path)
    assert back.shape == (2, 64, 48, 3)
    assert mean_error(back, np.rot90(frames, -1, axes=(1, 2))) < 3
    assert read_video(path, resolution=(32, 24)).shape == (2, 32, 24, 3)


def test_too_long(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, gradient_video(9), fps=8)
    with pytest.raises(TooLong, match=r"a\.mp4: more than 8 frames"):
        read_video(path, max_frames=8)
    assert len(read_video(path, max_frames=9)) == 9
    # Counted at the rate that it is read at.
    assert len(read_video(path, fps=4, max_frames=5)) == 5
    with pytest.raises(TooLong):
        read_video(path, fps=16, max_frames=17)


@pytest.mark.parametrize(
    ("sides", "aspect", "shown"),
    [((48, 70), Fraction(40, 33), (48, 85)), ((48, 72), Fraction(8, 9), (48, 64))],
)
def test_pixels_that_are_not_square_are_made_so(tmp_path, sides, aspect, shown):
    path = tmp_path / "a.mp4"
    # A square in the middle as it is to be seen, stored narrower or wider.
    frames = np.zeros((2, *sides, 3), np.uint8)
    half = round(12 / aspect)
    frames[:, 12:36, sides[1] // 2 - half : sides[1] // 2 + half] = 255
    write_encoded(path, frames, aspect=aspect)
    info = probe(path)
    assert (info.height, info.width) == shown
    assert read_video(path).shape == (2, *shown, 3)
    image = read_video(path, resolution=48)[0, :, :, 0].astype(int)
    assert image.shape == (48, 48)
    height, width = image[:, 24].sum() / 255, image[24].sum() / 255
    assert width == pytest.approx(height, abs=1.2)


def test_pixels_no_screen_has_are_a_damaged_header(tmp_path):
    path = tmp_path / "a.mp4"
    write_encoded(path, gradient_video(2), aspect=16)
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=r"a\.mp4: pixels 16 times as wide as high"):
            read(path)


def test_frames_are_counted_where_the_container_does_not_say(tmp_path):
    path = tmp_path / "a.mkv"
    write_lossless(path, gradient_video(7))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).n_frames == 7
    with pytest.raises(TooLong):
        read_video(path, max_frames=6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"resolution": (0, 8)},
        {"fps": 0},
        {"fps": np.inf},
        {"fps": np.nan},
        {"fps": 100_000},
        {"start": -1},
        {"n_frames": 0},
    ],
)
def test_bad_arguments(tmp_path, arguments):
    write_video(tmp_path / "a.mp4", gradient_video(), fps=8)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        read_video(tmp_path / "a.mp4", **arguments)
