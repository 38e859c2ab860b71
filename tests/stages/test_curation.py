"""Datasets of clips cut from videos, through the whole of preprocessing."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest
from made_world import RESOLUTION, ROOT, command, run_on, write_captions, write_video
from test_preprocess import contents, direct_codes
from test_preprocess_on_ray import expect_same, finish, start, wait_for

from opensora_jax import inspect_data
from opensora_jax.data import dataset, pipeline, video_io
from opensora_jax.data.joined import load_joined
from opensora_jax.data.video_io import write_video as write_frames
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.preprocessing.options import PreprocessError

CUT = {"clip_frames": 8, "clip_stride": 12, "max_frames": 20}
# file -> (frames, clips of 8 that begin 12 apart)
VIDEOS = {"a.mp4": (40, 3), "b.mp4": (9, 1), "short.mp4": (7, 0), "c.mp4": (32, 3)}


@pytest.fixture(scope="module")
def cut(world, tmp_path_factory):
    """(captions, videos, dataset)"""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "videos").mkdir()
    for seed, (name, (n_frames, _)) in enumerate(VIDEOS.items()):
        write_video(folder / "videos" / name, n_frames, seed)
    captions = {name: ["one", f"of {name}"] for name in [*VIDEOS, "missing.mp4"]}
    path = write_captions(folder / "captions.json", captions)
    run_on(world, folder / "dataset", captions=path, videos=folder / "videos", **CUT)
    return path, folder / "videos", folder / "dataset"


def test_each_clip_has_rows_of_its_own_with_its_start(world, cut):
    _, videos, folder = cut
    found = dataset.open_dataset(folder)
    rows = [
        (name, 12 * k / 8, caption, 12 * k)
        for name, (_, n_clips) in VIDEOS.items()
        for k in range(n_clips)
        for caption in ("one", f"of {name}")
    ]
    assert len(found) == len(rows) == 14
    model = load_tokenizer(world / "vqvae")
    for i, (name, seconds, caption, first) in enumerate(rows):
        assert found.column(i, "video_file") == name
        assert found.column(i, "caption") == caption
        assert found.column(i, "start") == pytest.approx(seconds)
        frames = video_io.read_video(videos / name, resolution=RESOLUTION, start=first, n_frames=8)
        np.testing.assert_array_equal(found[i]["video_latent_states"], direct_codes(model, frames))
    metadata = found.metadata
    assert metadata["counts"] == {"kept": 3, "filtered": 1, "failed": 1}
    assert metadata["clip_counts"] == {"kept": 7, "filtered": 1}
    assert metadata["filtered"] == [
        {"file": "short.mp4", "start": 0.0, "reason": "7 frames, expected at least 8"}
    ]
    assert (metadata["n_videos"], metadata["n_rows"], metadata["window"]) == (7, 14, 8)
    joined = load_joined(folder)
    assert [row["start"] for row in joined] == [found.column(i, "start") for i in range(14)]


def test_all_clips_of_a_video_are_on_one_side_of_the_split(cut):
    found = dataset.open_dataset(cut[2])
    training, validation = pipeline.split_by_video(found, 1 / 3)
    sides = [{found.column(int(i), "video_file") for i in rows} for rows in (training, validation)]
    assert len(sides[0]) == 2
    assert len(sides[1]) == 1
    assert not sides[0] & sides[1]


def test_parts_and_the_order_of_decoding_change_nothing(world, cut, tmp_path):
    path, videos, folder = cut
    for name in ("one", "other"):
        options = {"captions": path, "videos": videos, "videos_per_part": 1, "batch_size": 2}
        run_on(world, tmp_path / name, **(CUT | options))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    found, expected = dataset.open_dataset(tmp_path / "one"), dataset.open_dataset(folder)
    for i in range(len(expected)):
        np.testing.assert_array_equal(
            found[i]["video_latent_states"], expected[i]["video_latent_states"]
        )
        assert found.column(i, "start") == expected.column(i, "start")


def test_a_dry_run_counts_videos_and_clips(world, cut, tmp_path, capsys):
    path, videos, _ = cut
    run_on(world, tmp_path, captions=path, videos=videos, dry_run=True, **CUT)
    found = json.loads((tmp_path / "dry_run.json").read_text())
    assert found["counts"] == {"kept": 3, "filtered": 1, "failed": 1}
    assert found["clip_counts"] == {"kept": 7, "filtered": 1}
    assert found["seconds"] == [1.0] * 7
    assert found["reasons"] == {
        "filtered": {"N frames, expected at least N": 1},
        "failed": {"no such file": 1},
    }
    for name, figure in found["figures"].items():
        assert sum(figure["kept"]) == 7, name
        assert sum(figure["filtered"]) == (name == "side"), name
        assert len(figure["edges"]) == len(figure["kept"]) + 1
    assert found["figures"].keys() == {"motion", "brightness", "frozen", "side"}
    said = capsys.readouterr().out
    assert "7 clips of 3 videos, 0.00 hours, would be kept" in said
    assert "short.mp4 at 0.000 s: 7 frames, expected at least 8" in said


CURATED = {"clip_frames": 8, "near_duplicates": 6, "min_motion": 1.0, "min_side": 16}


def curated_videos(folder):
    """Of 10 videos two are others once more, one in part, one stands still and one is no video;
    returns the captions."""
    (folder / "videos").mkdir()
    for i in range(8):
        write_textures(folder / "videos" / f"{i}.mp4", 8 + 8 * (i % 3), seed=i)
    write_textures(folder / "videos" / "3.mp4", 16, seed=1)  # as 1.mp4
    write_textures(folder / "videos" / "6.mp4", 24, seed=0)  # its first clip as 0.mp4
    write_textures(folder / "videos" / "still.mp4", 16, seed=9, moves=False)
    (folder / "videos" / "text.mp4").write_text("no video")
    names = [*(f"{i}.mp4" for i in range(8)), "still.mp4", "text.mp4"]
    captions = {name: [f"of {name}"] for name in names}
    return write_captions(folder / "captions.json", captions)


def write_textures(path, n_frames, seed, moves=True):
    rng = np.random.default_rng(seed)
    start = rng.integers(40, 216, (6, 7, 3))
    change = rng.integers(-8, 9, (6, 7, 3)) * moves
    frames = np.stack([start + (t % 8) * change for t in range(n_frames)]).clip(0, 255)
    write_frames(path, frames.astype(np.uint8).repeat(8, 1).repeat(8, 2), fps=8)


@pytest.fixture(scope="module")
def curated(world, tmp_path_factory):
    """(captions, videos, dataset)"""
    folder = tmp_path_factory.mktemp("curated")
    path = curated_videos(folder)
    options = CURATED | {"max_frames": None, "videos_per_part": 1}
    run_on(world, folder / "dataset", captions=path, videos=folder / "videos", **options)
    return path, folder / "videos", folder / "dataset"


def test_what_is_filtered_is_named_and_counted(curated):
    found = dataset.open_dataset(curated[2])
    kept = [(found.column(i, "video_file"), found.column(i, "start")) for i in range(len(found))]
    # Clips of one video, though they are the same here, are not compared.
    n_clips = {"0.mp4": 1, "1.mp4": 2, "2.mp4": 3, "4.mp4": 2, "5.mp4": 3, "7.mp4": 2}
    assert kept == [(name, float(k)) for name, n in n_clips.items() for k in range(n)]
    metadata = found.metadata
    assert metadata["counts"] == {"kept": 6, "filtered": 3, "failed": 1}
    assert metadata["clip_counts"] == {"kept": 13, "filtered": 7}
    alike = [(v["file"], v["start"], v["like"]) for v in metadata["filtered"] if "like" in v]
    assert alike == [
        *(("3.mp4", 0.0, "1.mp4"), ("3.mp4", 1.0, "1.mp4")),
        *(("6.mp4", 0.0, "0.mp4"), ("6.mp4", 1.0, "0.mp4"), ("6.mp4", 2.0, "0.mp4")),
    ]
    still = [v for v in metadata["filtered"] if v["file"] == "still.mp4"]
    assert all(v["reason"].startswith("still: moves by 0.0") for v in still)
    assert metadata["figures"].keys() == {"motion", "side"}
    assert sum(metadata["figures"]["motion"]["kept"]) == 13
    assert metadata["figures"]["motion"]["filtered"][0] == 2


def test_a_dry_run_leaves_out_the_same(world, curated, tmp_path):
    path, videos, folder = curated
    options = CURATED | {"captions": path, "videos": videos, "max_frames": None}
    run_on(world, tmp_path, dry_run=True, **options)
    found = json.loads((tmp_path / "dry_run.json").read_text())
    metadata = dataset.read_metadata(folder)
    for name in ("counts", "clip_counts", "filtered", "failed"):
        assert found[name] == metadata[name]
    for name, figure in metadata["figures"].items():
        assert found["figures"][name] == figure
    assert found["reasons"]["filtered"]["near-duplicate: N of N bits differ"] == 5


def test_shots_are_clips_and_bars_are_gone(world, tmp_path):
    (tmp_path / "videos").mkdir()
    for seed in range(2):
        write_textures(tmp_path / "videos" / f"{seed}.mp4", 12, seed)
    shots = [video_io.read_video(tmp_path / "videos" / f"{seed}.mp4") for seed in range(2)]
    both = np.pad(np.concatenate(shots), ((0, 0), (0, 0), (20, 20), (0, 0)))
    write_frames(tmp_path / "videos" / "both.mp4", both, fps=8)
    path = write_captions(tmp_path / "captions.json", {"both.mp4": ["two shots"]})
    options = {"captions": path, "videos": tmp_path / "videos", "resolution": (8, 16)}
    run_on(world, tmp_path / "dataset", split_scenes=True, crop_bars=True, **options)
    found = dataset.open_dataset(tmp_path / "dataset")
    assert [found.column(i, "start") for i in range(len(found))] == [0.0, 1.5]
    assert found.latent_frames.tolist() == [3, 3]
    assert found.metadata["clip_counts"] == {"kept": 2, "filtered": 0}
    words = shlex.split(found.metadata["command"])
    assert {"--split_scenes", "--crop_bars"} <= set(words)
    assert "True" not in words


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_clips(world, curated, tmp_path):
    path, videos, expected = curated
    words = command(world, path, videos, tmp_path / "killed")
    for name, value in CURATED.items():
        words += [f"--{name}", str(value)]
    process = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "killed" / "part-00002.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    options = CURATED | {"captions": path, "videos": videos, "videos_per_part": 1}
    run_on(world, tmp_path / "killed", max_frames=None, **options)
    assert contents(tmp_path / "killed") == contents(expected)


def test_the_page_shows_what_was_filtered(world, curated, tmp_path):
    inspect_data.inspect(curated[2], tmp_path / "page.html", n_examples=2)
    page = (tmp_path / "page.html").read_text()
    text = " ".join(re.sub(r"<[^>]*>", " ", page).split())
    for words in ("13 clips", "6 videos that they are of", "7 clips filtered", "1 videos failed"):
        assert words in text
    for words in ("5 filtered: near-duplicate: N of N bits differ", "0.mp4 at 0.000 s"):
        assert words in text
    assert "have the name of another" not in text
    assert page.count("<svg") == 7  # five, and those of motion and size


@pytest.mark.slow
def test_ray_keeps_and_leaves_out_the_same_also_after_a_kill(world, curated, tmp_path):
    path, videos, expected = curated
    words = command(world, path, videos, tmp_path / "ray")
    for name, value in CURATED.items():
        words += [f"--{name}", str(value)]
    process = start(words)
    wait_for(tmp_path / "ray" / "part-00002.json", process)
    process.kill()
    process.communicate()
    # As of a run whose later parts were the faster ones, as it may have been.
    (tmp_path / "ray" / "part-00001.json").unlink(missing_ok=True)
    finish(start(words))
    expect_same(tmp_path / "ray", expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_frames": 8, "n_frames": 8}, "n_frames=8: expected none with clip_frames=8"),
        ({"clip_stride": 8}, "clip_stride=8: expected clip_frames with it"),
        ({"clip_frames": 6}, "clip_frames=6: expected a multiple of 4"),
        ({"clip_frames": -8}, "clip_frames=-8: expected at least 0"),
        ({"min_motion": float("nan")}, "min_motion=nan: expected at least 0"),
    ],
)
def test_what_does_not_fit_is_told_at_once(world, tmp_path, options, message):
    with pytest.raises(PreprocessError, match=message):
        run_on(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
