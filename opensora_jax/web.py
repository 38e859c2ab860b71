"""Files at https:// addresses, to read: `epath.Path("https://host/folder")` is one from here on.

By fsspec's file system for HTTP, which needs aiohttp (the extra `web`).
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

_CONNECT_SECONDS, _SILENT_SECONDS = 30, 300  # after which nobody is waited for


class WebError(OSError):
    """A server answers with an error, or not to the end."""


@epath.register_path_cls(["https://", "http://"])
class WebPath(epath.Path):
    """An address, as a browser has it: what no address may hold is quoted in it."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)  # of which pathlib makes one

    __fspath__ = __str__

    def exists(self) -> bool:
        with _errors(self):
            try:
                _file_system().info(str(self))
            except FileNotFoundError as error:
                if isinstance(error.__cause__, OSError):
                    raise error.__cause__ from None  # nobody said that it is not there
                return False
        return True

    def is_dir(self) -> bool:
        return False  # servers have no such thing

    def open(self, mode: str = "r", **options: Any) -> BinaryIO:
        """A copy of it, to read bytes of."""
        if mode != "rb":
            raise OSError(f"{self}: mode {mode}: cannot be written, or read as text")
        copy = tempfile.TemporaryFile()  # noqa: SIM115
        with _errors(self):
            _file_system().get_file(str(self), copy)
        copy.seek(0)
        return copy

    def copy(self, dst: epath.PathLike, overwrite: bool = False) -> epath.Path:
        with _errors(self):
            _file_system().get_file(str(self), str(dst))
        return epath.Path(dst)


@functools.cache
def _file_system() -> Any:
    try:
        import aiohttp
        import fsspec
    except ImportError:
        message = "https://: aiohttp is not installed: pip install 'opensora_jax[web]'"
        raise OSError(message) from None
    times = {"sock_connect": _CONNECT_SECONDS, "sock_read": _SILENT_SECONDS}
    timeout = aiohttp.ClientTimeout(total=None, **times)
    return fsspec.filesystem("http", client_kwargs={"timeout": timeout})


@contextlib.contextmanager
def _errors(path: WebPath) -> Iterator[None]:
    """A server that cannot be reached is an OSError, what else is wrong a WebError or a
    FileNotFoundError."""
    _file_system()
    import aiohttp

    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise OSError(f"{path}: {error.host} cannot be reached: {error.strerror}") from None
    except aiohttp.ClientResponseError as error:
        raise WebError(f"the server says {error.status} {error.message}") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise WebError(f"the server does not answer: {type(error).__name__}") from None
