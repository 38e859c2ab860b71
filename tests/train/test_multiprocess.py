"""The dit stage on two real processes of four devices each, against one process of eight."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import default
from opensora_jax import check, main
from opensora_jax.data import dataset
from opensora_jax.train import writer

ROOT = Path(__file__).parents[2]
N_CODES, DIM, TEXT_WIDTH = 16, 4, 6
# An epoch is four steps.
N_ROWS, BATCH, STEPS = 32, 8, 12
CONFIG = {
    "stages": ("dit",),
    "seed": 3,
    "dit.size": "",
    "dit.depth": 2,
    "dit.width": 64,
    "dit.heads": 4,
    "dit.batch_size": BATCH,
    "dit.validation_share": 0.0,
    "dit.steps": STEPS,
    "dit.warmup_steps": 2,
    "dit.learning_rate": 3e-3,
    "dit.log_every": 1,
    "dit.checkpoint_every": 4,
}
ONE = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.context": 1, "mesh.tensor": 1}
TWO = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2, "mesh.tensor": 2}
# The command, which writes down at its end which rows it read and which it trained on.
PROGRAM = """
import atexit, json, runpy, sys
from opensora_jax import mesh
from opensora_jax.data.dataset import LatentDataset

path, *arguments = sys.argv[1:]
notes = {"read": [], "batches": []}
get, shard = LatentDataset.__getitem__, mesh.shard_batch

def read(self, index):
    notes["read"].append(int(index))
    return get(self, index)

def shard_batch(batch, *args):
    notes["batches"].append(batch["text"][:, 0, 0].astype(int).tolist())
    return shard(batch, *args)

LatentDataset.__getitem__, mesh.shard_batch = read, shard_batch
atexit.register(lambda: open(path, "w").write(json.dumps(notes)))
sys.argv = ["main", *arguments]
runpy.run_module("opensora_jax.main", run_name="__main__")
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with their number in their text."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N_ROWS):
        text = rng.normal(size=(3, TEXT_WIDTH)).astype(np.float32)
        text[:, 0] = i
        rows.append(
            {
                "video_file": f"video{i:02d}.mp4",
                "caption": f"caption {i}",
                "fps": 8.0,
                "video_latent_states": rng.integers(0, N_CODES, (3, 4, 4)),
                "text_latent_states": text,
            }
        )
    dataset.write_part(folder, 0, rows, N_CODES, {"kept": len(rows), "filtered": [], "failed": []})
    metadata = {
        "downsample": [2, 2, 2],
        "vqvae": "no_vqvae",
        "text_model": str(folder),  # that it is not, so no sample videos
        "resolution": [8, 8],
    }
    codebook = rng.normal(size=(N_CODES, DIM)).astype(np.float32)
    dataset.finish_dataset(folder, metadata, codebook)
    return folder


def train_here(data, workdir, mesh):
    c = default.get_config()
    c.data.dataset = str(data)
    c.update_from_flattened_dict(CONFIG | mesh)
    check.config(c)
    main.run(c, workdir)


def train_on_two_processes(data, workdir, mesh, folder):
    """What each process wrote down and printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    fields = CONFIG | mesh
    arguments = [
        "--config=configs/default.py",
        f"--workdir={workdir}",
        f"--config.data.dataset={data}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, folder / f"notes{i}.json", *arguments],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        printed = [process.communicate(timeout=500)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ends = [
        f"process {i} ended with {p.returncode}:\n{printed[i][-3000:]}"
        for i, p in enumerate(processes)
    ]
    assert not any(process.returncode for process in processes), "\n".join(ends)
    notes = [json.loads((folder / f"notes{i}.json").read_text()) for i in range(2)]
    return notes, printed


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """The workdir of a training on one process."""
    workdir = tmp_path_factory.mktemp("one")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longest
    train_here(data, workdir, ONE)
    yield workdir
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The workdir of a training on two processes, what they wrote down and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    return folder / "workdir", *train_on_two_processes(data, folder / "workdir", TWO, folder)


def metrics(workdir):
    """Step -> losses and gradient norm."""
    found = {}
    for line in writer.read_metrics(workdir / "dit" / "metrics.jsonl"):
        values = {k: v for k, v in line.items() if "loss" in k or k == "grad_norm"}
        found.setdefault(line["step"], {}).update(values)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), f"step {step}"


def test_losses_are_those_of_one_process(one, two):
    expected = metrics(one)
    assert list(expected) == list(range(1, STEPS + 1))
    assert_same(metrics(two[0]), expected)


def test_every_process_reads_its_share_and_an_epoch_has_every_row_once(two):
    _, notes, _ = two
    batches = np.array([process["batches"] for process in notes])
    assert batches.shape == (2, STEPS, BATCH // 2)
    for start in range(0, STEPS, N_ROWS // BATCH):
        epoch = batches[:, start : start + N_ROWS // BATCH]
        assert len(set(epoch.flat)) == epoch.size == N_ROWS
    for process in notes:
        # Besides what it trained on, only what is read ahead for the next batches.
        ahead = 2 * 6 * BATCH // 2
        assert len(process["read"]) <= len(process["batches"]) * BATCH // 2 + ahead


def test_only_the_first_process_prints(two):
    _, _, (first, second) = two
    assert "parameters; a device holds" in first
    assert f"{STEPS}/{STEPS}" in first
    assert not [line for line in second.splitlines() if not line.startswith("[Gloo]")]


def test_a_training_goes_on_on_another_number_of_processes(data, one, two, tmp_path):
    expected = metrics(one)
    workdir = tmp_path / "run"
    shutil.copytree(two[0], workdir)
    (workdir / "dit" / "done.json").unlink()
    shutil.rmtree(workdir / "dit" / "checkpoints" / str(STEPS))
    train_here(data, workdir, ONE)
    assert_same(metrics(workdir), expected)
