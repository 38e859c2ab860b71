"""Captions in tables, beside videos and in archives, and what cannot be used of them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from videos import decoded_whole, gradient_video

from opensora_jax.data import archives
from opensora_jax.data.captions import PROBLEM, CaptionsError, expect_a_video, read_captions
from opensora_jax.data.clips import Clip, Decoding, Failed
from opensora_jax.data.video_io import read_video, write_video
from opensora_jax.preprocessing import provenance
from opensora_jax.windows import Windows

FILES = ["a.mp4", "sub/b.mp4", "a.mp4"]
CAPTIONS = ["a cat", 'two\nlines, "quoted", Ünïcode', "null"]
EXPECTED = [
    {"file": "a.mp4", "captions": ["a cat", "null"]},
    {"file": "sub/b.mp4", "captions": [CAPTIONS[1]]},
]
DECODING = Decoding((16, 24), None, None, None, Windows(4, False, 4))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_rows_of_one_video_belong_together(tmp_path, kind):
    path = tmp_path / f"captions.{kind}"
    table = pa.table({"rate": [1, 2, 3], "video": FILES, "sentence": CAPTIONS})
    if kind == "parquet":
        pa.parquet.write_table(table, path, row_group_size=2)
    else:
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        pa.csv.write_csv(table, path, pa.csv.WriteOptions(delimiter=delimiter))
    assert list(read_captions(path, ("video", "sentence"))) == EXPECTED
    names = r"\['rate', 'video', 'sentence'\]"
    with pytest.raises(CaptionsError, match=rf"no column 'file', only {names}: --file_column"):
        read_captions(path)
    with pytest.raises(CaptionsError, match=r"no column 'text', .*: --caption_column"):
        read_captions(path, ("video", "text"))
    with pytest.raises(CaptionsError, match="expected two columns"):
        read_captions(path, ("video", "video"))
    path.write_bytes(path.read_bytes()[:-9] + b"\xff,\xff\n1")
    with pytest.raises(CaptionsError, match=rf"captions\.{kind}: not a {kind} file|not UTF-8"):
        read_captions(path, ("video", "sentence"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a csv file: 'Empty CSV file'"),
        (b"file,captions\n", "no entries"),
        (b"file,captions\na.mp4,a\nb.mp4\n", r"Row #3: Expected 2 columns, got 1: b\.mp4"),
        (b"file,captions\na.mp4,one,two\n", "Row #2: Expected 2 columns, got 3"),
        (b"file,captions\na.mp4,caf\xe9\n", "not a csv file: .* invalid UTF8"),
        ("file,captions\na.mp4,a\n".encode("utf-16"), "UTF-16 or UTF-32 text: expected UTF-8"),
        (b"file,file,captions\na.mp4,b.mp4,a\n", "column 'file' is there twice"),
        (b"file;captions\na.mp4;a\n", r"no column 'file', only \['file;captions'\]"),
    ],
)
def test_broken_tables_are_named(tmp_path, text, message):
    path = tmp_path / "captions.csv"
    path.write_bytes(text)
    for strict in (False, True):
        with pytest.raises(CaptionsError, match=message) as caught:
            read_captions(path, strict=strict)
        assert str(caught.value).startswith(str(path))


def test_a_table_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes(b"\xef\xbb\xbffile,captions\r\na.mp4,a cat\r\n\r\n")
    assert list(read_captions(path)) == [{"file": "a.mp4", "captions": ["a cat"]}]


def test_a_column_may_hold_lists(tmp_path):
    path = tmp_path / "captions.parquet"
    table = pa.table({"file": ["a.mp4", "b.mp4"], "captions": [["one", "two"], ["three"]]})
    pa.parquet.write_table(table, path)
    assert [entry["captions"] for entry in read_captions(path)] == [["one", "two"], ["three"]]


def test_what_cannot_be_used_of_a_table_says_why(tmp_path):
    path = tmp_path / "captions.parquet"
    columns = {"file": ["a.mp4", None, "../b.mp4", "c.mp4"], "captions": ["one", "x", "y", None]}
    pa.parquet.write_table(pa.table(columns), path)
    found = read_captions(path, strict=False)
    assert found[0] == {"file": "a.mp4", "captions": ["one"]}
    assert [entry["file"] for entry in found[1:]] == ["row 2", "../b.mp4", "c.mp4"]
    assert [entry[PROBLEM].split(": expected")[0] for entry in found[1:]] == [
        "row 2: file=None",
        "row 3: file='../b.mp4'",
        "row 4: captions[0]=None",
    ]
    with pytest.raises(CaptionsError, match="row 2: file=None"):
        read_captions(path)


def test_broken_lines_are_errors_and_bad_entries_are_counted(tmp_path):
    path = tmp_path / "captions.jsonl"
    good = {"file": "a.mp4", "captions": ["one"]}
    bad = [{"file": "b.mp4", "captions": [" "]}, 7, {"captions": ["x"]}, good]
    path.write_text("\n".join(map(json.dumps, [good, *bad])))
    found = read_captions(path, strict=False)
    assert [entry["file"] for entry in found] == ["a.mp4", "b.mp4", "line 3", "line 4", "a.mp4"]
    assert found[4][PROBLEM].startswith("line 5: file='a.mp4' is already at line 1")
    path.write_text(json.dumps(good) + "\n{oops}\n")
    with pytest.raises(CaptionsError, match="line 2: not JSON"):
        read_captions(path, strict=False)
    path.write_text(json.dumps(good), encoding="utf-16")
    with pytest.raises(CaptionsError, match="UTF-16 or UTF-32 text: expected UTF-8"):
        read_captions(path, strict=False)
    path.write_text(json.dumps(bad[0]))
    with pytest.raises(CaptionsError, match="not one entry can be used: line 1: captions"):
        read_captions(path, strict=False)


def test_texts_beside_videos(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.MKV", "c.png", "no_text.mp4", "readme.md", "alone.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "a.txt").write_text("\ufeffa cat\n\na sleeping cat\r\n", encoding="utf-8")
    (tmp_path / "sub" / "b.txt").write_text("a dog")
    (tmp_path / "c.txt").write_text("a still")
    found = read_captions(tmp_path, strict=False)
    assert [(entry["file"], entry["captions"]) for entry in found] == [
        ("a.mp4", ["a cat", "a sleeping cat"]),
        ("c.png", ["a still"]),
        ("no_text.mp4", []),
        ("sub/b.MKV", ["a dog"]),
    ]
    assert PROBLEM in found[2]
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(CaptionsError, match="not UTF-8"):
        read_captions(tmp_path)


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    for seed, name in enumerate(("x.mp4", "y.mp4")):
        write_video(tmp_path / name, gradient_video(8)[:, ::-1] if seed else gradient_video(8), 8)
    x, y = ((tmp_path / name).read_bytes() for name in ("x.mp4", "y.mp4"))
    folder = tmp_path / "shards"
    folder.mkdir()
    write_tar(
        folder / "0.tar",
        {
            "0001.mp4": x,
            "0001.txt": b"a cat\nanother",
            "0002.json": json.dumps({"caption": "a dog", "url": "-"}).encode(),
            "0002.mp4": y,
        },
    )
    write_tar(folder / "1.tar", {"sub/3.mp4": y, "sub/3.json": b'{"text": "a bird"}', "4.mp4": x})
    return folder


def test_archives_are_read_as_webdataset_packs_them(shards, tmp_path):
    found = read_captions(shards, strict=False)
    assert [(entry["file"], entry["captions"]) for entry in found] == [
        ("0.tar/0001.mp4", ["a cat", "another"]),
        ("0.tar/0002.mp4", ["a dog"]),
        ("1.tar/sub/3.mp4", ["a bird"]),
        ("1.tar/4.mp4", []),
    ]
    assert list(read_captions(shards / "0.tar")) == found[:2]
    expect_a_video(found, shards)
    with pytest.raises(CaptionsError, match=r"none of the captions' videos .* '0.tar/0001.mp4'"):
        expect_a_video(found, tmp_path)
    clips = decoded_whole(DECODING, shards, found)
    assert [type(clip) for clip, _ in clips] == [Clip, Clip, Clip, Failed]
    for (_, frames), name in zip(clips, ("x.mp4", "y.mp4", "y.mp4"), strict=False):
        expected = read_video(tmp_path / name, resolution=(16, 24))
        np.testing.assert_array_equal(frames, expected)
    assert "captions=[]" in clips[3][0].reason


def test_a_bad_archive_is_told_by_name(shards):
    entries = [{"file": "0.tar/nothing.mp4"}, {"file": "2.tar/a.mp4"}, {"file": "1.tar/4.mp4"}]
    whole = (shards / "1.tar").read_bytes()
    (shards / "1.tar").write_bytes(whole[:3000])
    found = [clip for clip, _ in decoded_whole(DECODING, shards, entries)]
    assert [type(clip) for clip in found] == [Failed] * 3
    assert found[0].reason == "not in 0.tar"
    assert found[1].reason == "no archive '2.tar'"
    assert "truncated" in found[2].reason or "not a tar archive" in found[2].reason
    (shards / "1.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(CaptionsError, match=r"1\.tar: not a tar archive"):
        read_captions(shards)
    write_tar(shards / "1.tar", {"a.mp4": b"x", "a.json": b"{oops"})
    with pytest.raises(CaptionsError, match=r"1\.tar: a\.json: not JSON"):
        read_captions(shards)
    write_tar(shards / "1.tar", {"a.mp4": b"x", "a.txt": b"\xff"})
    with pytest.raises(CaptionsError, match=r"1\.tar: a\.txt: not UTF-8"):
        read_captions(shards)


def test_links_of_an_archive_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(archives.ArchiveError, match=r"not in 0\.tar"):
        archives.member(tmp_path, "0.tar/a.mp4").__enter__()


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "secret.mp4", gradient_video(8), fps=8)
    write_video(tmp_path / "videos" / "a.mp4", gradient_video(8), fps=8)
    (tmp_path / "videos" / "out.mp4").symlink_to(tmp_path / "secret.mp4")
    (tmp_path / "videos" / "in.mp4").symlink_to("a.mp4")
    (tmp_path / "other").symlink_to(tmp_path / "videos")
    entries = [{"file": name} for name in ("out.mp4", "in.mp4")]
    for folder in ("videos", "other"):
        (left_out, _), (kept, _) = decoded_whole(DECODING, tmp_path / folder, entries)
        assert left_out == Failed("out.mp4", "a link that leads out of the video folder")
        assert isinstance(kept, Clip)


def test_a_text_that_cannot_be_read_is_that_of_one_video(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.mp4").touch()
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    found = list(read_captions(tmp_path, strict=False))
    assert [entry["captions"] for entry in found] == [["a cat"], [], []]
    assert "b.txt: not UTF-8 text" in found[1]["problem"]
    assert "c.txt" in found[2]["problem"]


def test_folders_that_link_to_themselves_are_gone_through_once(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    (tmp_path / "videos" / "a.txt").write_text("a cat")
    for name in ("back", "again"):
        (tmp_path / "videos" / name).symlink_to(tmp_path)
    assert [entry["file"] for entry in read_captions(tmp_path)] == ["videos/a.mp4"]
    before = provenance.sha256(tmp_path)
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "metadata.json").write_text("{}")
    assert provenance.sha256(tmp_path) == before
