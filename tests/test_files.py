"""Files in an object store, here one in memory."""

import pytest

from opensora_jax import files


def test_files_are_written_whole(bucket):
    path = files.absolute(bucket / "metrics.jsonl")
    assert str(path) == "gs://bucket/metrics.jsonl"
    for text in ("a long line\n", "a\n"):
        files.write_text(path, text)
    with files.local(bucket / "video.mp4") as written:
        written.write_bytes(b"video")
    assert path.read_text() == "a\n"
    assert {p.name: p.read_bytes()[:5] for p in bucket.iterdir()} == {
        "metrics.jsonl": b"a\n",
        "video.mp4": b"video",
    }


def test_a_folder_is_copied_once_and_again_when_it_is_another_one(bucket, tmp_path):
    assert files.fetch(tmp_path, "key") == tmp_path
    folder = bucket / "data"
    (folder / "part").mkdir(parents=True)
    (folder / "key").write_text("1")
    (folder / "part" / "rows").write_bytes(b"abc")
    copy = files.fetch(folder, "key")
    assert {str(p.relative_to(copy)) for p in copy.rglob("*")} == {"key", "part", "part/rows"}
    assert (copy / "part" / "rows").read_bytes() == b"abc"
    (folder / "part" / "rows").write_bytes(b"xyz")
    assert files.fetch(str(folder), "key") == copy
    assert (copy / "part" / "rows").read_bytes() == b"abc"
    (folder / "key").write_text("2")
    assert (files.fetch(folder, "key") / "part" / "rows").read_bytes() == b"xyz"
    with pytest.raises(FileNotFoundError, match="nothing/key"):
        files.fetch(bucket / "nothing", "key")


def test_a_file_is_copied_once_and_again_when_it_is_another_one(bucket, tmp_path):
    (tmp_path / "vqvae.ckpt").touch()
    assert files.fetch_file(str(tmp_path / "vqvae.ckpt")) == tmp_path / "vqvae.ckpt"
    path = bucket / "vqvae.ckpt"
    path.write_bytes(b"abc")
    copy = files.fetch_file(str(path))
    assert (copy.name, copy.read_bytes()) == ("vqvae.ckpt", b"abc")
    before = copy.stat()
    assert files.fetch_file(path) == copy
    assert copy.stat() == before
    path.write_bytes(b"abcd")
    assert files.fetch_file(path).read_bytes() == b"abcd"
    with pytest.raises(FileNotFoundError, match="nothing"):
        files.fetch_file(bucket / "nothing")
