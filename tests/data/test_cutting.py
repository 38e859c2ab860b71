"""Cutting videos into clips: the frames, the times and what is decoded for them."""

import numpy as np
import pytest
from test_looks import scene
from test_video_window import FILES, damage, write
from videos import decoded, write_lossless

from opensora_jax.data import clips, shots, video_io
from opensora_jax.data.clips import Clip, Decoding, Failed, Filtered, Window
from opensora_jax.data.video_io import read_video
from opensora_jax.windows import Windows

OPTIONS = {
    "resolution": (16, 24),
    "fps": None,
    "max_frames": 10,  # of what is cut none is too long
    "n_frames": None,
    "windows": Windows(4, False, 8),
    "clip_frames": 12,
}


def numbered_video(n_frames, height=32, width=48):
    """Frame t is of the grey 4 t, so that frames tell their number."""
    return np.stack([np.full((height, width, 3), 4 * t, np.uint8) for t in range(n_frames)])


@pytest.mark.parametrize("fps", [None, 8.0])
@pytest.mark.parametrize("stride", [0, 5, 30])
@pytest.mark.parametrize("name", ["b_frames.mp4", "one_group.mkv", "transport.ts"])
def test_clips_are_the_frames_of_the_whole(tmp_path, name, stride, fps):
    codec, options = FILES[name]
    path = write(tmp_path / name, codec, **options)
    whole = read_video(path, resolution=(16, 24), fps=fps)
    decoding = Decoding(**(OPTIONS | {"fps": fps, "clip_stride": stride}))
    (found,) = decoded(decoding, tmp_path, [{"file": name}])
    firsts = range(0, len(whole) - 11, stride or 12)
    assert len(found) == len(firsts)
    for first, (clip, frames) in zip(firsts, found, strict=True):
        np.testing.assert_array_equal(frames, whole[first : first + 12])
        assert clip.start == pytest.approx(first / (fps or 24), abs=2e-3)
        assert clip.fps == pytest.approx(fps or 24, rel=1e-3)


def test_times_are_those_of_the_file_where_frames_keep_them(tmp_path):
    times = [100, 200, 300, 400, 1000, 1100, 1200, 2000, 2100, 2200]
    write_lossless(tmp_path / "a.mkv", numbered_video(10), pts=times)
    decoding = Decoding(**(OPTIONS | {"clip_frames": 4, "windows": Windows(4, False, 4)}))
    (found,) = decoded(decoding, tmp_path, [{"file": "a.mkv"}])
    assert [clip.start for clip, _ in found] == [0.0, 0.9]
    assert [frames[0, 0, 0, 0] for _, frames in found] == [0, 16]


def test_only_what_clips_need_is_decoded(tmp_path, monkeypatch):
    codec, options = FILES["b_frames.mp4"]
    write(tmp_path / "a.mp4", codec, **options)  # 90 frames, key frames at 0, 30, 60
    converted = []
    convert = video_io.to_image
    monkeypatch.setattr(
        video_io, "to_image", lambda *args: converted.append(args[1].pts) or convert(*args)
    )
    decoding = Decoding(**(OPTIONS | {"clip_frames": 8, "clip_stride": 62}))
    *windows, outcome = decoding(tmp_path, {"file": "a.mp4"})  # in this process
    assert [(window.clip, len(window.frames_THWC)) for window in windows] == [(0, 8), (1, 8)]
    assert [clip.n_frames for clip in outcome] == [8, 8]
    assert len(converted) == 16


def test_a_short_video_is_filtered_and_a_damaged_one_has_no_clips_at_all(tmp_path):
    write_lossless(tmp_path / "short.mkv", numbered_video(11))
    codec, how = FILES["b_frames.mp4"]
    damage(write(tmp_path / "bad.mp4", codec, **how), range(60, 70))
    for options in (OPTIONS, OPTIONS | {"clip_frames": 0, "max_frames": None}):
        names = [{"file": name} for name in ("bad.mp4", "short.mkv")]
        pieces = list(clips.decode_clips(Decoding(**options), tmp_path, names))
        assert any(i == 0 and isinstance(piece, Window) for i, piece in pieces)
        (bad,) = next(piece for i, piece in pieces if i == 0 and isinstance(piece, list))
        assert isinstance(bad, Failed)
        (short,) = next(piece for i, piece in pieces if i == 1 and isinstance(piece, list))
        if options["clip_frames"]:
            assert short == Filtered("short.mkv", "11 frames, expected at least 12", 0.0)
        else:
            assert isinstance(short, Clip)


def test_what_a_clip_shows_decides_over_it_alone(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 32, 48, 3), np.uint8)
    still = np.repeat(noise[:1], 8, axis=0)
    write_lossless(tmp_path / "a.mkv", np.concatenate([noise, still, noise]))
    options = OPTIONS | {"clip_frames": 8, "min_motion": 1.0}
    ((one, other, last),) = decoded(Decoding(**options), tmp_path, [{"file": "a.mkv"}])
    assert [isinstance(clip, Clip) for clip, _ in (one, other, last)] == [True, False, True]
    assert other[0].reason == "still: moves by 0.00 of 255, expected at least 1"
    assert other[0].start == pytest.approx(0.8)


@pytest.mark.parametrize("fps", [None, 8.0])
def test_no_clip_spans_a_cut(tmp_path, fps):
    """Shots of 40, 9 and 50 frames at 24 a second, encoded."""
    shots = [scene(seed, n) for seed, n in ((0, 40), (1, 9), (2, 50))]
    video_io.write_video(tmp_path / "a.mp4", np.concatenate(shots), fps=24)
    whole = read_video(tmp_path / "a.mp4", resolution=(16, 24), fps=fps)
    ends = [0, 40, 49, 99] if fps is None else [0, 14, 17, 33]  # 40 / 3 = 13.3, ...
    options = OPTIONS | {"fps": fps, "split_scenes": True, "windows": Windows(4, False, 4)}
    sizes = {"clip_frames": 0, "max_frames": 45} if fps is None else {"clip_frames": 4}
    (found,) = decoded(Decoding(**(options | sizes)), tmp_path, [{"file": "a.mp4"}])
    if fps is None:
        (first, frames), (second, few), (third, none) = found
        np.testing.assert_array_equal(frames, whole[:40])
        np.testing.assert_array_equal(few, whole[40:48])  # a rest of one is dropped
        assert [first.start, second.start] == pytest.approx([0, 40 / 24])
        assert none is None
        assert third == Filtered("a.mp4", "more than 45 frames", pytest.approx(49 / 24))
        return
    starts = [round(clip.start * 8) for clip, _ in found]
    assert starts == [0, 4, 8, 14, 17, 21, 25, 29]
    for start, (clip, frames) in zip(starts, found, strict=True):
        if start == 14:  # a shot of three frames
            assert clip.reason == "3 frames, expected at least 4"
        else:
            assert not any(start < end < start + 4 for end in ends)
            np.testing.assert_array_equal(frames, whole[start : start + 4])


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'opensora_jax\[scenes\]'"):
        shots.expect_installed()


def held(decoding, folder, name):
    """The most bytes of frames that are held at a time."""
    import tracemalloc

    tracemalloc.start()
    for _ in decoding(folder, {"file": name}):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "options", [{}, {"clip_frames": 16}, {"clip_frames": 16, "clip_stride": 4}]
)
def test_a_long_video_takes_no_more_memory_than_a_short_one(tmp_path, options):
    for name, n_frames in (("short.mkv", 40), ("long.mkv", 400)):
        write_lossless(tmp_path / name, numbered_video(50)[np.arange(n_frames) % 50])
    sizes = {"resolution": (128, 128), "max_frames": None, "windows": Windows(4, False, 8)}
    decoding = Decoding(**(OPTIONS | {"clip_frames": 0} | sizes | options))
    short, long = (held(decoding, tmp_path, name) for name in ("short.mkv", "long.mkv"))
    assert long - short < 8 * 128 * 128 * 3  # a window
    assert long < 100 * 128 * 128 * 3
