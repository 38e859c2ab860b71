"""Checksums of a checkpoint's files: they tell damage on disk from any other trouble.

Orbax alone finds missing and cut-off files, but reads numbers whose bits have changed as they are.

Every process sums what it wrote, and each checks a share of about the same size: of a checkpoint
of many processes no one reads it all.
"""

import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from opensora_jax import files

NAME = "checksums.json"

_CHUNK = 2**24
_THREADS = 8
# The folder of each item into which Orbax's process of this number writes its arrays.
_ARRAYS = "ocdbt.process_{}"
# What `write_own` leaves for `write`, of each process.
_OWN = "checksums.process_{}.json"
# While items are written, Orbax appends this to the names of their folders.
_TEMPORARY = re.compile(r"\.orbax-checkpoint-tmp[^/]*")

_Sums = Mapping[str, tuple[int, int]]


def write_own(folder: epath.Path, process: int) -> None:
    """Sums the arrays that a process wrote into a checkpoint, for `write`, in a file of its own."""
    items = [item for item in folder.iterdir() if item.is_dir()]
    written = (item / _ARRAYS.format(process) for item in items)
    paths = [path for part in written if part.exists() for path in files.walk(part)]
    files.write_json(folder / _OWN.format(process), _sums(folder, paths))


def write(folder: epath.Path) -> None:
    """Writes `folder`/checksums.json: size in bytes and CRC-32 of each file in its subfolders.

    What `write_own` summed is not read again.
    """
    own = sorted(folder.glob(_OWN.format("*")))
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = {k: v for part in pool.map(files.read_json, own) for k, v in part.items()}
    summed = {_ARRAYS.format(path.name.split("_")[1].removesuffix(".json")) for path in own}
    # At the top Orbax goes on writing.
    items = [item for item in folder.iterdir() if item.is_dir()]
    sums |= _sums(folder, (path for item in items for path in _walk_but(item, summed)))
    files.write_json(folder / NAME, dict(sorted(sums.items())))
    for path in own:
        path.unlink()


def damage(
    folder: epath.Path, items: Collection[str] | None = None, *, share: tuple[int, int] = (0, 1)
) -> str | None:
    """What is wrong with the files of a checkpoint, or None where they are as written.

    Args:
      items: those to check; all by default.
      share: (i, n): only the i-th of n shares of these files, of about as many bytes each.
    """
    try:
        expected = files.read_json(folder / NAME)
    except FileNotFoundError:
        return f"no {NAME}"
    except (OSError, ValueError) as error:
        return str(error)
    if not all(isinstance(entry, list) and len(entry) == 2 for entry in expected.values()):
        return f"{NAME}: expected a size and a CRC-32 of each file"
    if not expected:
        return f"{NAME}: names no file"
    names = [name for name in expected if items is None or name.partition("/")[0] in items]
    names = _share(names, expected, *share)
    with ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder / name, *expected[name]), names)
        named = zip(names, problems, strict=True)
        return next((f"{files.short(n)}: {problem}" for n, problem in named if problem), None)


def _share(names: list[str], expected: _Sums, i: int, n: int) -> list[str]:
    """The `i`-th of `n` shares of files: each file, largest first, goes to the smallest share."""
    if n == 1:
        return names
    shares, held = [[] for _ in range(n)], [0] * n
    sizes = {name: size if isinstance(size := expected[name][0], int) else 0 for name in names}
    for name in sorted(names, key=lambda name: (-sizes[name], name)):
        smallest = held.index(min(held))
        shares[smallest].append(name)
        held[smallest] += sizes[name]
    return shares[i]


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


def _walk_but(folder: epath.Path, left_out: Collection[str]) -> Iterator[epath.Path]:
    """The files in a folder and in those below it, but for subfolders of these names."""
    for path in folder.iterdir():
        if not path.is_dir():
            yield path
        elif path.name not in left_out:
            yield from files.walk(path)


def _sums(folder: epath.Path, paths: Iterable[epath.Path]) -> _Sums:
    """Size and CRC-32 of each file, by the name in `folder` that it has in the end."""
    paths = list(paths)
    names = [_TEMPORARY.sub("", path.relative_to(folder).as_posix()) for path in paths]
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(_size_and_crc, paths), strict=True))


def _size_and_crc(path: epath.Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as f:
        while chunk := f.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc
