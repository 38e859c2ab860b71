"""Eight fake devices for the whole suite, set before JAX starts; and an object store in memory."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    # Without these emitters, compiling takes half the time.
    + " --xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
)

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


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
