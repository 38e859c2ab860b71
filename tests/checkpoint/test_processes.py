"""Checkpoints of two real processes: each sums what it wrote and checks its share."""

import json
import os
import socket
import subprocess
import sys

import pytest
from items import flip_a_bit

from opensora_jax.checkpoint import checksums

N = 2
N_BYTES = 2**24
# Saves, or restores, an array of which every process has a part; says how much it read.
PROGRAM = f"""
import sys
import jax
import numpy as np
from opensora_jax import mesh, runtime
from opensora_jax.checkpoint.manager import Checkpoints

def n_read():
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])

what, folder = sys.argv[1:]
runtime.start()
mesh = mesh.make_mesh({{"data": 1, "fsdp": {N}, "context": 1, "tensor": 1}})
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
values = np.random.default_rng(0).normal(size={N_BYTES // 4}).astype(np.float32)
array = jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
if what == "save":
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        before = n_read()
        checkpoints.save(step, {{"ema": {{"kernel": array}}}})
        checkpoints.wait()
else:
    before = n_read()
    checkpoints = Checkpoints(folder)
print("read", n_read() - before, "of", checkpoints.latest_step)
checkpoints.close()
"""


def run(what, folder):
    """The bytes that each process read, the step that each found, and what all said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(N)}
    environment |= {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, what, folder],
            env=os.environ | environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(N)
    ]
    try:
        said = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * N, said
    words = [out.splitlines()[-1].split() for out, _ in said]  # the collectives talk, too
    return [int(w[1]) for w in words], [int(w[3]) for w in words], "".join(e for _, e in said)


@pytest.mark.slow
def test_each_sums_what_it_wrote_and_checks_its_share(tmp_path):
    read, steps, _ = run("save", tmp_path)
    assert steps == [2, 2]
    assert max(read) < 0.8 * N_BYTES, read
    saved = tmp_path / "checkpoints" / "2"
    sums = json.loads((saved / checksums.NAME).read_text())
    for i in range(N):
        assert any(name.startswith(f"ema/ocdbt.process_{i}/") for name in sums)
    there = {p.relative_to(saved).as_posix() for p in saved.glob("*/**/*") if p.is_file()}
    assert set(sums) == there
    read, steps, said = run("open", tmp_path)
    assert steps == [2, 2]
    assert max(read) < 0.8 * N_BYTES, read
    for i in range(N):  # whoever wrote it, all are told, and go on from the one before
        flip_a_bit(saved / "ema" / f"ocdbt.process_{i}")
    read, steps, said = run("open", tmp_path)
    assert steps == [1, 1]
    assert "checkpoints/2: this checkpoint is damaged: 'ema/ocdbt.process_" in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "damaged-2"]
