"""Preprocessing of real files of many shapes into buckets."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from made_world import ROOT, run_on, write_captions
from test_preprocess import contents, jit_encode

from opensora_jax.data import bucket_folders, dataset, video_io
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.preprocessing.job import NothingKeptError
from opensora_jax.preprocessing.options import Options, PreprocessError
from opensora_jax.stages.preprocess_buckets import preprocess_buckets

BUCKETS = "16x16x16,8x8x16,8x16x8,1x16x16"
# file -> ((frames, height, width), bucket); the tokenizer's windows have 16 frames, 4 a latent
FILES = {
    "square.mp4": ((20, 48, 48), "16x16x16"),
    "wide.mp4": ((17, 24, 48), "8x8x16"),  # half of the frames is less than half of the pixels
    "tall.mp4": ((9, 48, 24), "8x16x8"),
    "wide.png": ((1, 24, 48), "1x16x16"),
    "square.png": ((1, 32, 32), "1x16x16"),
    "short.mp4": ((5, 32, 32), None),
    "text.mp4": (None, None),
    "missing.mp4": (None, None),
}


def frames_of(shape, seed):
    # Blocks, which compression keeps.
    n, height, width = shape
    blocks = np.random.default_rng(seed).integers(0, 256, (n, height // 8, width // 8, 3), np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for seed, (name, (shape, _)) in enumerate(FILES.items()):
        if shape is None:
            continue
        if name.endswith(".png"):
            iio.imwrite(folder / name, frames_of(shape, seed)[0])
        else:
            video_io.write_video(folder / name, frames_of(shape, seed), fps=8)
    (folder / "text.mp4").write_text("no video")
    write_captions(folder / "captions.json", {name: ["a caption", name] for name in FILES})
    return folder


def make(world, shapes, output, asked=BUCKETS, captions=None, **options):
    models = {"vqvae": world / "vqvae", "text_model": world / "text_model"}
    captions = captions or shapes / "captions.json"
    options = {"batch_size": 3, "videos_per_part": 4, **models, **options}
    sizes = {name: options.pop(name) for name in ("bucket_tokens", "patch") if name in options}
    preprocess_buckets(captions, shapes, output, Options(**options), asked=asked, **sizes)


@pytest.fixture(scope="module")
def finished(world, shapes, tmp_path_factory):
    output = tmp_path_factory.mktemp("buckets") / "out"
    make(world, shapes, output)
    return output


def videos_of(folder):
    found = dataset.open_dataset(folder)
    return {
        found.column(i, "video_file"): found[i]["video_latent_states"] for i in range(len(found))
    }


def test_each_clip_is_in_the_bucket_that_loses_least_and_all_are_counted(world, shapes, finished):
    folders = bucket_folders.datasets(finished)
    assert [path.name for path in folders] == BUCKETS.split(",")
    model, seen = load_tokenizer(world / "vqvae"), {}
    for folder in folders:
        size = tuple(int(n) for n in folder.name.split("x"))
        for file, codes in videos_of(folder).items():
            seen[file] = folder.name
            video = video_io.read_video(shapes / file, resolution=size[1:], n_frames=size[0])
            # What is no whole window is filled up with its last frame, an image to a latent.
            video = np.concatenate([video, *[video[-1:]] * (16 - len(video))])
            expected = jit_encode(model, video[None].astype(np.float32) / 255 - 0.5)[0]
            np.testing.assert_array_equal(codes, expected[: max(1, size[0] // 4)])
    assert seen == {file: bucket for file, (_, bucket) in FILES.items() if bucket}
    found = json.loads((finished / "buckets.json").read_text())
    assert found["counts"] == {"kept": 5, "filtered": 1, "failed": 2}
    assert found["filtered"] == [{"file": "short.mp4", "reason": "5 frames, expected at least 8"}]
    assert [video["file"] for video in found["failed"]] == ["text.mp4", "missing.mp4"]
    every = [dataset.read_metadata(folder) for folder in folders]
    assert {metadata["window"] for metadata in every} == {16}
    for kind in ("kept", "filtered", "failed"):
        assert sum(metadata["counts"][kind] for metadata in every) == found["counts"][kind]


def test_a_finished_folder_is_done_already_and_another_one_is_refused(
    world, shapes, finished, tmp_path, capsys
):
    make(world, shapes, finished)
    assert "done already" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"buckets\.json: made with other settings: buckets="):
        make(world, shapes, finished, asked="8x16x16")
    with pytest.raises(PreprocessError, match="holds a dataset: expected another folder"):
        make(world, shapes, finished / "8x8x16")
    with pytest.raises(dataset.DatasetError, match=r"holds buckets: name one, such as .*16x16x16"):
        dataset.open_dataset(finished)


@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ("8x16", {}, "expected sizes of frames x height x width"),
        ("8x16x18", {}, r"buckets: 8x16x18: resolution=16x18: expected multiples of .* 4x4"),
        ("6x16x16", {}, "buckets: 6x16x16: n_frames=6: expected a multiple of 4"),
        ("8x16x16", {"n_frames": 8}, "n_frames=8: expected none: buckets=8x16x16 says it"),
        ("8x16x16", {"clip_frames": 4}, "clip_frames=4: expected at least 8, of buckets: 8x16x16"),
        ("8x16x16", {"split_scenes": True}, "split_scenes=True: expected False with buckets=8x16x"),
        (
            *("auto", {"bucket_tokens": 4, "n_frames": 4, "clip_frames": 4}),
            "n_frames=4: expected none with clip_frames=4",
        ),
        ("auto", {}, "bucket_tokens=0: expected at least 1"),
        ("auto", {"bucket_tokens": 4, "n_frames": 6}, "n_frames=6: expected a multiple of 4"),
        ("auto", {"bucket_tokens": 4, "n_frames": -4}, "n_frames=-4: expected at least 1"),
        ("auto", {"bucket_tokens": 4, "patch": 0}, "patch=0: expected at least 1"),
        ("8x16x16", {"text_model": "nowhere/of/all"}, "nowhere/of/all"),
    ],
)
def test_bad_sizes_are_told_before_anything_is_written(
    world, shapes, tmp_path, asked, options, message
):
    with pytest.raises((ValueError, OSError), match=message):
        make(world, shapes, tmp_path / "out", asked=asked, **options)
    assert not (tmp_path / "out").exists()


def test_what_is_sorted_is_gone_on_with_by_the_same_options_alone(
    world, shapes, finished, tmp_path
):
    found = bucket_folders.read(finished)
    begun = {name: found[name] for name in ("settings", "sizes")}
    begun |= {"complete": False, "entries": [0] * len(FILES)}
    path = tmp_path / "buckets.json"
    path.write_text(json.dumps(begun))
    with pytest.raises(
        ValueError, match=r"buckets\.json: made with other settings: crop_bars=True"
    ):
        make(world, shapes, tmp_path, crop_bars=True)
    # Older lists do not say it.
    for name in ("vqvae_fingerprint", "clip_frames", "crop_bars"):
        del found["settings"][name]
    shutil.copytree(finished, tmp_path / "older")
    (tmp_path / "older" / "buckets.json").write_text(json.dumps(found))
    make(world, shapes, tmp_path / "older")


def test_sizes_are_chosen_by_the_videos(world, shapes, tmp_path):
    make(world, shapes, tmp_path / "a", asked="auto", bucket_tokens=16, patch=2)
    found = json.loads((tmp_path / "a" / "buckets.json").read_text())
    # Half of the videos have a window of 16 frames: four latents, of four tokens of 8 x 8 pixels.
    assert [path.name for path in bucket_folders.datasets(tmp_path / "a")] == found["sizes"]
    frames, heights, widths = np.array([size.split("x") for size in found["sizes"]], int).T
    assert set(frames) == {16, 8, 4, 1}
    assert (heights * widths <= 4 * 64).all()
    assert not (heights % 8).any()
    assert found["counts"]["failed"] == 2
    assert sum(found["counts"].values()) == len(FILES)


def test_clips_of_a_video_go_to_the_bucket_that_loses_least_of_them(world, shapes, tmp_path):
    """Every 10 frames one of 8 begins: two of 20 frames, one of 17 and of 9."""
    options = {"clip_frames": 8, "clip_stride": 10, "crop_bars": True}
    make(world, shapes, tmp_path / "a", "8x16x16,8x8x16,8x16x8,1x16x16", **options)
    starts = {}
    for folder in bucket_folders.datasets(tmp_path / "a"):
        found = dataset.open_dataset(folder)
        for i in range(len(found)):
            start = found.column(i, "start") if found.has_column("start") else None
            key = found.column(i, "video_file"), start
            starts.setdefault(folder.name, set()).add(key)
    assert starts == {
        "8x16x16": {("square.mp4", 0.0), ("square.mp4", 1.25)},
        "8x8x16": {("wide.mp4", 0.0)},
        "8x16x8": {("tall.mp4", 0.0)},
        "1x16x16": {("wide.png", None), ("square.png", None)},
    }
    # Longer clips are cut to what a bucket keeps, and so begin further apart.
    make(world, shapes, tmp_path / "b", BUCKETS, clip_frames=16, min_motion=1.0)
    found = json.loads((tmp_path / "b" / "buckets.json").read_text())
    assert found["counts"] == {"kept": 5, "filtered": 1, "failed": 2}
    with pytest.raises(ValueError, match="made with other settings: min_motion=None"):
        make(world, shapes, tmp_path / "b", BUCKETS, clip_frames=16)


def test_nothing_kept_is_an_error_that_can_be_tried_again(world, shapes, tmp_path):
    captions = write_captions(tmp_path / "captions.json", {"short.mp4": ["a"], "wide.png": ["b"]})
    for _ in range(2):
        with pytest.raises(NothingKeptError, match="not one video could be kept"):
            make(world, shapes, tmp_path / "out", "16x16x16,8x8x8", captions)
    # A bucket that none is kept of is not among the others.
    make(world, shapes, tmp_path / "other", "8x8x8,1x8x8", captions)
    assert bucket_folders.datasets(tmp_path / "other") == [tmp_path / "other" / "1x8x8"]
    found = json.loads((tmp_path / "other" / "buckets.json").read_text())
    assert found["counts"] == {"kept": 1, "filtered": 1, "failed": 0}


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill_with_the_same_buckets(world, shapes, finished, tmp_path):
    output = tmp_path / "out"
    words = [sys.executable, str(ROOT / "data_prep" / "preprocess_data.py")]
    words += ["-c", shapes / "captions.json", "-v", shapes, "-o", output]
    words += ["--vqvae", world / "vqvae", "--text_model", world / "text_model", "--fps", "0"]
    words += ["--buckets", BUCKETS, "--videos_per_part", "4", "--batch_size", "3"]
    program = (
        "import os, runpy, sys; from opensora_jax.data import dataset_writer as w; n = []\n"
        "def finish(*a, **k):\n    n.append(0)\n    if len(n) == 2: os._exit(9)\n"
        "    return finished(*a, **k)\n"
        "finished, w.finish_dataset = w.finish_dataset, finish\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = list(map(str, words))
    killed = subprocess.run(
        [words[0], "-c", program, *words[1:]], capture_output=True, text=True, check=False
    )
    assert killed.returncode == 9, killed.stderr
    assert not bucket_folders.is_complete(output)
    with pytest.raises(dataset.DatasetError, match=r"To finish it, run: .* --buckets 16x16x16,"):
        dataset.open_dataset(output / "8x8x16")
    make(world, shapes, output)
    for folder in bucket_folders.datasets(finished):
        assert contents(output / folder.name) == contents(Path(folder))


def test_a_dry_run_looks_at_each_bucket(world, shapes, tmp_path):
    make(world, shapes, tmp_path / "out", dry_run=True)
    found = json.loads((tmp_path / "out" / "1x16x16" / "dry_run.json").read_text())
    assert found["kept"] == 2
    assert not (tmp_path / "out" / "buckets.json").exists()
    run_on(world, tmp_path / "other")
    with pytest.raises(PreprocessError, match="holds a dataset"):
        make(world, shapes, tmp_path / "other")
