"""A workdir of version 0.1, as kept in golden/: it opens, samples and goes on."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import dataset, moving_shapes
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.tokenizer import fingerprint, load_tokenizer

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "tests" / "golden" / "workdir_0.1.tar.xz"
# The settings that it was made with: stages vqvae and dit had 6 steps each.
SETTINGS = """
    vqvae.n_codes=32 vqvae.n_hiddens=8 vqvae.n_res_layers=1 vqvae.n_frames=4 vqvae.resolution=16
    vqvae.steps=6 dit.depth=2 dit.width=16 dit.heads=2 dit.unroll=1 dit.batch_size=8
    dit.eval_every=6 dit.checkpoint_every=6 dit.log_every=2 dit.warmup_steps=1
    dit.validation_share=0.4 sample.steps=2 preprocess.resolution=16
    shapes.n_frames=4 shapes.resolution=16
"""


@pytest.fixture
def workdir(tmp_path):
    """The workdir, with its text model, which the captions determine, made anew."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "workdir"
    for name in ("dataset/metadata.json", "dit/model.json"):
        path = workdir / name
        path.write_text(path.read_text().replace("/runs/old", str(workdir)))
    entries = json.loads((workdir / "shapes/train/captions.json").read_text())
    make_small_text_model(workdir / "text_model", [c for e in entries for c in e["captions"]])
    return workdir


def test_the_tokenizer_is_the_one_that_the_dataset_was_made_with(workdir):
    data = dataset.open_dataset(workdir / "dataset")
    tokenizer = load_tokenizer(workdir / "vqvae")
    assert fingerprint(tokenizer) == data.metadata["vqvae_fingerprint"]
    np.testing.assert_array_equal(tokenizer.codebook, data.codebook)
    assert len(data) == data.metadata["n_rows"] == 24
    assert data[0][dataset.CODES].shape == (2, 8, 8)


@pytest.mark.slow
def test_samples_are_drawn_with_its_last_and_best_weights(workdir):
    description = DiTDescription.read(workdir / "dit")
    assert (description.dit.depth, description.dit.width, description.dit.heads) == (2, 16, 2)
    generator = Generator.load(workdir / "dit")
    prompts = [moving_shapes.captions(*moving_shapes.ALL[0])[0]]
    for best in (False, True):
        params = generator.restore(workdir / "dit", best=best)
        videos = generator.sample(prompts, params=params, sampling=Sampling(2, 2.0), seed=0)
        assert videos.shape == (1, 4, 16, 16, 3)


@pytest.mark.slow
def test_its_training_goes_on(workdir):
    command = [sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"]
    command += [f"--workdir={workdir}", "--config.stages=('dit',)", "--config.dit.steps=8"]
    command += [f"--config.{field}" for field in SETTINGS.split()]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step 6" in done.stderr
    assert checkpoint.latest_step(workdir / "dit") == 8
    metrics = [
        json.loads(line) for line in (workdir / "dit/metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in metrics if "loss" in m] == [2, 4, 6, 8]
    samples = workdir / "dit" / "samples" / "step000008"
    assert len(list(samples.glob("*.mp4"))) == 4
