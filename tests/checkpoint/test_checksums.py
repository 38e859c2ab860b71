"""No process reads it all: what is summed and checked of a checkpoint of 64 processes."""

import json

import numpy as np
import pytest

from opensora_jax.checkpoint import checksums

N = 64
ITEMS = ("params", "ema", "opt_state")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Laid out as Orbax lays out what 64 processes write; 12 MB."""
    folder = tmp_path_factory.mktemp("checkpoint")
    rng = np.random.default_rng(0)
    for item in ITEMS:
        for process in range(N):
            part = folder / item / f"ocdbt.process_{process}" / "d"
            part.mkdir(parents=True)
            (part / "values").write_bytes(rng.bytes(60_000 + 1000 * (process % 5)))
            (part / "nodes").write_bytes(rng.bytes(500))
        (folder / item / "manifest.ocdbt").write_bytes(rng.bytes(20_000))
    (folder / "about").mkdir()
    (folder / "about" / "metadata").write_bytes(rng.bytes(1000))
    return folder


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class Reading:
    """Bytes that this process reads while it is entered, by the kernel's count."""

    def __enter__(self):
        self._before = self._read()
        return self

    def __exit__(self, *_):
        self.n_bytes = self._read() - self._before

    @staticmethod
    def _read():
        with open("/proc/self/io") as f:
            return int(f.readline().split()[1])


def test_every_process_reads_its_share(folder):
    total = size(folder)
    wrote = []
    for process in range(N):
        with Reading() as reading:
            checksums.write_own(folder, process)
        wrote.append(reading.n_bytes)
    assert max(wrote) < 1.1 * total / N
    with Reading() as joining:
        checksums.write(folder)
    # Of the arrays, nothing again: what Orbax merged, and the lists.
    assert joining.n_bytes < 4 * total / N
    assert not list(folder.glob("checksums.process_*"))
    sums = json.loads((folder / checksums.NAME).read_text())
    assert len(sums) == len(ITEMS) * (2 * N + 1) + 1
    read = []
    for process in range(N):
        with Reading() as reading:
            assert checksums.damage(folder, share=(process, N)) is None
        read.append(reading.n_bytes - (folder / checksums.NAME).stat().st_size)
    assert max(read) < 1.2 * total / N
    assert sum(read) == pytest.approx(total, rel=0.1)


def test_what_is_damaged_is_seen_by_one_of_them(folder):
    checksums.write(folder)
    path = folder / "ema" / "ocdbt.process_17" / "d" / "values"
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    found = [checksums.damage(folder, share=(process, N)) for process in range(N)]
    told = "'ema/ocdbt.process_17/d/values': its bytes have changed"
    assert sorted(found, key=str) == [told, *[None] * (N - 1)]
    path.write_bytes(data)
    assert checksums.damage(folder) is None


def test_sums_of_nothing_are_damage(tmp_path):
    (tmp_path / checksums.NAME).write_text("{}")
    assert checksums.damage(tmp_path) == f"{checksums.NAME}: names no file"
