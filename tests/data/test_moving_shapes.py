import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import ml_collections
import numpy as np
import pytest

from opensora_jax.data import moving_shapes, video_io
from opensora_jax.metrics import shapes
from opensora_jax.stages import shapes as shapes_stage

SMALL = dict(
    combinations=moving_shapes.SEEN, seed=3, n_frames=8, resolution=32, fps=8, n_captions=3
)


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_combinations():
    assert len(moving_shapes.ALL) == len(set(moving_shapes.ALL)) == 48
    assert set(moving_shapes.SEEN) | set(moving_shapes.HELD_OUT) == set(moving_shapes.ALL)
    assert len(moving_shapes.SEEN) == 40
    for attribute, counts in ((0, {2}), (1, {2, 3}), (2, {2})):
        assert set(Counter(c[attribute] for c in moving_shapes.HELD_OUT).values()) == counts
    # Every pair of attributes is seen in training: only the triple is new.
    for pair in ((0, 1), (0, 2), (1, 2)):
        seen, every = (
            {tuple(c[i] for i in pair) for c in combinations}
            for combinations in (moving_shapes.SEEN, moving_shapes.ALL)
        )
        assert seen == every


def test_captions_name_all_attributes_and_nothing_else():
    assert "a red circle moves to the left" in moving_shapes.captions("red", "circle", "left")
    assert "a blue square moves up" in moving_shapes.captions("blue", "square", "up")
    words = moving_shapes.COLORS + moving_shapes.SHAPES + moving_shapes.DIRECTIONS
    every = []
    for combination in moving_shapes.ALL:
        phrasings = moving_shapes.captions(*combination)
        assert len(set(phrasings)) == len(phrasings) >= 5
        for caption in phrasings:
            named = [word for word in words if word in caption.replace("wards", "").split()]
            assert sorted(named) == sorted(combination)
        every += phrasings
    assert len(set(every)) == len(every)  # no caption fits two combinations


@pytest.mark.parametrize("attributes", [("pink", "circle", "left"), ("red", "circle", "north")])
def test_unknown_attribute(attributes):
    with pytest.raises(ValueError, match=r"(pink|north).*expected one of"):
        moving_shapes.captions(*attributes)


@pytest.mark.parametrize(("n_frames", "resolution"), [(8, 32), (16, 64), (5, 48)])
def test_render_keeps_the_shape_inside_and_moves_it(n_frames, resolution):
    for i, (color, shape, direction) in enumerate(moving_shapes.ALL):
        rng = np.random.default_rng(i)
        video = moving_shapes.render(rng, color, shape, direction, n_frames, resolution)
        assert video.shape == (n_frames, resolution, resolution, 3)
        assert video.dtype == np.uint8
        saturated = np.ptp(video.astype(int), axis=-1) > 70
        # The margin of 0.02 leaves a pixel at the border at most 36% covered, at 32 pixels.
        border = np.ptp(video.astype(int), axis=-1)
        border[:, 1:-1, 1:-1] = 0
        assert border.max() < 0.45 * 255
        centers = np.array([np.argwhere(frame).mean(0) for frame in saturated])
        moved = (centers[-1] - centers[0]) / resolution
        along, across = (moved[1], moved[0]) if direction in ("left", "right") else moved
        sign = 1 if direction in ("right", "down") else -1
        assert 0.2 < sign * along < 0.55
        assert abs(across) < 0.02
        # Large enough to see, and no change of size on the way.
        areas = saturated.mean((1, 2))
        assert 0.1 < areas.min() <= areas.max() < 0.27
        assert areas.max() < 1.25 * areas.min()


@pytest.mark.parametrize("sides", [(24, 48), (56, 32)])
def test_render_of_other_aspect_ratios_moves_along_all_of_the_frame(sides):
    travels = {0: [], 1: []}
    for i, combination in enumerate(moving_shapes.ALL):
        video = moving_shapes.render(np.random.default_rng(i), *combination, 8, sides)
        assert video.shape == (8, *sides, 3)
        saturation = np.ptp(video.astype(int), axis=-1)
        height, width = np.ptp(np.argwhere(saturation[0] > 70), axis=0) + 1
        assert 0.7 < height / width < 1.3  # it is no wider than in a square
        assert 0.35 < max(height, width) / min(sides) < 0.75
        centers = [np.argwhere(frame > 70).mean(0) for frame in (saturation[0], saturation[-1])]
        axis = int(combination[2] in ("left", "right"))
        travels[axis].append(abs(centers[1] - centers[0])[axis] / sides[axis])
        saturation[:, 1:-1, 1:-1] = 0
        assert saturation.max() < 0.55 * 255  # the margin is less of a pixel than at 32
        assert shapes.detect(video) == combination
    for along in travels.values():
        assert 0.2 < min(along) < 0.35
        assert 0.4 < max(along) < 0.55


def test_render_varies():
    rng = np.random.default_rng(0)
    first, second = (moving_shapes.render(rng, "red", "circle", "left", 8, 32) for _ in range(2))
    assert np.abs(first.astype(int) - second).mean() > 5


def test_edges_are_antialiased():
    video = moving_shapes.render(np.random.default_rng(0), "red", "circle", "left", 2, 64)
    saturation = np.ptp(video.astype(int), axis=-1)
    partly = (saturation > 0.3 * saturation.max()) & (saturation < 0.7 * saturation.max())
    assert partly.sum() > 40


def test_dataset_is_balanced_and_readable(tmp_path):
    assert moving_shapes.write_dataset(tmp_path, n_videos=80, **SMALL)
    entries = json.loads((tmp_path / "captions.json").read_text())
    assert len(entries) == 80
    drawn = Counter((e["color"], e["shape"], e["direction"]) for e in entries)
    assert drawn == Counter(list(moving_shapes.SEEN) * 2)
    for entry in entries:
        phrasings = moving_shapes.captions(entry["color"], entry["shape"], entry["direction"])
        assert len(entry["captions"]) == len(set(entry["captions"])) == 3
        assert set(entry["captions"]) <= set(phrasings)
    assert len({caption for entry in entries[::40] for caption in entry["captions"]}) > 3
    info = video_io.probe(tmp_path / "videos" / entries[0]["file"])
    assert (info.n_frames, info.height, info.width) == (8, 32, 32)
    assert info.fps == pytest.approx(8)


def test_dataset_depends_on_seed_and_index_only(tmp_path):
    moving_shapes.write_dataset(tmp_path / "a", n_videos=4, **SMALL)
    moving_shapes.write_dataset(tmp_path / "b", n_videos=6, **SMALL)
    moving_shapes.write_dataset(tmp_path / "c", n_videos=4, **SMALL | {"seed": 4})
    a, b, c = (files(tmp_path / name / "videos") for name in "abc")
    assert a == {name: b[name] for name in a}
    assert all(a[name] != c[name] for name in a)


def test_files_do_not_vary_from_write_to_write(tmp_path):
    """x264's macroblock tree read stale memory: one file in five differed, this one very often."""
    video = moving_shapes.render(np.random.default_rng(48), "red", "circle", "left", 8, 32)
    rng = np.random.default_rng(0)
    written, stale = set(), []
    for _ in range(40):
        stale = [*stale[-20:], rng.integers(0, 255, rng.integers(1, 20000), np.uint8)]
        video_io.write_video(tmp_path / "a.mp4", video, fps=8)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_whole_dataset_is_left_alone(tmp_path):
    assert moving_shapes.write_dataset(tmp_path, n_videos=3, **SMALL)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not moving_shapes.write_dataset(tmp_path, n_videos=3, **SMALL)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}


def test_other_parameters_are_refused(tmp_path):
    moving_shapes.write_dataset(tmp_path, n_videos=3, **SMALL)
    with pytest.raises(
        ValueError, match=r"params\.json: made with other settings: seed=5, there 3"
    ):
        moving_shapes.write_dataset(tmp_path, n_videos=3, **SMALL | {"seed": 5})


@pytest.mark.parametrize(
    "wrong",
    [{"n_captions": 0}, {"n_captions": 99}, {"resolution": 33}, {"fps": 0}, {"n_frames": 1}],
)
def test_bad_parameters_leave_nothing(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        moving_shapes.write_dataset(tmp_path / "a", n_videos=3, **SMALL | wrong)
    assert not (tmp_path / "a").exists()


def test_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle of writing; whole videos stay, and the result is the same."""
    program = (
        "import sys\n"
        "from opensora_jax.data import moving_shapes as m\n"
        "m.write_dataset(sys.argv[1], n_videos=3000, combinations=m.SEEN, seed=3, n_frames=8,"
        " resolution=32, fps=8, n_captions=3)\n"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(killed)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (killed / "videos" / "video20.mp4").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = sorted((killed / "videos").glob("*.mp4"))
    assert len(written) >= 20
    assert not (killed / "captions.json").exists()
    for path in written[:20]:
        assert len(video_io.read_video(path)) == 8

    # Finish a short one from the same state: 30 videos, some there, some not, some half-written.
    for path in written:
        if int(path.stem.removeprefix("video")) >= 15:
            path.unlink()
    (killed / "videos" / ".video15.mp4.1.tmp").write_bytes(b"half")
    (killed / "params.json").unlink()
    kept = {path: path.stat().st_mtime_ns for path in (killed / "videos").glob("*.mp4")}
    assert moving_shapes.write_dataset(killed, n_videos=30, **SMALL)
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    moving_shapes.write_dataset(tmp_path / "whole", n_videos=30, **SMALL)
    assert files(killed) == files(tmp_path / "whole")


def test_stage(tmp_path):
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "shapes": {
                "n_videos": 6,
                "n_held_out": 48,
                "n_frames": 8,
                "resolution": 32,
                "fps": 8,
                "n_captions": 2,
            },
        }
    )
    shapes_stage.run(config, tmp_path)
    splits = {}
    for split in ("train", "held_out"):
        entries = json.loads((tmp_path / "shapes" / split / "captions.json").read_text())
        splits[split] = {(e["color"], e["shape"], e["direction"]) for e in entries}
    assert splits["train"] <= set(moving_shapes.SEEN)
    assert splits["held_out"] == set(moving_shapes.ALL)
    train, held_out = (files(tmp_path / "shapes" / s / "videos") for s in ("train", "held_out"))
    assert not set(train.values()) & set(held_out.values())
    before = files(tmp_path)
    shapes_stage.run(config, tmp_path)
    assert files(tmp_path) == before
    config.shapes.resolution = 64
    with pytest.raises(ValueError, match="resolution=64, there 32"):
        shapes_stage.run(config, tmp_path)
