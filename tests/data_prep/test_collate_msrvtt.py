"""collate_msrvtt.py on small trees of real videos, laid out like the published archive."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.data import video_io
from opensora_jax.data.captions import read_captions

ROOT = Path(__file__).parents[2]


def make_archive(folder, lists=None):
    """Six videos, two captions each, interleaved as in the original; video4 is in no split."""
    lists = lists or {"train": ["video2", "video0"], "val": ["video1.mp4"], "test": ["video3"]}
    videos = folder / "videos" / "all"
    videos.mkdir(parents=True)
    for i in range(5):
        frames = np.full((4, 16, 16, 3), 40 * i, np.uint8)
        video_io.write_video(videos / f"video{i}.mp4", frames, fps=8)
    annotations = [
        {"caption": f"caption {k} of {i}", "image_id": f"video{i}", "category": 1}
        for k in range(2)
        for i in range(5)
    ]
    (folder / "annotation").mkdir()
    (folder / "annotation" / "MSR_VTT.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "structured-symlinks").mkdir()
    for split, names in lists.items():
        path = folder / "structured-symlinks" / f"{split}_list_full.txt"
        path.write_text("\n".join(names) + "\n")
    return folder


def collate(source, output):
    command = [sys.executable, ROOT / "data_prep" / "collate_msrvtt.py", "-d", source, "-o", output]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def add_annotation(source, **annotation):
    path = source / "annotation" / "MSR_VTT.json"
    annotations = json.loads(path.read_text())["annotations"]
    path.write_text(json.dumps({"annotations": [*annotations, annotation]}))


def snapshot(folder):
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path: (path.stat().st_ino, path.read_bytes()) for path in paths if path.suffix != ".json"
    }


def test_splits_with_all_captions_of_a_video_together(tmp_path):
    source = make_archive(tmp_path / "MSRVTT")
    done = collate(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert list(read_captions(tmp_path / "out" / "train" / "annotations.json")) == [
        {"file": "video2.mp4", "captions": ["caption 0 of 2", "caption 1 of 2"]},
        {"file": "video0.mp4", "captions": ["caption 0 of 0", "caption 1 of 0"]},
    ]
    for split, name in (("train", "video2"), ("val", "video1"), ("test", "video3")):
        entries = read_captions(tmp_path / "out" / split / "annotations.json")
        assert entries[0]["file"] == f"{name}.mp4"
        video = tmp_path / "out" / split / "videos" / f"{name}.mp4"
        assert video.samefile(source / "videos" / "all" / f"{name}.mp4")  # no second copy
    assert "train: 2 videos, 4 captions" in done.stdout


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    lists = {"train": ["video0", "video9"], "val": ["video1", "video8"], "test": ["video3"]}
    source = make_archive(tmp_path / "MSRVTT", lists)
    add_annotation(source, image_id="video9", caption="its video is missing")
    add_annotation(source, image_id="video0", caption="  ")
    (source / "videos" / "all" / "video8.mp4").write_bytes(b"no captions")
    done = collate(source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "collate_report.json").read_text())
    assert report["splits"]["train"] == {
        "videos": 1,
        "captions": 2,
        "missing_videos": ["video9"],
        "videos_without_captions": [],
    }
    assert report["splits"]["val"]["videos_without_captions"] == ["video8"]
    assert report["captioned_but_in_no_split"] == ["video2", "video4"]
    assert report["captions_in_no_split"] == 4
    assert report["blank_captions_of"] == ["video0"]
    assert "1 videos missing: video9" in done.stdout
    assert "4 captions of videos in no split" in done.stdout
    assert "2 captioned videos in no split: video2, video4" in done.stdout


def test_a_video_in_two_splits_is_reported(tmp_path):
    lists = {"train": ["video0", "video1"], "val": ["video1"], "test": ["video3"]}
    done = collate(make_archive(tmp_path / "MSRVTT", lists), tmp_path / "out")
    assert "1 videos in several splits: video1" in done.stdout


def test_running_again_changes_nothing_and_repairs_what_is_incomplete(tmp_path):
    source = make_archive(tmp_path / "MSRVTT")
    collate(source, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    assert collate(source, tmp_path / "out").returncode == 0
    assert snapshot(tmp_path / "out") == before
    video = tmp_path / "out" / "test" / "videos" / "video3.mp4"
    video.unlink()
    video.write_bytes(b"half")
    collate(source, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize(
    "missing",
    ["annotation/MSR_VTT.json", "structured-symlinks/val_list_full.txt", "videos/all"],
)
def test_a_missing_file_is_named(tmp_path, missing):
    source = make_archive(tmp_path / "MSRVTT")
    (source / missing).rename(tmp_path / "elsewhere")
    done = collate(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {source / missing}: no such f")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds a list: expected an object"),
        ('{"annotations": 3}', "annotations=3: expected a list"),
        ('{"annotations": [%s]}' % ("[" * 100_000 + "]" * 100_000), "not JSON"),
        ('{"annotations": ["%s"]}' % ("x" * 1_000_000), "annotations[0]="),
        (
            '{"annotations": [{"image_id": "%s", "caption": "a"}]}' % ("x" * 300),
            "expected the name",
        ),
        ('{"annotations": [3]}', "annotations[0]=3: expected an object"),
        (
            '{"annotations": [{"image_id": "video0"}]}',
            "annotations[0]: caption=None: expected a str",
        ),
        ('{"annotations": [{"image_id": "../x", "caption": "a"}]}', "'../x': expected the name"),
    ],
)
def test_mistakes_in_the_annotations_are_named(tmp_path, text, message):
    source = make_archive(tmp_path / "MSRVTT")
    path = source / "annotation" / "MSR_VTT.json"
    path.write_text(text)
    done = collate(source, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {path}: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 1000


def test_a_list_that_leaves_the_video_folder_is_refused(tmp_path):
    lists = {"train": ["video0", "../../secret"], "val": ["video1"], "test": ["video3"]}
    done = collate(make_archive(tmp_path / "MSRVTT", lists), tmp_path / "out")
    assert done.returncode == 1
    assert "train_list_full.txt: line 2: '../../secret': expected the name" in done.stderr
