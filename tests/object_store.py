"""An object store in memory, in the place of gs://."""

import io
import time

import fsspec
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem


class Store(MemoryFileSystem):
    """Objects are there once they are closed, whole; nothing can be added to one.

    Attributes:
      seconds: that it takes to store one.
      refused: objects with this in their names are not stored.
      written: names and bytes of those that were.
    """

    protocol = ("gs", "gcs")
    store, pseudo_dirs, cachable = {}, [""], False
    seconds, refused = 0.0, None
    written: list[tuple[str, int]]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            return super()._open(path, mode, **options)
        if mode != "wb":
            raise OSError(f"mode {mode}: an object cannot be changed")
        return _Upload(self, path)


class _Upload(io.BytesIO):
    def __init__(self, fs, path):
        super().__init__()
        self._fs, self._path = fs, path

    def close(self):
        if not self.closed:
            data = self.getvalue()
            time.sleep(Store.seconds)
            if Store.refused and Store.refused in self._path:
                raise OSError("quota exceeded")
            with MemoryFileSystem._open(self._fs, self._path, "wb") as f:
                f.write(data)
            Store.written.append((self._path, len(data)))
        super().close()


def use() -> epath.Path:
    """A bucket, empty; everything that is of gs:// is there from now on."""
    Store.store, Store.pseudo_dirs, Store.written = {}, ["", "/bucket"], []
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    fsspec.register_implementation("gcs", Store, clobber=True)
    return epath.Path("gs://bucket")


def stop() -> None:
    fsspec.register_implementation("gcs", "gcsfs.GCSFileSystem", clobber=True)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
