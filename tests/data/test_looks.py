"""What clips show: figures, black bars, and what they look like."""

import numpy as np
import pytest
from videos import decoded_whole, gradient_video, write_lossless

from opensora_jax.data import video_io
from opensora_jax.data.clips import Clip, Decoding, Filtered
from opensora_jax.data.looks import FIGURES, Look, content
from opensora_jax.data.video_io import write_video
from opensora_jax.preprocessing.duplicates import Duplicates
from opensora_jax.windows import Windows

OPTIONS = {
    "resolution": (32, 32),
    "fps": None,
    "max_frames": None,
    "n_frames": None,
    "windows": Windows(4, False, 8),
}


def scene(seed, n_frames=16, height=96, width=128):
    """Smooth, moving, and unlike that of another seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    frames = np.zeros((n_frames, height, width, 3))
    for _ in range(6):
        rows, columns, speed = rng.normal(0, 4, 2).tolist() + [rng.normal(0, 0.2)]
        shift = rng.uniform(0, 6, 3) + speed * np.arange(n_frames)[:, None]
        frames += np.sin(rows * y[..., None] + columns * x[..., None] + shift[:, None, None])
    return (128 + 20 * frames).clip(30, 255).astype(np.uint8)


def test_motion_and_brightness_do_not_depend_on_windows():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1], frames[2, 0] = 10, 250
    for parts in ([3], [1, 2], [2, 1]):
        look = Look(frozenset(FIGURES))
        for part in np.split(frames, np.cumsum(parts)[:-1]):
            look.add(part)
        expected = {"motion": (10 + (240 + 10) / 2) / 2, "brightness": 125, "frozen": 0}
        assert look.figures() == expected
    look = Look(frozenset(["motion"]))
    look.add(frames[:1])
    assert look.figures() == {"motion": 0}


def test_the_longest_run_of_equal_frames_is_frozen():
    moving = scene(0, 12)
    moving[3:8] = moving[3]
    moving[9:11] = moving[9]
    look = Look(frozenset(["frozen"]))
    look.add(moving[:5])
    look.add(moving[5:])
    assert look.figures() == {"frozen": 5 / 12}


def test_a_frozen_video_is_filtered_as_encoded(tmp_path):
    moving = scene(0, 16)
    write_video(tmp_path / "moving.mp4", moving, fps=8)
    moving[4:14] = moving[4]
    write_video(tmp_path / "frozen.mp4", moving, fps=8)
    decoding = Decoding(**OPTIONS, max_frozen=0.5)
    names = [{"file": "moving.mp4"}, {"file": "frozen.mp4"}]
    (kept, _), (left_out, _) = decoded_whole(decoding, tmp_path, names)
    assert isinstance(kept, Clip)
    assert left_out == Filtered(
        "frozen.mp4", "frozen: for 0.62 of its length, expected at most 0.5"
    )


@pytest.mark.parametrize(("rows", "columns"), [(12, 0), (0, 24), (12, 24)])
def test_black_bars_are_cut_off_before_resizing(tmp_path, rows, columns):
    inside = scene(1)
    barred = np.pad(inside, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    barred[:3] = 0  # it begins dark
    inside[:3] = 0
    write_video(tmp_path / "barred.mp4", barred, fps=8)
    write_video(tmp_path / "inside.mp4", inside, fps=8)
    # Of a shape that shows the bars.
    wide = OPTIONS | {"resolution": (32, 32) if rows else (24, 48)}
    names = [{"file": "barred.mp4"}, {"file": "inside.mp4"}]
    (_, cut), (_, whole) = decoded_whole(Decoding(**wide, crop_bars=True), tmp_path, names)
    (_, with_bars), (_, same) = decoded_whole(Decoding(**wide), tmp_path, names)
    np.testing.assert_array_equal(whole, same)
    assert np.abs(cut[4:].astype(int) - whole[4:]).mean() < 6  # two lines of the content are cut
    assert np.abs(with_bars[4:].astype(int) - whole[4:]).mean() > 12
    # What is left decides over the size.
    (found, _), _ = decoded_whole(Decoding(**OPTIONS, crop_bars=True, min_side=97), tmp_path, names)
    assert found.reason.endswith("expected a side of at least 97")


@pytest.mark.parametrize("n_lit", [1, 2, 4, 6, 12])
def test_a_line_on_black_has_no_bars(n_lit):
    frame = np.zeros((96, 96, 3), np.uint8)
    frame[48 - n_lit // 2 : 48 + n_lit - n_lit // 2] = 200
    assert content([frame], (96, 96)) is None


def test_a_black_video_and_an_object_on_black_have_no_bars():
    black = np.zeros((2, 60, 80, 3), np.uint8)
    assert content(black, (60, 80)) is None
    black[:, 10:20, 30:60] = 200  # more black below than above
    assert content(black, (60, 80)) is None
    black[:] = 0
    black[:, 10:50, :] = 200
    assert content(black, (60, 80)) == (12 / 60, 48 / 60, 0, 1)


def hash_of(path, **options):
    ((clip, _),) = decoded_whole(
        Decoding(**(OPTIONS | options), near_duplicates=1), path.parent, [{"file": path.name}]
    )
    return int(clip.hash, 16)


def test_the_same_in_another_size_or_encoding_looks_alike_and_others_do_not(tmp_path):
    hashes = []
    for seed in range(4):
        frames = scene(seed)
        write_lossless(tmp_path / f"{seed}.mkv", frames)
        write_video(tmp_path / f"{seed}.mp4", frames, fps=8, crf=35)
        write_video(tmp_path / f"{seed}half.mp4", frames[:, ::2, ::2], fps=8, crf=25)
        names = (f"{seed}.mkv", f"{seed}.mp4", f"{seed}half.mp4")
        hashes.append([hash_of(tmp_path / name) for name in names])
    for i, alike in enumerate(hashes):
        distances = [(alike[0] ^ other).bit_count() for other in alike[1:]]
        assert max(distances) <= 16, distances
        for others in hashes[:i]:
            assert min((a ^ b).bit_count() for a in alike for b in others) > 40
    assert hash_of(tmp_path / "0.mkv", resolution=(8, 8)) >= 0  # smaller than the hash's cells


def clip(bits, start=None):
    return Clip(8.0, 16, 2, start, hash=f"{bits:064x}")


def test_the_first_of_those_alike_stays_whatever_the_parts():
    few, many = (1 << 3) - 1, (1 << 100) - 1
    videos = {
        "a": [clip(0, 0.0), clip(1, 1.0)],  # of one video: both stay
        "b": [clip(few << 200)],  # 3 bits from a
        "c": [clip(many)],
        "d": [clip(many ^ (few << 150)), clip(many ^ (15 << 150))],  # 3 and 4 from c
        "e": [Filtered("e", "still"), clip(few << 200 | 1 << 10)],  # 4 from b, which is not kept
    }
    most_3 = Duplicates(3)
    found = {name: most_3.without(name, outcome) for name, outcome in videos.items()}
    assert found["a"] == videos["a"]
    (left_out,) = found["b"]
    assert (left_out.reason, left_out.like) == ("near-duplicate: 3 of 256 bits differ", "a")
    assert isinstance(found["c"][0], Clip)
    assert [type(x) for x in found["d"]] == [Filtered, Clip]
    assert found["d"][0].like == "c"
    assert found["e"] == videos["e"]
    # Gone on with after any part, by what is noted of those before.
    names = list(videos)
    for k in range(len(names)):
        later = Duplicates(3)
        for name in names[:k]:
            later.recall({"hashes": [[name, c.hash] for c in found[name] if isinstance(c, Clip)]})
        for name in names[k:]:
            assert later.without(name, videos[name]) == found[name]
    assert Duplicates(0).without("b", videos["b"]) == videos["b"]


def test_bars_of_a_box_are_what_is_left_of_a_frame(tmp_path):
    frames = gradient_video(2, 40, 60)
    write_lossless(tmp_path / "a.mkv", frames)
    box = (10 / 40, 30 / 40, 0, 1)
    (one, _) = video_io.read_frames(tmp_path / "a.mkv", resolution=(20, 60), box=box)
    np.testing.assert_array_equal(one, frames[0, 10:30])
