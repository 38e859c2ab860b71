"""Checksums of a checkpoint's files: they tell damage on disk from any other trouble.

Orbax alone finds missing and cut-off files, but reads numbers whose bits have changed as they are.
"""

import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from opensora_jax import files

NAME = "checksums.json"

_CHUNK = 2**24
_THREADS = 8


def write(folder: epath.Path) -> None:
    """Writes `folder`/checksums.json: size in bytes and CRC-32 of each file in its subfolders."""
    # At the top Orbax goes on writing.
    paths = (path for path in files.walk(folder) if path.parent != folder)
    paths = {path.relative_to(folder).as_posix(): path for path in paths}
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = list(pool.map(_size_and_crc, paths.values()))
    files.write_json(folder / NAME, dict(zip(paths, sums, strict=True)))


def damage(folder: epath.Path, items: Collection[str] | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, or None where they are as written.

    Args:
      items: those to check; all by default.
    """
    try:
        expected = files.read_json(folder / NAME)
    except FileNotFoundError:
        return f"no {NAME}"
    except (OSError, ValueError) as error:
        return str(error)
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in expected.values()):
        return f"{NAME}: expected a size and a CRC-32 of each file"
    names = [name for name in expected if items is None or name.partition("/")[0] in items]
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder / name, *expected[name]), names)
        named = zip(names, problems, strict=True)
        return next((f"{files.short(n)}: {problem}" for n, problem in named if problem), None)


def _problem(path: epath.Path, expected_size: int, expected_crc: int) -> str | None:
    try:
        size, crc = _size_and_crc(path)
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:  # a name that none can have, say
        return files.short(str(error))
    if size != expected_size:
        return f"{size} bytes, expected {files.short(expected_size)}"
    return None if crc == expected_crc else "its bytes have changed"


def _size_and_crc(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
