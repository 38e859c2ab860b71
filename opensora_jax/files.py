"""Writing files so that none is ever seen half-written."""

import json
from typing import Any

from etils import epath


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes under a temporary name and renames it: the file is whole or absent."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode())
    temporary.replace(path)


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
