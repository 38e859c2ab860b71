"""A grammar of small files that would take much time or memory: each class with a size n.

A pickle names again in two bytes what it said once, and so asks for much with few.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable

import numpy as np

START, STOP = b"\x80\x02", b"."


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def put(i: int) -> bytes:
    return b"r" + struct.pack("<I", i)


def get(i: int) -> bytes:
    return b"j" + struct.pack("<I", i)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def numbers(n: int) -> bytes:
    """A list of n numbers."""
    return b"](" + b"K\x01" * n + b"e"


def archive(pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as z:
        z.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            z.writestr(f"archive/data/{key}", data)
        for member, data in members.items():
            z.writestr(f"archive/{member}", data)
    return file.getvalue()


def pickle_of(body: bytes) -> bytes:
    return archive(START + body + STOP, {})


def again(prepare: bytes, module: str, function: str, more: bytes, n: int) -> bytes:
    """A call of `function` on what was prepared, n times."""
    call = get(1) + get(0) + more + (b"\x86" if more else b"\x85") + b"R0"
    prepared = prepare + put(0) + b"0" + name(module, function) + put(1) + b"0"
    return pickle_of(prepared + call * n + b"N")


def storage(key: str, n: int, kind: str = "FloatStorage") -> bytes:
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu")
    return b"(" + parts + b"J" + struct.pack("<i", n) + b"tQ"


def tensors(n: int, size: bytes, stride: bytes, storage_size: int) -> bytes:
    """n tensors of one storage, which is memo 0; size and stride push tuples."""
    one = name("torch._utils", "_rebuild_tensor_v2") + b"(" + get(0) + b"K\x00" + size + stride
    one += b"\x89Nt" + b"R"
    return START + b"](" + storage("0", storage_size) + put(0) + b"0" + one * n + b"e" + STOP


def size_of_one_integer(n):
    number = b"\x8a\xff" + b"\x7f" * 255
    size = b"(" + number + put(2) + get(2) * 63 + b"t"
    return archive(tensors(1, size, b"(" + b"K\x01" * 64 + b"t", 4), {"0": bytes(16)})


def long_decimal(n):
    return pickle_of(b"L" + b"7" * n + b"L\n")


def size_of_a_list(n):
    return again(numbers(n), "torch", "Size", b"", n)


def set_of_a_list(n):
    return again(numbers(n), "builtins", "set", b"", n)


def dict_of_pairs(n):
    pairs = b"](" + b"".join(b"J" + struct.pack("<i", i) + b"N\x86" for i in range(n)) + b"e"
    return again(pairs, "collections", "OrderedDict", b"", n)


def encoded_text(n):
    return again(text("x" * 50 * n), "_codecs", "encode", text("latin1"), n)


def many_arguments(n):
    prepare = (
        b"(" + b"K\x01" * n + b"t" + put(0) + b"0" + name("torch._utils", "_rebuild_parameter")
    )
    return pickle_of(prepare + put(1) + b"0" + (get(1) + get(0) + b"R0") * n + b"N")


def empty_lists(n):
    return pickle_of(b"](" + b"]" * 100 * n + b"e")


def memory_of_lists(n):
    return pickle_of(b"](" + b"".join(b"]" + put(i) for i in range(20 * n)) + b"e")


def objects(n):
    new = get(1) + b")\x81"
    return pickle_of(name("a", "b") + put(1) + b"0](" + new * 20 * n + b"e")


def nested(n):
    return pickle_of(b")" + b"\x85" * 100 * n)


def long_keys(n):
    one, two = text("x" * 20 * n + "1"), text("x" * 20 * n + "1")
    sets = (get(1) + b"Ns" + get(2) + b"Ns") * n
    return pickle_of(one + put(1) + b"0" + two + put(2) + b"0}" + sets)


def big_endian(n):
    data = tensors(n, b"K\x01\x85", b"K\x01\x85", 250 * n)
    return archive(data, {"0": bytes(1000 * n)}, byteorder=b"big")


def expanded(n):
    size = b"J" + struct.pack("<i", 2**23) + b"\x85"
    return archive(tensors(n, size, b"K\x00\x85", 1), {"0": bytes(4)})


def long_strides(n):
    stride = get(3)
    first = b"(" + b"K\x01" * n + b"t" + put(3) + b"0"
    data = tensors(n, b"K\x01\x85", stride, 4)
    return archive(data.replace(START, START + first, 1), {"0": bytes(16)})


def inflated(n):
    keys = [str(i) for i in range(max(1, n // 20))]
    body = b"](" + b"".join(storage(key, 250_000) for key in keys) + b"e"
    return archive(START + body + STOP, dict.fromkeys(keys, bytes(10**6)), zipfile.ZIP_DEFLATED)


def headers(n):
    header = json.dumps({str(i): {} for i in range(200 * n)}).encode()
    return struct.pack("<Q", len(header)) + header


def deep_header(n):
    header = b'{"a":' + b"[" * 200 * n + b"]" * 200 * n + b"}"
    return struct.pack("<Q", len(header)) + header


CLASSES: list[Callable[[int], bytes]] = [
    size_of_one_integer,
    long_decimal,
    size_of_a_list,
    set_of_a_list,
    dict_of_pairs,
    encoded_text,
    many_arguments,
    empty_lists,
    memory_of_lists,
    objects,
    nested,
    long_keys,
    big_endian,
    expanded,
    long_strides,
    inflated,
    headers,
    deep_header,
]


def sizes(n: int, seed: int = 0) -> list[int]:
    """n sizes up to some thousand, small ones as often as large ones."""
    return np.exp(np.random.default_rng(seed).uniform(2, 8.5, n)).astype(int).tolist()
