"""Datasets of clips cut from videos, through the whole of preprocessing."""

import json

import numpy as np
import pytest
from made_world import RESOLUTION, run_on, write_captions, write_video
from test_preprocess import contents, direct_codes

from opensora_jax.data import dataset, pipeline, video_io
from opensora_jax.data.joined import load_joined
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.stages.preprocess import PreprocessError

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
    for i, (name, start, caption, first) in enumerate(rows):
        assert found.column(i, "video_file") == name
        assert found.column(i, "caption") == caption
        assert found.column(i, "start") == pytest.approx(start)
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
    said = capsys.readouterr().out
    assert "7 clips of 3 videos, 0.00 hours, would be kept" in said
    assert "short.mp4 at 0.000 s: 7 frames, expected at least 8" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_frames": 8, "n_frames": 8}, "n_frames=8: expected none with clip_frames=8"),
        ({"clip_stride": 8}, "clip_stride=8: expected clip_frames with it"),
        ({"clip_frames": 6}, "clip_frames=6: expected a multiple of 4"),
        ({"clip_frames": -8}, "clip_frames=-8: expected at least 0"),
    ],
)
def test_what_does_not_fit_is_told_at_once(world, tmp_path, options, message):
    with pytest.raises(PreprocessError, match=message):
        run_on(world, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
