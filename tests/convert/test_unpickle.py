"""Pickles are read without running anything; those made to exhaust the reader do not."""

import os
import pickle
import tracemalloc

import pytest
from torch_writer import Call, Name, New, Writer, save, save_pickle

from opensora_jax.convert.torch_file import TorchFileError, load


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


class Explodes:
    """An object whose ordinary unpickling would create a file."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_runs(path, tmp_path, protocol):
    trace = tmp_path / "trace"
    for call, name in [
        ((os.system, f"touch {trace}"), f"{os.system.__module__}.system"),
        ((eval, f"open({str(trace)!r}, 'w')"), "builtins.eval"),
        ((getattr, os, "system"), None),
        ((open, str(trace), "w"), "open"),
    ]:
        if name is None:  # a module cannot be pickled; its name can be looked up
            call, name = (getattr, str, "join"), "builtins.getattr"
        save_pickle(path, pickle.dumps({"x": Explodes(*call)}, protocol))
        with pytest.raises(TorchFileError, match=rf"refuses to call .*{name}"):
            load(path)
        assert not trace.exists()


@pytest.mark.parametrize(
    "name",
    [
        "posix.system",
        "builtins.exec",
        "torch._utils._rebuild_qtensor",
        "torch.storage._load_from_bytes",
        "numpy.core.multiarray._reconstruct",
        "argparse.Namespace",
        "functools.partial",
    ],
)
def test_other_calls_are_named(path, name):
    save(path, {"x": Call(name, ("a",))})
    with pytest.raises(TorchFileError, match=f"refuses to call '{name}'"):
        load(path)


@pytest.mark.parametrize("opcode", [b"iposix\nsystem\n", b"oos\n", b"\x82\x01", b"\x97"])
def test_other_opcodes_are_refused(path, opcode):
    save_pickle(path, b"\x80\x02(" + opcode + b".")
    with pytest.raises(TorchFileError, match=r"refuses the opcode|malformed"):
        load(path)


def test_unknown_classes_are_inert(path):
    value = {
        Name("gone.ModelCheckpoint"): 1,
        "namespace": New("gone.Namespace", {"a": 1}),
        "callable": Name("posix.system"),
        "old": Call("copy_reg._reconstructor", (Name("gone.Old"), Name("builtins.object"), None)),
    }
    save(path, value)
    loaded = load(path)
    assert [key.name for key in loaded if not isinstance(key, str)] == ["gone.ModelCheckpoint"]
    assert (loaded["namespace"].name, loaded["namespace"].state) == ("gone.Namespace", {"a": 1})
    assert loaded["old"].name == "gone.Old"
    assert not callable(loaded["callable"])
    # Subclasses of dict and list, as Lightning's AttributeDict, keep what they hold.
    new = Writer().dump(Name("gone.AttributeDict")) + b")\x81"
    items = Writer().dump("key") + Writer().dump([5])
    save_pickle(path, b"\x80\x02" + new + b"(" + items + b"u(" + items + b"e.")
    assert load(path).entries == {"key": [5]}
    assert load(path).items == ["key", [5]]


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"]" * 100_000 + b"0" * 99_999 + b".",
        b"\x80\x02)" + b"\x85" * 100_000 + b".",
        b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u.",
        b"\x80\x02r\xff\xff\xff\x7f.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04\x8d" + b"\xff" * 8 + b".",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x04X\x40\x0d\x03\x00" + b"a" * 200_000 + b"\x940" + b"h\x00h\x00\x93" * 5_000 + b".",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02",
        b".",
        b"",
    ],
)
def test_pickles_made_to_exhaust(path, pickled):
    save_pickle(path, pickled)
    tracemalloc.start()
    try:
        load(path)
    except TorchFileError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100_000_000
