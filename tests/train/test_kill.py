"""The dit stage as a process of its own, killed and terminated at moments that nobody chose."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from linear import numbers

from opensora_jax.data import dataset_writer

ROOT = Path(__file__).parents[2]
STEPS = 90
OVERRIDES = f"""
    dit.size= dit.depth=1 dit.width=16 dit.heads=2 dit.batch_size=8 dit.steps={STEPS}
    dit.log_every=7 dit.checkpoint_every=10 dit.eval_every=30 dit.validation_share=0.5
    dit.caption_dropout=0.3 dit.remat=none
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An Arrow dataset of random codes; its VQ-VAE is not there, so no videos are sampled."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    rows = [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": rng.integers(0, 16, (2, 4, 4)),
            "text_latent_states": rng.normal(size=(3, 6)).astype(np.float32),
        }
        for i in range(96)
    ]
    dataset_writer.write_part(folder, 0, rows, 16, {"kept": 96, "filtered": [], "failed": []})
    metadata = {
        "downsample": [2, 2, 2],
        "vqvae": "no_vqvae",
        "vqvae_fingerprint": "abc",
        "text_model": "no_text_model",
        "resolution": [8, 8],
    }
    dataset_writer.finish_dataset(folder, metadata, rng.normal(size=(16, 4)).astype(np.float32))
    return folder


def start(workdir, data):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "opensora_jax.main", "--config=configs/default.py"),
            *(f"--workdir={workdir}", "--config.stages=('dit',)", f"--config.data.dataset={data}"),
            *(f"--config.{override}" for override in OVERRIDES.split()),
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, expect=0):
    try:
        _, said = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == expect, said[-3000:]
    return said


def last_step(folder):
    return max((line["step"] for line in numbers(folder)), default=0)


def signal_at(process, folder, step, which):
    """Sends a signal once `step` is logged and a moment more has passed."""
    deadline = time.monotonic() + 500
    while last_step(folder) < step:
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(which)


def test_losses_are_those_of_a_run_that_nobody_disturbed(data, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    end(start(whole, data))
    for target in (random.randint(1, 20), random.randint(28, 48)):
        process = start(cut, data)
        signal_at(process, cut / "dit", target, signal.SIGKILL)
        end(process, expect=-signal.SIGKILL)
    process = start(cut, data)
    signal_at(process, cut / "dit", random.randint(55, 75), signal.SIGTERM)
    terminated = time.monotonic()
    said = end(process)
    assert time.monotonic() - terminated < 30
    assert "dit: stopped by SIGTERM; the same command goes on from here" in said
    assert "all stages done" not in said
    assert not (cut / "dit" / "done.json").exists()
    said = end(start(cut, data))
    assert "dit: going on from step" in said
    assert (cut / "dit" / "done.json").exists()
    # Every number but times, of training and of validation, bit by bit.
    assert numbers(cut / "dit") == numbers(whole / "dit")
    assert last_step(cut / "dit") == STEPS
