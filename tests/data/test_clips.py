"""Decoding for a dataset: each video becomes a clip, or the reason why it is left out."""

import re

import numpy as np
from videos import decoded_whole, gradient_video, write_encoded, write_lossless

from opensora_jax.data.clips import (
    Clip,
    Decoding,
    Failed,
    Filtered,
)
from opensora_jax.data.video_io import read_video, write_video
from opensora_jax.windows import Windows


def entries(names):
    return [{"file": name} for name in names]


OPTIONS = {
    "resolution": (16, 24),
    "fps": None,
    "max_frames": 10,
    "n_frames": None,
    "windows": Windows(4, False, 4),
}


def test_each_video_is_a_clip_or_the_reason_why_not_in_order(tmp_path):
    for name, n_frames in (("long.mp4", 11), ("odd.mp4", 7), ("short.mp4", 3), ("video.dat", 8)):
        path = tmp_path / f"{name}.mp4"
        write_video(path, gradient_video(n_frames), fps=8)
        path.rename(tmp_path / name)
    (tmp_path / "text.mp4").write_text("no video")
    write_encoded(tmp_path / "other.ts", gradient_video(8))
    names = ["long.mp4", "odd.mp4", "short.mp4", "video.dat", "text.mp4", "none.mp4", "other.ts"]
    odd_names = ["x" * 300 + ".mp4", "\ud83d.mp4", "zero\0.mp4"]
    made = decoded_whole(Decoding(**OPTIONS), tmp_path, entries(names + odd_names))
    found, frames = zip(*made, strict=True)
    assert found[0] == Filtered("long.mp4", "more than 10 frames")
    assert isinstance(found[1], Clip)
    assert found[1].fps == 8
    expected = read_video(tmp_path / "odd.mp4", resolution=(16, 24))[:4]
    np.testing.assert_array_equal(frames[1], expected)
    assert found[2] == Filtered("short.mp4", "3 frames, expected at least 4")
    assert found[3].reason.startswith("suffix '.dat': expected one of .mp4 .m4v ")
    assert found[5] == Failed("none.mp4", "no such file")
    assert len(frames[6]) == 8
    assert found[7] == Failed(odd_names[0], "File name too long")
    assert found[8] == Failed(odd_names[1], "its name is not Unicode text")
    assert found[9] == Failed(odd_names[2], "no such file")
    assert [type(found[i]) for i in (3, 4)] == [Failed, Failed]


def test_of_images_alone_each_is_as_many_frames_as_there_is_a_latent_for(tmp_path):
    write_video(tmp_path / "a.mp4", gradient_video(8), fps=8)
    write_video(tmp_path / "one.mp4", gradient_video(1), fps=8)
    options = OPTIONS | {"n_frames": 4, "images": True}
    # It neither moves nor stands still, and clips of videos are not its length.
    options |= {"min_motion": 0.5, "max_frozen": 0.1, "clip_frames": 8}
    found = decoded_whole(Decoding(**options), tmp_path, entries(["a.mp4", "one.mp4"]))
    (video, _), (image, frames) = found
    assert video == Filtered("a.mp4", "8 frames, expected an image")
    assert (image.n_frames, image.start) == (4, None)
    assert frames.shape == (4, 16, 24, 3)
    assert (frames == frames[0]).all()


def test_an_image_is_not_filtered_for_how_it_moves(tmp_path):
    write_video(tmp_path / "one.mp4", gradient_video(1), fps=8)
    options = OPTIONS | {"windows": Windows(4, True, 5), "min_motion": 0.5}
    ((image, frames),) = decoded_whole(Decoding(**options), tmp_path, entries(["one.mp4"]))
    assert isinstance(image, Clip)
    assert len(frames) == 1


def test_clips_are_resampled_and_cut(tmp_path):
    write_video(tmp_path / "a.mp4", gradient_video(8), fps=8)
    write_video(tmp_path / "b.mp4", gradient_video(3), fps=8)
    options = OPTIONS | {"fps": 16.0, "n_frames": 12}
    found = decoded_whole(Decoding(**options), tmp_path, entries(["a.mp4", "b.mp4"]))
    (cut, frames), (short, _) = found
    assert (len(frames), cut.fps) == (12, 16)
    # It is cut, so that it is not too long; and at twice the rate every frame is shown twice.
    assert short == Filtered("b.mp4", "6 frames, expected at least 12")


def test_frames_are_counted_at_the_rate_of_the_dataset_and_not_of_what_is_cut(tmp_path):
    write_video(tmp_path / "a.mp4", gradient_video(36), fps=24)
    options = OPTIONS | {"fps": 8.0, "max_frames": 12}
    ((_, whole),) = decoded_whole(Decoding(**options), tmp_path, entries(["a.mp4"]))
    assert len(whole) == 12
    ((too_long, _),) = decoded_whole(
        Decoding(**(options | {"max_frames": 11})), tmp_path, entries(["a.mp4"])
    )
    assert too_long == Filtered("a.mp4", "more than 11 frames")
    ((_, cut),) = decoded_whole(
        Decoding(**(options | {"max_frames": 11, "n_frames": 8})), tmp_path, entries(["a.mp4"])
    )
    assert len(cut) == 8


def test_a_missing_end_is_told_of_what_is_cut_as_well(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 64, 3), np.uint8)
    path = tmp_path / "a.mkv"
    write_encoded(path, noise)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ((failed, _),) = decoded_whole(
        Decoding(**(OPTIONS | {"fps": 8.0, "n_frames": 4})), tmp_path, entries(["a.mkv"])
    )
    assert isinstance(failed, Failed)
    assert failed.reason.startswith("truncated: ")


def test_what_shows_too_little_is_filtered_with_the_figures(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (8, 48, 64, 3), np.uint8)
    videos = {
        "noise.mkv": noise,
        "still.mkv": np.repeat(noise[:1], 8, axis=0),
        "dark.mkv": noise // 32,
        "small.mkv": noise[:, :32, :40],
    }
    for name, frames in videos.items():
        write_lossless(tmp_path / name, frames)
    least = {"min_side": 40, "min_motion": 0.5, "min_brightness": 16.0}
    names = entries(videos)
    found = [clip for clip, _ in decoded_whole(Decoding(**OPTIONS, **least), tmp_path, names)]
    kept, still, dark, small = found
    assert isinstance(kept, Clip)
    assert still == Filtered("still.mkv", "still: moves by 0.00 of 255, expected at least 0.5")
    assert re.fullmatch(r"dark: 3\.\d\d of 255, expected at least 16", dark.reason)
    assert small == Filtered("small.mkv", "40 x 32 pixels, expected a side of at least 40")
    for name, one in least.items():
        found = decoded_whole(Decoding(**OPTIONS, **{name: one}), tmp_path, names)
        assert sum(isinstance(clip, Filtered) for clip, _ in found) == 1
    found = decoded_whole(Decoding(**OPTIONS), tmp_path, names)
    assert all(isinstance(clip, Clip) for clip, _ in found)
