"""Files of torch.save come back as arrays; files that are wrong or hostile as TorchFileError."""

import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_writer import Call, Name, New, Tensor, Writer, save, save_pickle

from opensora_jax.convert.torch_file import TorchFileError, load
from opensora_jax.convert.unpickle import Placeholder

GOLDEN = Path(__file__).parents[1] / "golden"
RNG = np.random.default_rng(0)
FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64"]
DTYPES = [*FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool"]


def of_dtype(name, *shape):
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else name
    return (100 * RNG.standard_normal(shape)).astype(dtype)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


@pytest.mark.parametrize("prefix", ["archive", "epoch=3-step=6"])
@pytest.mark.parametrize("byteorder", [None, "little", "big"])
def test_every_dtype(path, prefix, byteorder):
    arrays = {name: of_dtype(name, 3, 5) for name in DTYPES}
    save(path, {"state_dict": arrays}, prefix=prefix, byteorder=byteorder)
    loaded = load(path)["state_dict"]
    assert list(loaded) == list(arrays)
    for name, x in arrays.items():
        assert loaded[name].dtype == x.dtype
        np.testing.assert_array_equal(loaded[name], x)


def test_containers_and_plain_values(path):
    value = {
        "list": [1, 2.5, "é", None, True],
        "tuple": (1, (2, ()), -(2**70)),
        3: OrderedDict([("b", {}), ("a", [])]),
        (1, "key"): False,
    }
    save(path, value)
    assert load(path) == value
    assert type(load(path)[3]) is OrderedDict
    save(path, [Call("builtins.set", ([1, 2, 1],)), Call("_codecs.encode", ("\xff\0", "latin1"))])
    assert load(path) == [{1, 2}, b"\xff\0"]
    save(path, [Call("torch.Size", ((2, 3),)), Call("__builtin__.set", (["a"],))])
    assert load(path) == [(2, 3), {"a"}]


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(path, protocol):
    value = {"a": [1, -5, 2**40, 2**100, 0.5], "b": ("x" * 300, "ü", None, True), "c": {}}
    value["again"] = value["a"]
    save_pickle(path, pickle.dumps(value, protocol))
    assert load(path) == value
    if protocol >= 4:
        more = [b"bytes", {1, 2}, frozenset([3]), OrderedDict(a=1)]
        save_pickle(path, pickle.dumps(more, protocol))
        assert load(path) == more


def test_views_share_their_storage(path):
    storage = of_dtype("float32", 24)
    views = {
        "transposed": Tensor(storage, (4, 6), (1, 4)),
        "middle": Tensor(storage, (2, 3), (6, 2), offset=5),
        "scalar": Tensor(storage, (), (), offset=7),
        "expanded": Tensor(storage, (5, 2), (0, 1)),
        "empty": Tensor(storage, (0, 3), (3, 1), offset=24),
        "odd": Tensor(storage, (1, 24), (10**15, 1)),
    }
    save(path, views)
    loaded = load(path)
    np.testing.assert_array_equal(loaded["transposed"], storage.reshape(6, 4).T)
    np.testing.assert_array_equal(loaded["middle"], [storage[5:10:2], storage[11:16:2]])
    assert loaded["scalar"] == storage[7]
    assert loaded["scalar"].shape == ()
    np.testing.assert_array_equal(loaded["expanded"], np.tile(storage[:2], (5, 1)))
    assert loaded["empty"].shape == (0, 3)
    np.testing.assert_array_equal(loaded["odd"], storage[None])
    assert np.shares_memory(loaded["middle"], loaded["transposed"])


def test_other_tensors(path):
    x = of_dtype("float32", 2, 2)
    parameter = Call("torch._utils._rebuild_parameter", (x, True, OrderedDict()))
    save(path, {"parameter": parameter})
    np.testing.assert_array_equal(load(path)["parameter"], x)

    # An untyped storage counts bytes; the tensor says its type.
    writer = Writer()
    pid = writer.dump(("storage", Name("torch.storage.UntypedStorage"), "0", "cpu", 8)) + b"Q"
    rest = [0, (4,), (1,), False, OrderedDict(), Name("torch.uint16")]
    args = b"(" + pid + b"".join(map(writer.dump, rest)) + b"t"
    pickled = writer.dump(Name("torch._utils._rebuild_tensor_v3")) + args + b"R"
    data = np.arange(4, dtype=np.uint16) + 65530
    save_pickle(path, b"\x80\x02" + pickled + b".", [data])
    np.testing.assert_array_equal(load(path), data)
    assert load(path).dtype == np.uint16


def test_memory_mapped_and_read_only(path):
    save(path, {"x": np.zeros(2_000_000, np.float32)})
    tracemalloc.start()
    x = load(path)["x"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert not x.flags.writeable


def test_compressed_by_someone_else(path):
    x = of_dtype("float32", 100)
    save(path, {"x": x, "y": x}, compression=zipfile.ZIP_DEFLATED)
    loaded = load(path)
    np.testing.assert_array_equal(loaded["y"], x)
    assert np.shares_memory(loaded["x"], loaded["y"])


def test_genuine_lightning_checkpoint():
    checkpoint = load(GOLDEN / "videogpt_stride4x4x4.ckpt")
    namespace = checkpoint["hyper_parameters"]["args"]
    assert isinstance(namespace, Placeholder)
    assert namespace.name == "argparse.Namespace"
    assert namespace.state["downsample"] == (4, 4, 4)
    assert checkpoint["state_dict"]["encoder.convs.0.conv.weight"].shape == (32, 3, 4, 4, 4)
    assert checkpoint["optimizer_states"][0]["state"][0]["step"] == 6


def test_genuine_clip_files_agree():
    torch = load(GOLDEN / "clip_text" / "pytorch_model.bin")
    safe = load(GOLDEN / "clip_text" / "model.safetensors")
    assert torch.keys() == safe.keys()
    for name, x in torch.items():
        np.testing.assert_array_equal(x, safe[name])


def test_safetensors(tmp_path):
    arrays = {name: of_dtype(name, 2, 3) for name in DTYPES if name != "bfloat16"}
    arrays |= {"scalar": np.array(3.0), "empty": np.zeros((0, 4), np.int32)}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    loaded = load(tmp_path / "x.safetensors")
    for name, x in load_file(tmp_path / "x.safetensors").items():
        assert loaded[name].dtype == x.dtype
        assert loaded[name].shape == x.shape
        np.testing.assert_array_equal(loaded[name], x)


def write_safetensors(path, header, data):
    header = header.encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_safetensors_bfloat16_and_malformed(path):
    x = of_dtype("bfloat16", 2, 2)
    entry = '{"x": {"dtype": "%s", "shape": %s, "data_offsets": %s}}'
    write_safetensors(path, entry % ("BF16", "[2, 2]", "[0, 8]"), x.tobytes())
    np.testing.assert_array_equal(load(path)["x"], x)
    for bad in [
        ("F99", "[2, 2]", "[0, 8]"),
        ("BF16", "[2, 3]", "[0, 8]"),
        ("BF16", "[2, -1, -2]", "[0, 8]"),
        ("BF16", "[2, 2]", "[0, 80]"),
        ("BF16", "[2, 2]", "[8, 0]"),
        ("BF16", "[2, 2]", "[-8, 0]"),
        ("BF16", "7", "[0, 8]"),
        ("BF16", "[0, 1e300]", "[0, 0]"),
        ("F32", "[1]", "[0, 3]"),
    ]:
        write_safetensors(path, entry % bad, x.tobytes())
        with pytest.raises(TorchFileError, match=r"file\.pt: 'x': "):
            load(path)
    for header in ("{", "{1}", '{"x": []}', '{"x": {}}'):
        write_safetensors(path, header, b"")
        with pytest.raises(TorchFileError, match="header"):
            load(path)


X = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(X, (7,)),
        Tensor(X, (6,), offset=1),
        Tensor(X, (2, 2), (5, 1)),
        Tensor(X, (2,), (-1,), offset=3),
        Tensor(X, (-1,), (1,)),
        Tensor(X, (2, 3), (1,)),
        Tensor(X, (2,), (2**62,)),
        Tensor(X, (2**62, 2**62), (0, 0)),
        Tensor(X, (2**30,), (0,)),
        Tensor(X, (1,) * 100),
        Tensor(X, (0, 2**62, 2**62)),
        Tensor(X, "ab", (1, 1)),
        Tensor(X, (2.0,), (1,)),
    ],
)
def test_tensors_that_do_not_fit(path, tensor):
    save(path, {"x": tensor})
    with pytest.raises(TorchFileError, match=r"file\.pt"):
        load(path)


def test_wrong_files(path, tmp_path):
    def raises(match):
        return pytest.raises(TorchFileError, match=match)

    for content, match in [
        (b"", "empty"),
        (b"hello, I am a text file", "neither a PyTorch"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before 1.6"),
        (b"PK\x03\x04 and no more", "zip"),
    ]:
        path.write_bytes(content)
        with raises(match):
            load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.pt")

    save(path, {"x": np.zeros(1000, np.float32)})
    whole = path.read_bytes()
    for n in (10, 100, 1000, len(whole) - 1):
        path.write_bytes(whole[:n])
        with raises("zip|neither"):
            load(path)

    pickled = Writer().pickle({"x": np.zeros(1000, np.float32)})
    save_pickle(path, pickled, [np.zeros(999, np.float32)])
    with raises("storage '0': 3996 bytes, expected 4000"):
        load(path)
    save_pickle(path, pickled)
    with raises("no 'archive/data/0'"):
        load(path)
    save_pickle(path, pickled, byteorder="middle")
    with raises("byteorder"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "")
    with raises(r"without a data\.pkl"):
        load(path)


def test_zip_bomb(path):
    x = np.zeros(20_000_000, np.uint8)
    save(path, {"x": x}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(TorchFileError, match="would inflate to 20000000"):
        load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000


def mutations(data, n, rng):
    """Overwritten, cut, doubled and shortened copies of `data`."""
    for _ in range(n):
        out = bytearray(data)
        kind = rng.integers(4)
        if kind < 2:
            for i in rng.integers(len(out), size=rng.integers(1, 6)):
                out[i] = rng.integers(256)
        elif kind == 2:
            i, size = rng.integers(len(out)), rng.integers(1, 20)
            out[i : i + size] = out[i : i + size] * rng.integers(3)
        else:
            out = out[: rng.integers(len(out))]
        yield bytes(out)


def test_mutated_files_load_or_raise(path, tmp_path):
    rng = np.random.default_rng(0)
    storage = of_dtype("float32", 12)
    value = {
        "epoch": 1,
        "hyper_parameters": New("argparse.Namespace", {"downsample": (4, 4, 4), "lr": 0.1}),
        "state_dict": OrderedDict(a=of_dtype("int64", 2, 3), b=Tensor(storage, (3, 4), (1, 3))),
    }
    writer = Writer()
    pickled = writer.pickle(value)
    save_pickle(path, pickled, writer.storages)
    save_file({"a": storage, "b": of_dtype("int64", 3)}, tmp_path / "x.safetensors")
    mutant = tmp_path / "mutant.pt"
    outcomes = []

    def attempt():
        try:
            load(mutant)
            outcomes.append("loaded")
        except TorchFileError:
            outcomes.append("refused")

    for data in mutations(pickled, 1500, rng):
        save_pickle(mutant, data, writer.storages)
        attempt()
    real = (GOLDEN / "clip_text" / "pytorch_model.bin").read_bytes()
    for source, n in (
        (path.read_bytes(), 1500),
        ((tmp_path / "x.safetensors").read_bytes(), 500),
        (real, 200),
    ):
        for data in mutations(source, n, rng):
            mutant.write_bytes(data)
            attempt()
    assert min(outcomes.count(outcome) for outcome in ("loaded", "refused")) > 300
