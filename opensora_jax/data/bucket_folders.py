"""A folder of datasets, one for each bucket, in subfolders that their sizes name (16x96x160).

buckets.json beside them says which there are, what became of all clips together and, until it is
complete, to which of them each entry of the captions file goes.
"""

from typing import Any

from etils import epath

from opensora_jax import files
from opensora_jax.data.buckets import parse
from opensora_jax.data.parts import DatasetError

LIST = "buckets.json"


def read(folder: epath.PathLike) -> dict[str, Any] | None:
    """What buckets.json says, finished or not; None where there is none."""
    path = epath.Path(folder) / LIST
    return files.read_json(path) if path.exists() else None


def is_complete(folder: epath.PathLike) -> bool:
    return bool((read(folder) or {}).get("complete", False))


def datasets(folder: epath.PathLike) -> list[epath.Path]:
    """The folders of the datasets in `folder`, in the order of their buckets; of any other folder
    itself.

    Raises:
      DatasetError: not finished, or it names what cannot be a bucket.
    """
    folder, found = epath.Path(folder), read(folder)
    if found is None:
        return [folder]
    if not found.get("complete", False):
        raise DatasetError(
            f'{folder / LIST}: no "complete": true: not finished: expected the preprocessing '
            "command that began it to be run to its end"
        )
    names = found.get("datasets")
    try:
        sizes = parse(",".join(names))
    except (TypeError, ValueError):
        raise DatasetError(
            f"{folder / LIST}: datasets={files.short(names)}: expected sizes such as 16x96x160"
        ) from None
    return [folder / str(size) for size in sizes]


def write(folder: epath.PathLike, value: dict[str, Any]) -> None:
    files.write_json(epath.Path(folder) / LIST, value)
