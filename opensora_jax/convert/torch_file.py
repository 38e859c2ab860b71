"""Tensors of PyTorch (.pt, .pth, .bin, .ckpt) and safetensors files as numpy arrays.

Neither PyTorch nor `pickle` is used: no code from a file can run (see `unpickle.py`). Arrays are
read-only views into the memory-mapped file wherever the file holds plain bytes.

Formats: https://pytorch.org/docs/stable/notes/serialization.html (the zip format, PyTorch 1.6 and
later) and https://huggingface.co/docs/safetensors (header of JSON, then the data).
"""

import json
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.convert import unpickle
from opensora_jax.convert.unpickle import Global, TorchFileError
from opensora_jax.files import short

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
# The storage classes of PyTorch; an untyped one says the type with each tensor.
STORAGE_DTYPES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    "torch.storage.UntypedStorage": None,
}
TENSOR_DTYPES = {
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
    "torch.uint16": np.uint16,
    "torch.uint32": np.uint32,
    "torch.uint64": np.uint64,
}
MAX_HEADER = 2**20  # bytes of a safetensors file's JSON; longer ones of more data than that
MAX_INFLATION = 100  # weights never compress so well; a zip bomb does
# Bytes in memory that a file may make: what is inflated, byte-swapped, or repeated by tensors.
MAX_MADE = 2**25
MADE_A_BYTE = 8
MAX_AXES = 64  # of a numpy array
MAX_EXPANDED = 2**24  # elements of an expanded tensor, which repeats those of its storage
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def load(path: epath.PathLike) -> Any:
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
    local = files.fetch_file(path)
    try:
        with local.open("rb") as file:
            start = file.read(len(LEGACY_MAGIC))
        if not start:
            raise TorchFileError("the file is empty")
        data = np.memmap(local, np.uint8, mode="r")
        if start.startswith(b"PK"):
            return _load_zip(local, data)
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
    if size > len(data) - 8:
        raise TorchFileError(f"header of {size} bytes in a file of {len(data)}; truncated?")
    if size > max(MAX_HEADER, len(data) // 20):
        raise TorchFileError(f"header of {size} bytes in a file of {len(data)}: too long for it")
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
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= len(body):
                where = f"bytes {short(start)}-{short(end)} of {len(body)}"
                raise TorchFileError(f"{short(name)}: {where}; truncated?")
            dtype = SAFETENSORS_DTYPES[entry["dtype"]]
            tensors[name] = body[start:end].view(dtype).reshape(entry["shape"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, TorchFileError):
                raise
            reason = short(str(error))
            raise TorchFileError(f"{short(name)}: malformed header ({reason})") from error
    return tensors


def _load_zip(path: Path, data: np.ndarray) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            return _Archive(archive, data).load()
    except TorchFileError:
        raise
    # What zipfile raises for corrupt bytes, and RuntimeError for features it does not know.
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError) as error:
        raise TorchFileError(f"corrupt or truncated zip file ({short(str(error))})") from error
    except (RuntimeError, ValueError, OverflowError) as error:
        raise TorchFileError(f"unreadable zip file ({short(str(error))})") from error


@dataclass(frozen=True)
class _Storage:
    """Bytes that tensors are views of, and the type it was saved with (None: of each tensor)."""

    data: np.ndarray
    dtype: np.dtype | None
    key: str = ""


class _Archive:
    """A zip file of torch.save: `data.pkl`, and the storages in `data/`, all in one folder."""

    def __init__(self, archive: zipfile.ZipFile, data: np.ndarray):
        self.archive = archive
        self.data = data
        self.members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.members if PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            raise TorchFileError("a zip file without a data.pkl; torch.save did not write it")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, np.ndarray] = {}
        self.swapped: dict[tuple[str, int, int], np.ndarray] = {}
        self.made = MAX_MADE + MADE_A_BYTE * len(data)
        order = b"little"
        if f"{self.folder}byteorder" in self.members:
            order = self.read("byteorder").tobytes()
        if order not in (b"little", b"big"):
            raise TorchFileError(f"byteorder: {order[:20]!r}, expected little or big")
        self.is_big_endian = order == b"big"

    def load(self) -> Any:
        calls = {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_v3,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        pickled = self.read("data.pkl").tobytes()
        return unpickle.unpickle(pickled, calls, self.storage, len(self.data))

    def charge(self, n_bytes: int, what: str) -> None:
        self.made -= n_bytes
        if self.made < 0:
            raise TorchFileError(f"{what}: makes more in memory than its file has reason to")

    def read(self, name: str) -> np.ndarray:
        """The bytes of a member, in place where they are stored uncompressed."""
        info = self.members.get(self.folder + name)
        if info is None:
            raise TorchFileError(f"no {short(self.folder + name)} in the file")
        shown = short(info.filename)
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            header = self.data[info.header_offset : info.header_offset + 30].tobytes()
            if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
                raise TorchFileError(f"{shown}: not where the zip file says")
            start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
            member = self.data[start : start + info.file_size]
            if len(member) != info.file_size:
                raise TorchFileError(f"{shown}: ends after the file; truncated?")
            return member
        if info.compress_type != zipfile.ZIP_DEFLATED:
            raise TorchFileError(f"{shown}: encrypted, or compressed in an unknown way")
        if info.file_size > MAX_INFLATION * max(info.compress_size, 1000):
            raise TorchFileError(
                f"{shown}: {info.compress_size} bytes would inflate to {info.file_size}"
            )
        self.charge(info.file_size, shown)
        return np.frombuffer(self.archive.read(info), np.uint8)

    def storage(self, pid: Any) -> _Storage:
        """The storage that `pid`, ("storage", type, key, device, number of elements), names."""
        match pid:
            case ("storage", Global(type_name), str(key), _, int(n_elements)):
                pass
            case _:
                raise TorchFileError("malformed pickle: a persistent id that is no storage")
        if type_name not in STORAGE_DTYPES:
            raise TorchFileError(f"unknown type of storage: {short(type_name)}")
        dtype = STORAGE_DTYPES[type_name]
        if key not in self.storages:
            self.storages[key] = self.read(f"data/{key}")
        n_bytes = n_elements * (1 if dtype is None else np.dtype(dtype).itemsize)
        if not 0 <= n_bytes <= len(self.storages[key]):
            raise TorchFileError(
                f"storage {short(key)}: {len(self.storages[key])} bytes, expected {short(n_bytes)}"
            )
        return _Storage(self.storages[key][:n_bytes], dtype, key)

    def tensor_v3(self, storage, offset, size, stride, grad, hooks, dtype: Global, *_):
        if dtype.name not in TENSOR_DTYPES:
            raise TorchFileError(f"unknown type of tensor: {short(dtype.name)}")
        storage = _Storage(storage.data, TENSOR_DTYPES[dtype.name], storage.key)
        return self.tensor(storage, offset, size, stride)

    def tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_) -> np.ndarray:
        """torch._utils._rebuild_tensor_v2: a strided view of a storage (units: elements)."""
        if not (isinstance(size, tuple) and isinstance(stride, tuple)) or len(size) > MAX_AXES:
            raise TorchFileError(f"a tensor whose size is no tuple of at most {MAX_AXES}")
        if len(stride) != len(size):
            raise TorchFileError(f"a tensor of {len(size)} axes and {len(stride)} strides")
        if any(type(n) is not int or n < 0 for n in (offset, *size, *stride)):
            raise TorchFileError("a tensor whose offset, size or stride is no natural number")
        dtype = np.dtype(storage.dtype)
        n_elements = len(storage.data) // dtype.itemsize
        count = math.prod(size)
        if count == 0:
            return np.zeros(size, dtype)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if last >= n_elements:
            raise TorchFileError(f"a tensor reaches element {short(last)} of {n_elements}")
        if count > max(n_elements, MAX_EXPANDED):
            raise TorchFileError(
                f"a tensor of {short(count)} elements in a storage of {n_elements}"
            )
        if count > n_elements:  # whoever takes it as its own array makes that of it
            self.charge(count * dtype.itemsize, "a tensor")
        data = storage.data
        if self.is_big_endian:
            part = dtype.itemsize // (2 if dtype.kind == "c" else 1)
            known = storage.key, part, len(data)
            if known not in self.swapped:
                self.charge(len(data), f"storage {short(storage.key)}")
                self.swapped[known] = data.view(f"u{part}").byteswap().view(np.uint8)
            data = self.swapped[known]
        # The stride of an axis of one element has no meaning and may be anything.
        strides = [s * dtype.itemsize if n > 1 else 0 for n, s in zip(size, stride, strict=True)]
        return np.ndarray(size, dtype, data, offset * dtype.itemsize, strides)
