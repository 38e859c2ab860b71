"""Files that ask for much with few bytes: they are refused, or load in what their size allows."""

import tracemalloc

import attack_files
import numpy as np
import pytest
from torch_writer import save

from opensora_jax.convert import torch_file, unpickle


def load(path):
    """What `load` makes of a file: (True, or the refusal; most bytes that it held)."""
    tracemalloc.start()
    try:
        torch_file.load(path)
        outcome = True
    except torch_file.TorchFileError as error:
        outcome = str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return outcome, peak


def check(path, kind, n):
    data = kind(n)
    path.write_bytes(data)
    outcome, peak = load(path)
    assert peak < 10 * len(data) + 50e6, f"{kind.__name__}({n}): {peak / 1e6:.0f} MB"
    return outcome


@pytest.mark.parametrize("kind", attack_files.CLASSES, ids=lambda kind: kind.__name__)
def test_none_takes_more_than_its_size_allows(tmp_path, kind):
    outcomes = [check(tmp_path / "file", kind, n) for n in (3, 4000)]
    if kind.__name__ not in ("memory_of_lists", "big_endian", "nested"):  # which are small
        assert outcomes[1] is not True


@pytest.mark.slow
@pytest.mark.parametrize("kind", attack_files.CLASSES, ids=lambda kind: kind.__name__)
def test_of_some_hundred_none_does(tmp_path, kind):
    for n in attack_files.sizes(20):
        check(tmp_path / "file", kind, n)


def test_work_is_bounded_by_the_size_of_the_file(tmp_path):
    """Of a file of more bytes more is read: a large one may have many objects."""
    body = b"\x80\x02](" + b"]" * 300_000 + b"e."
    with pytest.raises(unpickle.TorchFileError, match="more time or memory than its file has"):
        unpickle.unpickle(body, {}, None)
    assert len(unpickle.unpickle(body, {}, None, file_size=2**23)) == 300_000


def test_a_large_state_dict_loads(tmp_path):
    tensors = {f"layer.{i}.weight": np.full((3, 2), i, np.float32) for i in range(3000)}
    save(tmp_path / "model.pt", {"state_dict": tensors, "losses": [0.5] * 20_000})
    found = torch_file.load(tmp_path / "model.pt")
    assert len(found["losses"]) == 20_000
    for name, x in tensors.items():
        np.testing.assert_array_equal(found["state_dict"][name], x)


def test_big_endian_tensors_of_one_storage_swap_it_once(tmp_path):
    x = np.arange(12, dtype=np.float32)
    save(tmp_path / "a.pt", {"a": x, "b": x, "c": x[:0]}, byteorder="big")
    found = torch_file.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(found["a"], x)
    np.testing.assert_array_equal(found["b"], x)
