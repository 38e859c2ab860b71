"""The README's commands for MSR-VTT in their order, on a small tree in MSR-VTT's layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.data import dataset, moving_shapes, video_io
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.train.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "videogpt_stride4x4x4.ckpt"
SPLITS = {"train": range(12), "val": range(12, 14), "test": range(14, 16)}
RESOLUTION, N_FRAMES = 16, 20
SMALL = [
    "--config.dit.size=",
    "--config.dit.depth=2",
    "--config.dit.width=32",
    "--config.dit.heads=2",
    "--config.dit.batch_size=4",
    "--config.dit.steps=4",
    "--config.dit.warmup_steps=1",
    "--config.dit.log_every=2",
    "--config.dit.eval_every=2",
    "--config.dit.checkpoint_every=2",
    "--config.dit.validation_share=0.2",
    "--config.sample.steps=2",
]


def run(*arguments):
    # Two devices, and quick compilation, which takes nearly all of the time.
    xla = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = {**os.environ, "XLA_FLAGS": xla}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def make_archive(folder):
    """Two captions a video, in the files and folders that the published archive has."""
    videos = folder / "videos" / "all"
    annotations = []
    for split, numbers in SPLITS.items():
        names = [f"video{i}" for i in numbers]
        for i in numbers:
            combination = moving_shapes.ALL[i % len(moving_shapes.ALL)]
            rng = np.random.default_rng(i)
            frames = moving_shapes.render(rng, *combination, N_FRAMES, 32)
            videos.mkdir(parents=True, exist_ok=True)
            video_io.write_video(videos / f"video{i}.mp4", frames, fps=8)
            annotations += [
                {"image_id": f"video{i}", "caption": caption}
                for caption in moving_shapes.captions(*combination)[:2]
            ]
        lists = folder / "structured-symlinks"
        lists.mkdir(exist_ok=True)
        (lists / f"{split}_list_full.txt").write_text("\n".join(names) + "\n")
    (folder / "annotation").mkdir()
    (folder / "annotation" / "MSR_VTT.json").write_text(json.dumps({"annotations": annotations}))
    return [annotation["caption"] for annotation in annotations]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the commands leave: MSRVTT/, msrvtt/, text/, dataset/, run/ and the last's output."""
    folder = tmp_path_factory.mktemp("pipeline")
    captions = make_archive(folder / "MSRVTT")
    make_small_text_model(folder / "text", captions)
    run("data_prep/collate_msrvtt.py", "-d", folder / "MSRVTT", "-o", folder / "msrvtt")
    train = folder / "msrvtt" / "train"
    data = ["-c", train / "annotations.json", "-v", train / "videos", "-o", folder / "dataset"]
    models = ["--vqvae", CHECKPOINT, "--text_model", folder / "text"]
    run("data_prep/preprocess_data.py", *data, *models, "--resolution", RESOLUTION)
    return folder, captions


@pytest.fixture(scope="module")
def trained(world):
    folder, _ = world
    run(*main_command(folder))
    return folder / "run"


def main_command(folder):
    paths = [f"--workdir={folder / 'run'}", f"--config.data.dataset={folder / 'dataset'}"]
    return ["-m", "opensora_jax.main", "--config=configs/msrvtt.py", *paths, *SMALL]


def test_a_row_a_caption_of_the_training_split(world):
    folder, captions = world
    found = dataset.open_dataset(folder / "dataset")
    n_videos = len(SPLITS["train"])
    assert found.metadata["counts"] == {"kept": n_videos, "filtered": 0, "failed": 0}
    assert [found.column(i, "caption") for i in range(len(found))] == captions[: 2 * n_videos]
    # Windows of eight frames: two whole ones and half of a third.
    assert found.metadata["latent_shape"] == [5, 4, 4]


@pytest.mark.slow
def test_training_logs_losses_samples_and_checkpoints(trained):
    metrics = read_metrics(trained / "dit" / "metrics.jsonl")
    losses = {m["step"]: m["loss"] for m in metrics if "loss" in m}
    assert list(losses) == [2, 4]
    assert np.isfinite(list(losses.values())).all()
    assert [m["step"] for m in metrics if "validation_loss" in m] == [2, 4]
    for step in (2, 4):
        samples = trained / "dit" / "samples" / f"step{step:06d}"
        prompts = json.loads((samples / "prompts.json").read_text())
        assert len(prompts) == 4  # the captions of the two videos held back
        for entry in prompts:
            video = video_io.read_video(samples / entry["file"])
            assert video.shape == (16, RESOLUTION, RESOLUTION, 3)
    assert sorted(p.name for p in (trained / "dit" / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.slow
def test_the_same_command_again_finds_it_done(world, trained):
    folder, _ = world
    before = (trained / "dit" / "metrics.jsonl").read_bytes()
    assert "done already" in run(*main_command(folder))
    assert (trained / "dit" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_sampling_from_the_trained_model(trained, tmp_path):
    output = tmp_path / "out.mp4"
    prompt = ["--prompt", "a blue square moves up", "--output", output, "--steps", 2]
    run("-m", "opensora_jax.sample", "--workdir", trained, *prompt)
    assert video_io.read_video(output).shape == (16, RESOLUTION, RESOLUTION, 3)
