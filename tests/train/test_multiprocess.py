"""The dit stage on two real processes of two devices each, against one process of eight."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import default
from opensora_jax import config as config_lib
from opensora_jax import main
from opensora_jax.data import dataset_writer, video_io
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.train import metrics_log

ROOT = Path(__file__).parents[2]
VQVAE = ROOT / "tests" / "golden" / "videogpt_stride4x4x4.ckpt"
N_CODES, DIM, TEXT_WIDTH = 16, 4, 6
# An epoch is four steps.
N_ROWS, BATCH, STEPS = 32, 8, 8
CONFIG = {
    "stages": ("dit",),
    "seed": 3,
    "dit.size": "",
    "dit.depth": 2,
    "dit.width": 32,
    "dit.heads": 4,
    "dit.batch_size": BATCH,
    "dit.validation_share": 0.0,
    "dit.steps": STEPS,
    "dit.warmup_steps": 2,
    "dit.learning_rate": 3e-3,
    "dit.log_every": 1,
    "dit.checkpoint_every": 4,
    "dit.eval_every": STEPS,
    "sample.steps": 2,
    "sample.prompts": ("a red circle", "a circle"),
}
ONE = {"mesh.data": 8, "mesh.fsdp": 1, "mesh.context": 1, "mesh.tensor": 1}
TWO = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 1, "mesh.tensor": 2}
PROFILE = {"profile": "(2,3)"}
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
    dataset_writer.write_part(
        folder, 0, rows, N_CODES, {"kept": len(rows), "filtered": [], "failed": []}
    )
    metadata = {
        "downsample": [4, 4, 4],
        "vqvae": str(VQVAE),
        "text_model": str(folder / "text_model"),
        "resolution": [16, 16],
    }
    words = ["a red circle"]
    make_small_text_model(folder / "text_model", words, width=TEXT_WIDTH, depth=1, heads=1)
    codebook = rng.normal(size=(N_CODES, DIM)).astype(np.float32)
    dataset_writer.finish_dataset(folder, metadata, codebook)
    return folder


def train_here(data, workdir, mesh):
    c = default.get_config()
    c.data.dataset = str(data)
    c.update_from_flattened_dict(CONFIG | mesh)
    config_lib.check(c)
    main.run(c, workdir)


def wait_for(processes, folder):
    for i, process in enumerate(processes):
        code = process.wait(timeout=400)
        assert code == 0, (folder / f"printed{i}.txt").read_text()[-3000:]


def forget_the_end(workdir):
    """Leaves of a training what a kill in its second half would have left."""
    (workdir / "dit" / "done.json").unlink()
    shutil.rmtree(workdir / "dit" / "checkpoints" / str(STEPS))


def start_two_processes(data, workdirs, mesh, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [
        "--config=configs/default.py",
        f"--config.data.dataset={data}",
        *(f"--config.{name}={value}" for name, value in (CONFIG | mesh).items()),
    ]
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
        # Compiling takes longest.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, folder / f"notes{i}.json"),
                *(f"--workdir={workdir}", *arguments),
            ],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            cwd=ROOT,
            stdout=(folder / f"printed{i}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for i, workdir in enumerate(workdirs)
    ]


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Holds the workdirs `one` and `two`, of the same training on as many processes, and of each
    of the two processes what it printed and wrote down."""
    folder = tmp_path_factory.mktemp("trainings")
    processes = start_two_processes(data, [folder / "two"] * 2, TWO | PROFILE, folder)
    try:
        train_here(data, folder / "one", ONE)
        wait_for(processes, folder)
        yield folder
    finally:
        for process in processes:
            process.kill()


def metrics(workdir):
    """Step -> losses and gradient norm."""
    found = {}
    for line in metrics_log.read_metrics(workdir / "dit" / "metrics.jsonl"):
        values = {k: v for k, v in line.items() if "loss" in k or k == "grad_norm"}
        found.setdefault(line["step"], {}).update(values)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-4), f"step {step}"


def test_losses_are_those_of_one_process(folder):
    expected = metrics(folder / "one")
    assert list(expected) == list(range(1, STEPS + 1))
    assert_same(metrics(folder / "two"), expected)


def test_every_process_reads_its_share_and_an_epoch_has_every_row_once(folder):
    notes = [json.loads((folder / f"notes{i}.json").read_text()) for i in range(2)]
    batches = np.array([process["batches"] for process in notes])
    assert batches.shape == (2, STEPS, BATCH // 2)
    for start in range(0, STEPS, N_ROWS // BATCH):
        epoch = batches[:, start : start + N_ROWS // BATCH]
        assert sorted(epoch.flat) == list(range(N_ROWS))
    for process, trained_on in zip(notes, batches, strict=True):
        ahead = Counter(process["read"])
        ahead.subtract(trained_on.flat)
        # Besides what it trained on a process reads a few batches ahead, of its places only.
        assert min(ahead.values()) >= 0
        assert ahead.total() <= 6 * BATCH // 2


def test_processes_draw_samples_together_while_they_train(folder):
    """On a mesh of fsdp and tensor the videos that one process draws on data alone."""
    expected, found = (
        folder / name / "dit" / "samples" / f"step{STEPS:06d}" for name in ("one", "two")
    )
    names = sorted(path.name for path in expected.iterdir())
    assert names == ["00.mp4", "01.mp4", "prompts.json"]
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names[:2]:
        videos = [video_io.read_video(path / name) for path in (expected, found)]
        assert videos[0].shape == (12, 16, 16, 3)
        np.testing.assert_array_equal(*videos)


def test_only_the_first_process_prints(folder):
    first, second = ((folder / f"printed{i}.txt").read_text() for i in range(2))
    # The collectives' library prints from threads of its own, in both.
    for words in ("parameters; a device holds", "loss", f"{STEPS}/{STEPS}"):
        assert words in first
        assert words not in second


def test_every_process_writes_its_own_trace(folder):
    traces = (folder / "two" / "dit" / "profile").rglob("*.trace.json.gz")
    assert sorted(path.name.split(".")[0] for path in traces) == ["process0", "process1"]


def test_compiled_programs_are_kept(folder):
    assert list((folder / "cache" / "opensora_jax" / "compiled").glob("jit_train_step*"))


def test_a_training_goes_on_on_another_mesh_and_number_of_processes(data, folder):
    workdir = folder / "two"
    forget_the_end(workdir)
    train_here(data, workdir, ONE)
    assert_same(metrics(workdir), metrics(folder / "one"))


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(data, folder, tmp_path):
    workdir = tmp_path / "one"
    shutil.copytree(folder / "one", workdir)
    forget_the_end(workdir)
    processes = start_two_processes(data, [workdir] * 2, TWO, tmp_path)
    try:
        wait_for(processes, tmp_path)
    finally:
        for process in processes:
            process.kill()
    assert_same(metrics(workdir), metrics(folder / "one"))
    batches = np.array(
        [json.loads((tmp_path / f"notes{i}.json").read_text())["batches"] for i in range(2)]
    )
    assert batches.shape == (2, STEPS - 4, BATCH // 2)
    assert sorted(batches.flat) == list(range(N_ROWS))  # the last epoch


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_told_at_once(data, tmp_path):
    workdirs = [tmp_path / "mine", tmp_path / "yours"]
    processes = start_two_processes(data, workdirs, TWO, tmp_path)
    try:
        for i, process in enumerate(processes):
            assert process.wait(timeout=200) == 1
            printed = (tmp_path / f"printed{i}.txt").read_text()
            assert f"error: --workdir={workdirs[i]}: process 1 does not see" in printed
    finally:
        for process in processes:
            process.kill()
    assert not any(any(workdir.iterdir()) for workdir in workdirs)
