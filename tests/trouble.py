"""Functions that get a process into trouble, for it to import."""

import ctypes
import os
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from opensora_jax.data.clips import Decoding


def work(item):
    """What a process does, step by step: the lines of the item."""
    for line in item.split("\n"):
        yield step(line)


def step(item):
    """What a process does, by the item's first word."""
    what, _, value = item.partition(" ")
    if what == "hang":
        Path(tempfile.gettempdir(), "left").write_text(item)
        if value:
            Path(value).write_text(str(os.getpid()))
        time.sleep(600)
    elif what == "sleep":
        time.sleep(float(value))
    elif what == "crash":
        ctypes.string_at(0)
    elif what == "exit":
        os._exit(int(value))
    elif what == "disk":
        raise OSError(28, "No space left on device", value)
    elif what == "mistake":
        return {}[value]
    elif what == "array":
        array = np.arange(int(value), dtype=np.int64)
        return {"whole": array, "every other": array[::2], "none": array[:0]}
    return os.getpid(), item


class Troubled(Decoding):
    """A decoding whose process files of some names get into trouble after their first window."""

    def __call__(self, folder, entry):
        for piece in super().__call__(folder, entry):
            yield piece
            step(Path(entry["file"]).stem.replace("_", " "))

    @classmethod
    def like(cls, decoding):
        return cls(**{field.name: getattr(decoding, field.name) for field in fields(decoding)})
