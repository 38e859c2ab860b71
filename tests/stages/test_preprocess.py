"""Preprocessing of real video files with a VQ-VAE and a text encoder of random weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
from flax import nnx
from made_world import (
    RESOLUTION,
    ROOT,
    USABLE,
    WINDOW,
    command,
    identities,
    run_on,
    write_captions,
    write_video,
)

from opensora_jax import lock
from opensora_jax.data import dataset, dataset_writer, moving_shapes, video_io
from opensora_jax.data.captions import CaptionsError
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.preprocessing.options import PreprocessError
from opensora_jax.stages import preprocess as stage


@pytest.fixture(scope="module")
def finished(world):
    run_on(world, world / "dataset")
    return world / "dataset"


jit_encode = nnx.jit(lambda model, video: model.encode(video))


def direct_codes(model, frames):
    """The codes by the definition: window by window, the last one padded with its last frame."""
    frames = frames[: len(frames) // 4 * 4]
    codes = []
    for start in range(0, len(frames), WINDOW):
        window = frames[start : start + WINDOW]
        padded = np.concatenate([window, *[window[-1:]] * (WINDOW - len(window))])
        video = padded[None].astype(np.float32) / 255 - 0.5
        codes.append(np.asarray(jit_encode(model, video))[0, : len(window) // 4])
    return np.concatenate(codes)


def test_each_caption_is_a_row_with_the_codes_and_features_of_direct_encoding(world, finished):
    found = dataset.open_dataset(finished)
    expected = [(file, text) for file, (_, texts) in USABLE.items() for text in texts]
    rows = [(found.column(i, "video_file"), found.column(i, "caption")) for i in range(len(found))]
    assert rows == expected
    model = load_tokenizer(world / "vqvae")
    text_encoder = TextEncoder(world / "text_model")
    for i, (file, caption) in enumerate(expected):
        codes = found[i]["video_latent_states"]
        assert codes.shape == (USABLE[file][0] // 4, 4, 2)
        frames = video_io.read_video(world / "videos" / file, resolution=RESOLUTION)
        np.testing.assert_array_equal(codes, direct_codes(model, frames))
        features = text_encoder.encode([caption])[0]
        np.testing.assert_array_equal(
            found[i]["text_latent_states"], features.astype(np.float16).astype(np.float32)
        )
    assert len(np.unique(found[2]["video_latent_states"])) > 3  # not one code for everything
    np.testing.assert_array_equal(found.codebook, model.codebook)


def test_metadata_counts_and_names_what_was_left_out(finished):
    metadata = dataset.open_dataset(finished).metadata
    assert metadata["counts"] == {"kept": 3, "filtered": 2, "failed": 3}
    filtered = {video["file"]: video["reason"] for video in metadata["filtered"]}
    assert filtered == {
        "too_long.mp4": "more than 30 frames",
        "too_short.mp4": "3 frames, expected at least 4",
    }
    failed = {video["file"]: video["reason"] for video in metadata["failed"]}
    assert list(failed) == ["truncated.mp4", "missing.mp4", "text.mp4"]
    assert failed["missing.mp4"] == "no such file"
    assert metadata["resolution"] == [16, 8]
    assert metadata["downsample"] == [4, 4, 4]
    assert metadata["fps"] == pytest.approx(8, rel=0.1)  # a .gif's times are whole hundredths
    assert (metadata["window"], metadata["text_width"], metadata["n_rows"]) == (WINDOW, 64, 6)


def test_a_finished_folder_is_done_already(world, finished, capsys):
    files = sorted(finished.rglob("*"))
    before = identities(files)
    run_on(world, finished)
    assert "done already" in capsys.readouterr().out
    assert sorted(finished.rglob("*")) == files
    assert identities(files) == before


def test_a_folder_made_with_other_settings_is_refused(world, finished, tmp_path):
    metadata = dataset.read_metadata(finished)
    keys = ("captions_sha256", "vqvae_fingerprint", "text_model", "resolution", "window")
    others = metadata["settings"] | dict.fromkeys(keys, "another")
    dataset_writer.write_metadata(tmp_path, metadata | {"settings": others})
    with pytest.raises(ValueError, match="made with other settings") as caught:
        run_on(world, tmp_path)
    for key in keys:
        assert f"{key}={metadata['settings'][key]!r}, there 'another'" in str(caught.value)


def test_a_folder_that_another_run_is_writing_is_refused(world, tmp_path):
    with lock.exclusive(tmp_path), pytest.raises(lock.FolderInUse, match="in use by process"):
        run_on(world, tmp_path)
    assert not list(tmp_path.glob("*.json"))


def test_fixed_length_and_frame_rate(world, tmp_path, capsys):
    run_on(world, tmp_path, n_frames=8, fps=16.0, window=None)
    found = dataset.open_dataset(tmp_path)
    # At twice the rate every frame is shown twice: 3 frames give 6, too few.
    (filtered,) = found.metadata["filtered"]
    assert filtered == {"file": "too_short.mp4", "reason": "6 frames, expected at least 8"}
    assert found.metadata["latent_shape"] == [2, 4, 2]
    assert found.metadata["fps"] == 16
    assert found.metadata["window"] == 8  # of the 16 that it was trained on
    # What is cut is not too long.
    assert found.metadata["counts"] == {"kept": 4, "filtered": 1, "failed": 3}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "preprocess: videos are resampled to 16 frames a second (fps=16)"
    assert "7 rows of 4 videos" in lines[1]
    assert lines[-4] == "preprocess: 3 videos failed"
    assert lines[-2] == "  missing.mp4: no such file"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 18}, "resolution=18x18: expected multiples of .* 4x4"),
        ({"window": 6}, "window=6: expected a multiple of 4, the tokenizer"),
        ({"n_frames": 6}, "n_frames=6: expected a multiple"),
        ({"fps": float("inf")}, r"fps=inf: expected 0\.01 to 1000"),
        ({"max_frames": 0}, "max_frames=0: expected at least 1"),
        ({"videos_per_part": 0}, "videos_per_part=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"video_timeout": 0}, "video_timeout=0: expected a positive number"),
        ({"videos": "nowhere"}, r"nowhere: none of .* videos is there, not 'too_long\.mp4'"),
        ({"text_model": ROOT / "nowhere"}, "nowhere"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(world, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_on(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_bad_captions_are_named_before_anything_is_written(world, tmp_path):
    captions = write_captions(tmp_path / "captions.json", {"whole.mp4": []})
    with pytest.raises(CaptionsError, match=r"captions=\[\]"):
        run_on(world, tmp_path / "out", captions=captions)


def test_an_output_that_is_no_folder_is_named_before_any_work(world, tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "dataset"):
        with pytest.raises(PreprocessError, match=rf"{output}: {tmp_path}/file is a file: exp"):
            run_on(world, output, captions=tmp_path / "nowhere.json")
    with pytest.raises(PreprocessError, match=r"gs://bucket/x: expected a folder of this machine"):
        run_on(world, "gs://bucket/x")
    # No one can make files in here, root not either.
    with pytest.raises(PreprocessError, match=r"/proc/dataset: cannot be written"):
        run_on(world, "/proc/dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_dry_run_says_what_would_become_of_the_videos(world, tmp_path, capsys):
    run_on(world, tmp_path / "out", dry_run=True)
    found = json.loads((tmp_path / "out" / "dry_run.json").read_text())
    assert found["kept"] == 3
    assert found["seconds"] == pytest.approx([1.0, 3.5, 1.0], abs=0.05)
    assert all(m > 0 for m in found["motion"])
    assert [v["file"] for v in found["filtered"]] == ["too_long.mp4", "too_short.mp4"]
    assert [v["file"] for v in found["failed"]] == ["truncated.mp4", "missing.mp4", "text.mp4"]
    assert "3 videos, 0.00 hours, would be kept" in capsys.readouterr().out
    assert not (tmp_path / "out" / "metadata.json").exists()
    run_on(world, tmp_path / "out", min_motion=100.0, dry_run=True)
    assert "still: moves by" in capsys.readouterr().out
    run_on(world, tmp_path / "out")  # and then for real, in the same folder
    assert len(dataset.open_dataset(tmp_path / "out")) == 6


def test_what_cannot_be_used_is_counted_or_with_strict_an_error(world, tmp_path):
    entries = [
        {"file": "whole.mp4", "captions": ["a red circle"]},
        {"file": "long.mp4", "captions": [7]},
        {"file": "odd.gif"},
        {"file": "../odd.gif", "captions": ["out"]},
        {"file": "whole.mp4", "captions": ["again"]},
        {"file": "text.mp4", "captions": ["no video"]},
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(entries))
    run_on(world, tmp_path / "out", captions=path)
    metadata = dataset.read_metadata(tmp_path / "out")
    assert metadata["counts"] == {"kept": 1, "filtered": 0, "failed": 5}
    for entry, reason in zip(
        metadata["failed"],
        (
            "captions[0]=7",
            "no 'captions'",
            "file='../odd.gif'",
            "is already at entry 0",
            "cannot be",
        ),
        strict=True,
    ):
        assert reason in entry["reason"]
    with pytest.raises(CaptionsError, match=r"entry 1: captions\[0\]=7"):
        run_on(world, tmp_path / "strict", captions=path, strict=True)
    path.write_text(json.dumps([entries[0], entries[5]]))
    with pytest.raises(PreprocessError, match=r"text\.mp4': cannot be read.*strict"):
        run_on(world, tmp_path / "strict", captions=path, strict=True)
    assert not dataset.read_metadata(tmp_path / "strict")["complete"]


def test_not_one_usable_video_is_an_error(world, tmp_path, capsys):
    captions = write_captions(tmp_path / "captions.json", {"truncated.mp4": ["a"]})
    with pytest.raises(PreprocessError, match="not one video could be kept"):
        run_on(world, tmp_path / "out", captions=captions)
    assert "truncated.mp4: " in capsys.readouterr().out


def test_a_caption_is_encoded_once(world, tmp_path, monkeypatch):
    encoded = []
    encode = TextEncoder.encode

    def counting(self, captions):
        encoded.extend(captions)
        return encode(self, captions)

    monkeypatch.setattr(TextEncoder, "encode", counting)
    run_on(world, tmp_path / "out", videos_per_part=1)
    texts = [text for _, texts in USABLE.values() for text in texts]
    assert encoded == list(dict.fromkeys(texts))


def contents(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    metadata = json.loads(found.pop("metadata.json"))
    del metadata["command"], metadata["checksum"]  # it names the folder
    return found, metadata


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(world, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    captions = {}
    for i in range(12):
        file = f"video{i:02d}.mp4"
        captions[file] = ["a shared caption", f"caption {i}"]
        if i % 7 == 3:
            (videos / file).write_text("no video")
        else:
            write_video(videos / file, 4 + i, seed=i)
    path = write_captions(tmp_path / "captions.json", captions)

    output = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *command(world, path, videos, output)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (output / "part-00002.json").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not dataset.read_metadata(output)["complete"]
    with pytest.raises(dataset.DatasetError, match=r"To finish it, run: python .* --window 8"):
        dataset.open_dataset(output)
    kept = sorted(output.glob("part-0000[01]/*"))
    made = identities(kept)
    assert len(kept) == 6

    options = {"captions": path, "videos": videos, "videos_per_part": 1, "max_frames": None}
    run_on(world, output, **options)
    assert identities(kept) == made  # not made again
    run_on(world, tmp_path / "straight", **options)
    assert contents(output) == contents(tmp_path / "straight")
    assert len(dataset.open_dataset(output)) == 2 * 10


def test_the_command_names_what_is_wrong_without_a_traceback(world, tmp_path):
    words = command(world, tmp_path / "nowhere.json", tmp_path, tmp_path / "out")
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/nowhere.json: no such file")


def test_the_stage_takes_what_earlier_stages_made_and_a_small_text_model(world, tmp_path, capsys):
    shutil.copytree(world / "vqvae", tmp_path / "vqvae")
    moving_shapes.write_dataset(
        tmp_path / "shapes" / "train",
        n_videos=3,
        combinations=moving_shapes.SEEN,
        seed=0,
        n_frames=8,
        resolution=16,
        fps=8,
        n_captions=2,
    )
    config = ml_collections.ConfigDict(
        {
            "data": {"captions": "", "videos": "", "vqvae": "", "text_model": ""},
            "preprocess": {
                "resolution": RESOLUTION[0],
                "fps": 0,
                "max_frames": 600,
                "n_frames": 8,
                "window": 0,
                "batch_size": 3,
                "videos_per_part": 2,
            },
        }
    )
    stage.run(config, tmp_path)
    assert "small, randomly initialised" in capsys.readouterr().out
    found = dataset.open_dataset(tmp_path / "dataset")
    assert len(found) == 6
    assert found.metadata["latent_shape"] == [2, 4, 4]
    assert found.metadata["text_model"] == str(tmp_path / "text_model")
    stage.run(config, tmp_path)
    assert "done already" in capsys.readouterr().out
    # Another folder does not make it another dataset.
    moved = tmp_path.with_name(f"{tmp_path.name}_moved")
    tmp_path.rename(moved)
    stage.run(config, moved)
    assert "done already" in capsys.readouterr().out
