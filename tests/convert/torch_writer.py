"""Writes files as torch.save does, opcode by opcode, so that they can also be wrong."""

import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
}


@dataclass
class Call:
    """`name(*args)`, as REDUCE."""

    name: str
    args: tuple = ()


@dataclass
class New:
    """An object of the class `name`, as NEWOBJ and BUILD."""

    name: str
    state: dict


@dataclass(frozen=True)
class Name:
    """A class or function itself."""

    name: str


@dataclass
class Tensor:
    """A view of `storage`, in elements; by default the whole of it."""

    storage: np.ndarray
    shape: tuple | None = None
    stride: tuple | None = None
    offset: int = 0


@dataclass
class Writer:
    storages: list[np.ndarray] = field(default_factory=list)

    def pickle(self, value) -> bytes:
        return b"\x80\x02" + self.dump(value) + b"."

    def dump(self, value) -> bytes:
        dump = self.dump
        match value:
            case None | True | False:
                return {None: b"N", True: b"\x88", False: b"\x89"}[value]
            case int():
                data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
                return b"\x8a" + bytes([len(data)]) + data
            case float():
                return b"G" + struct.pack(">d", value)
            case str():
                data = value.encode()
                return b"X" + struct.pack("<I", len(data)) + data
            case tuple():
                return b"(" + b"".join(map(dump, value)) + b"t"
            case list():
                return b"](" + b"".join(map(dump, value)) + b"e"
            case dict():
                start = dump(Call("collections.OrderedDict"))
                start = start if isinstance(value, OrderedDict) else b"}"
                return start + b"(" + b"".join(dump(k) + dump(v) for k, v in value.items()) + b"u"
            case Name():
                module, name = value.name.rsplit(".", 1)
                return f"c{module}\n{name}\n".encode()
            case Call():
                return dump(Name(value.name)) + dump(value.args) + b"R"
            case New():
                return dump(Name(value.name)) + b")\x81" + dump(value.state) + b"b"
            case np.ndarray():
                return dump(Tensor(np.ascontiguousarray(value)))
            case Tensor():
                return self.dump_tensor(value)
        raise TypeError(type(value))

    def dump_tensor(self, tensor: Tensor) -> bytes:
        storage = tensor.storage
        known = [i for i, other in enumerate(self.storages) if other is storage]
        if not known:
            self.storages.append(storage)
        key = str(known[0] if known else len(self.storages) - 1)
        name = Name("torch." + STORAGES[storage.dtype.name])
        pid = self.dump(("storage", name, key, "cpu", storage.size)) + b"Q"
        shape = storage.shape if tensor.shape is None else tensor.shape
        stride = tensor.stride
        if stride is None:
            stride = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        args = b"(" + pid + self.dump(tensor.offset) + self.dump(shape) + self.dump(stride)
        args += self.dump(False) + self.dump(OrderedDict()) + b"t"
        return self.dump(Name("torch._utils._rebuild_tensor_v2")) + args + b"R"


def save(path, value, *, prefix="archive", byteorder=None, compression=zipfile.ZIP_STORED):
    """torch.save(value, path); `byteorder` "big" also swaps the storages."""
    writer = Writer()
    save_pickle(
        path,
        writer.pickle(value),
        writer.storages,
        prefix=prefix,
        byteorder=byteorder,
        compression=compression,
    )


def save_pickle(
    path, pickled, storages=(), *, prefix="archive", byteorder=None, compression=zipfile.ZIP_STORED
):
    """The zip file of torch.save around a pickle, whatever that holds."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", pickled)
        if byteorder:
            archive.writestr(f"{prefix}/byteorder", byteorder)
        for key, storage in enumerate(storages):
            if byteorder == "big":
                storage = storage.byteswap()
            archive.writestr(f"{prefix}/data/{key}", storage.tobytes())
        archive.writestr(f"{prefix}/version", "3\n")
