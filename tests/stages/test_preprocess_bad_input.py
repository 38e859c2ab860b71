"""Preprocessing of what people have: each entry is kept, filtered or failed, with a reason."""

import json
import os
import shutil

import numpy as np
import pytest
import trouble
import web_server
from made_world import (
    run_on,
    write_captions,
    write_video,
)

from opensora_jax.data import dataset
from opensora_jax.preprocessing.job import Job
from opensora_jax.preprocessing.options import PreprocessError


def test_names_that_are_no_files_are_bad_entries(world, tmp_path, capsys):
    names = ["x" * 300 + ".mp4", "half an emoji \ud83d.mp4", "a" * 10**5]
    captions = {"whole.mp4": ["a red circle moves up"]} | {name: ["moves"] for name in names}
    path = write_captions(tmp_path / "captions.json", captions)
    run_on(world, tmp_path / "out", captions=path)
    failed = dataset.open_dataset(tmp_path / "out").metadata["failed"]
    assert [video["file"] for video in failed] == names
    reasons = ["File name too long", "its name is not Unicode text", "File name too long"]
    assert [video["reason"] for video in failed] == reasons
    printed = capsys.readouterr().out
    assert "  half an emoji \\ud83d.mp4: its name is not" in printed
    assert max(map(len, printed.splitlines())) < 400


def test_what_people_have_is_kept_filtered_or_failed_and_nothing_is_lost(world, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    whole = (world / "videos" / "whole.mp4").read_bytes()
    contents = {
        "twice.mp4": whole,
        "twice, again.mp4": whole,
        "new\nline.mp4": whole,
        "empty.mp4": b"",
        "text.mp4": b"no video",
        "bad\nline.mp4": b"no video",
    }
    for name, data in contents.items():
        (videos / name).write_bytes(data)
    write_video(videos / "one.mp4", 1)
    os.mkfifo(videos / "pipe.mp4")
    many = [f"caption {i}" for i in range(1500)]
    captions = {name: ["moves"] for name in (*contents, "one.mp4", "pipe.mp4", "none.mp4")}
    captions |= {"twice.mp4": many, "twice, again.mp4": ["word " * 100_000]}
    entries = [{"file": file, "captions": texts} for file, texts in captions.items()]
    entries += [
        {"file": "twice.mp4", "captions": ["a second time"]},
        {"file": "blank.mp4", "captions": [" \n"]},
        {"file": "number.mp4", "captions": [3.5]},
        {"file": "string.mp4", "captions": "not a list"},
        {"file": "no_captions.mp4", "captions": []},
        {"file": "none_at_all.mp4", "captions": None},
        {"file": "missing_captions.mp4"},
        {"file": None, "captions": ["a"]},
        ["no object"],
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(entries))
    run_on(world, tmp_path / "out", captions=path, videos=videos)
    found = dataset.open_dataset(tmp_path / "out")
    counts = found.metadata["counts"]
    assert counts == {"kept": 3, "filtered": 1, "failed": len(entries) - 4}
    rows = [found.column(i, "caption") for i in range(len(found))]
    assert rows == [*many, "word " * 100_000, "moves"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-counts["failed"] - 1] == f"preprocess: {counts['failed']} videos failed"
    assert any(line.startswith("  bad\\nline.mp4: cannot be read") for line in printed)


def test_captions_and_videos_may_be_at_an_address(world, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    shutil.copy(world / "videos" / "whole.mp4", site)
    captions = {name: ["a red circle"] for name in ("whole.mp4", "403.mp4", "never.mp4")}
    write_captions(site / "captions.json", captions)
    with web_server.serve(site) as address:
        options = {"captions": f"{address}/captions.json", "videos": address}
        run_on(world, tmp_path / "out", **options, video_timeout=6.0)
        # Who ends here does not wait for the one that hangs.
        with pytest.raises(PreprocessError, match=r"403\.mp4': the server says 403.*strict=True"):
            run_on(world, tmp_path / "strict", **options, strict=True)
    metadata = dataset.read_metadata(tmp_path / "out")
    assert metadata["counts"] == {"kept": 1, "filtered": 0, "failed": 2}
    assert f"-v {address} " in metadata["command"]
    assert metadata["command"].endswith("--video_timeout 6.0")
    reasons = [video["reason"] for video in metadata["failed"]]
    assert reasons == ["the server says 403 Forbidden", "not decoded after 6 seconds"]


def test_a_decoder_that_crashes_in_the_middle_costs_that_video(world, tmp_path, monkeypatch):
    captions = {}
    for seed, name in enumerate(("a.mp4", "crash.mp4", "exit_7.mp4", "b.mp4")):
        write_video(tmp_path / name, 24, seed)  # three windows
        captions[name] = ["a red circle"]
    path = write_captions(tmp_path / "captions.json", captions)
    options = {"captions": path, "videos": tmp_path}
    run_on(world, tmp_path / "whole", **options)
    decoding = Job.decoding.fget
    troubled = property(lambda job: trouble.Troubled.like(decoding(job)))
    monkeypatch.setattr(Job, "decoding", troubled)
    run_on(world, tmp_path / "troubled", **options)
    whole, found = (dataset.open_dataset(tmp_path / name) for name in ("whole", "troubled"))
    assert [found.column(i, "video_file") for i in range(len(found))] == ["a.mp4", "b.mp4"]
    for i, k in enumerate((0, 3)):
        codes = "video_latent_states"
        np.testing.assert_array_equal(found[i][codes], whole[k][codes])
    assert [video["reason"] for video in found.metadata["failed"]] == [
        "its decoder crashed: SIGSEGV",
        "its decoder ended with status 7",
    ]
