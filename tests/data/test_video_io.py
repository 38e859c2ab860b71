"""Real files, written and read: every container here is made on the spot with libav."""

import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest

from opensora_jax.data.video_io import TooLong, VideoError, probe, read_video, write_video


def gradient_video(n_frames=8, height=48, width=64):
    """Smooth frames that codecs keep well; frame t is brighter by 10 t in blue."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([4 * y % 256, 3 * x % 256, 0 * x], -1).clip(0, 255)
    return np.stack([frame + [0, 0, 10 * t] for t in range(n_frames)]).astype(np.uint8)


def mean_error(a, b):
    return np.abs(a.astype(float) - b).mean()


def write_lossless(path, frames, pts=None, pixel_format="rgb24", rate=10):
    """An FFV1 file in Matroska: any size, any timestamps (milliseconds), exact pixels."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = {"rgb24": "bgr0", "rgba": "bgra", "gray": "gray"}[pixel_format]
        stream.codec_context.time_base = Fraction(1, 1000)
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format=pixel_format)
            frame.pts = pts[t] if pts else round(1000 * t / rate)
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
        ("a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 0, "fps=0"),
        ("no/a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 8, "does not exist"),
    ],
)
def test_write_refuses(tmp_path, name, frames, fps, message):
    with pytest.raises(VideoError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


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
        read_video(path, max_frames=8, n_frames=2)
    assert len(read_video(path, max_frames=9)) == 9


def test_frames_are_counted_where_the_container_does_not_say(tmp_path):
    path = tmp_path / "a.mkv"
    write_lossless(path, gradient_video(7))
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).n_frames == 7
    with pytest.raises(TooLong):
        read_video(path, max_frames=6)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("part", [0, 0.05, 0.5, 0.9])
def test_truncated_file(tmp_path, suffix, part):
    path = tmp_path / f"cut{suffix}"
    write_video(path, gradient_video(), fps=8)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=rf"cut\{suffix}: \w+"):
            read(path)


def test_truncated_behind_a_leading_index(tmp_path):
    """With the index in front the file opens; its missing end must still be noticed."""
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for image in gradient_video():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    assert len(read_video(path)) == 8
    path.write_bytes(path.read_bytes()[:-100])
    for read in (probe, read_video):
        with pytest.raises(VideoError, match=r"cut\.mp4: truncated"):
            read(path)


def test_damage_is_found_and_only_where_it_is_read(tmp_path):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
    write_video(path, noise, fps=8)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = bytes(range(200)) * 100
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"a\.mp4"):
        read_video(path)
    assert len(read_video(path, n_frames=2)) == 2


def test_random_damage_is_read_or_named(tmp_path):
    """Whatever bytes are wrong: frames or a VideoError, never another error."""
    rng = np.random.default_rng(0)
    write_video(tmp_path / "whole.mp4", gradient_video(), fps=8)
    write_video(tmp_path / "whole.gif", gradient_video(), fps=8)
    write_lossless(tmp_path / "whole.mkv", gradient_video())
    reasons = []
    for i in range(600):
        suffix = (".mp4", ".gif", ".mkv")[i % 3]
        data = bytearray((tmp_path / f"whole{suffix}").read_bytes())
        ends = np.r_[: min(1000, len(data)), max(0, len(data) - 1000) : len(data)]  # the headers
        for position in rng.choice(ends, rng.integers(1, 10)):
            data[position] = rng.integers(256)
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(data)
        try:
            probe(path)
            assert read_video(path, resolution=32, fps=4, max_frames=20).shape[1:] == (32, 32, 3)
        except VideoError as error:
            reasons.append(str(error))
    assert 100 < len(reasons) < 600
    assert all(str(tmp_path / "damaged") in reason for reason in reasons)


def test_a_title_in_an_unknown_encoding(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["title"] = "title-title-title"
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width = 48, 64
        for image in gradient_video():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"title-title" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"title-title", b"\xfftle-\xfe\xe9tle"))
    assert len(read_video(tmp_path / "a.mp4")) == probe(tmp_path / "a.mp4").n_frames == 8


def test_not_a_video(tmp_path):
    (tmp_path / "text.mp4").write_text("a caption, not a video\n" * 100)
    (tmp_path / "text.txt").write_text("libav would play this as terminal art\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with av.open(str(tmp_path / "picture.png"), "w", format="image2") as container:
        stream = container.add_stream("png")
        stream.height, stream.width, stream.pix_fmt = 48, 64, "rgb24"
        frame = av.VideoFrame.from_ndarray(gradient_video()[0], format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in ("text.mp4", "text.txt", "folder.mp4", "sound.wav", "picture.png", "missing.mp4"):
        for read in (probe, read_video):
            with pytest.raises(VideoError, match=name.replace(".", r"\.") + r": \w+"):
                read(tmp_path / name)


@pytest.mark.parametrize(
    "arguments", [{"resolution": (0, 8)}, {"fps": 0}, {"start": -1}, {"n_frames": 0}]
)
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        read_video(tmp_path / "a.mp4", **arguments)
