"""Files in an object store, here one in memory."""

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from opensora_jax import files


class Store(MemoryFileSystem):
    """gs:// paths in memory."""

    protocol = ("gs", "gcs")
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setattr(Store, "store", {})
    monkeypatch.setattr(Store, "pseudo_dirs", ["", "/bucket"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("gcs", Store, clobber=True)
    yield epath.Path("gs://bucket")
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def test_files_are_written_whole_and_grow(bucket):
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
