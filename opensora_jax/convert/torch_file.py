"""Tensors of PyTorch (.pt, .pth, .bin, .ckpt) and safetensors files as numpy arrays.

Neither PyTorch nor `pickle` is used: no code from a file can run (see `unpickle.py`). Arrays are
read-only views into the memory-mapped file wherever the file holds plain bytes.

Formats: https://pytorch.org/docs/stable/notes/serialization.html (the zip format, PyTorch 1.6 and
later) and https://huggingface.co/docs/safetensors (header of JSON, then the data).
"""

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opensora_jax.convert.unpickle import TorchFileError

SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "C64": np.complex64,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_INFLATION = 100  # weights never compress so well; a zip bomb does
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def load(path: str | Path) -> Any:
    """What was saved: nested containers with numpy arrays as leaves.

    Args:
        path: a .pt, .pth, .bin or .ckpt file of PyTorch 1.6 or later, or a .safetensors file; told
            apart by content.

    Returns:
        The saved object: dictionaries, lists, tuples, sets and plain values as themselves, tensors
        as arrays (mostly read-only and memory-mapped; bfloat16 of ml_dtypes), an object of any
        other class as an `unpickle.Placeholder`. A safetensors file gives one flat dictionary.

    Raises:
        FileNotFoundError: no such file.
        TorchFileError: not such a file, an older format, truncated, corrupt, or a pickle that
            would call something; the message names the file and the reason.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(LEGACY_MAGIC))
        if not start:
            raise TorchFileError("the file is empty")
        data = np.memmap(path, np.uint8, mode="r")
        if start == LEGACY_MAGIC:
            raise TorchFileError(
                "the format of PyTorch before 1.6; save it again with a newer PyTorch: "
                "torch.save(torch.load(path), path)"
            )
        if start[8:9] == b"{":
            return _load_safetensors(data)
        raise TorchFileError("neither a PyTorch nor a safetensors file")
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error.__cause__


def _load_safetensors(data: np.ndarray) -> dict[str, np.ndarray]:
    size = int.from_bytes(data[:8].tobytes(), "little")
    if size > min(MAX_HEADER, len(data) - 8):
        raise TorchFileError(f"header of {size} bytes in a file of {len(data)}; truncated?")
    try:
        header = json.loads(data[8 : 8 + size].tobytes())
    except (ValueError, RecursionError) as error:
        raise TorchFileError("the header is not JSON") from error
    body = data[8 + size :]
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype = np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
            shape = entry["shape"]
            start, end = entry["data_offsets"]
            whole = all(type(n) is int and n >= 0 for n in (start, end, *shape))
        except (KeyError, TypeError, ValueError) as error:
            raise TorchFileError(f"{name}: malformed entry of the header") from error
        if not whole or end - start != math.prod(shape) * dtype.itemsize:
            raise TorchFileError(f"{name}: {dtype} {shape} does not fill its {end - start} bytes")
        if end > len(body):
            raise TorchFileError(f"{name}: ends at byte {end} of {len(body)}; truncated?")
        tensors[name] = body[start:end].view(dtype).reshape(shape)
    return tensors
