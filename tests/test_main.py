"""The whole main job at a tiny size, killed for real in each long stage, and sampling from it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

TINY = """
    shapes.n_videos=48 shapes.n_held_out=8
    vqvae.n_codes=16 vqvae.n_hiddens=8 vqvae.n_res_layers=0 vqvae.steps=60 vqvae.log_every=5
    vqvae.eval_every=30 vqvae.checkpoint_every=5
    preprocess.videos_per_part=4 preprocess.batch_size=4
    dit.depth=1 dit.width=16 dit.heads=1 dit.unroll=1 dit.batch_size=8 dit.steps=60 dit.log_every=5
    dit.eval_every=30 dit.checkpoint_every=5 dit.validation_share=0.2
    sample.steps=2 fidelity.n_samples=48
"""


def environment():
    """One device: the eight of the suite would only make this slower."""
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def command(workdir):
    return [
        *(sys.executable, "-m", "opensora_jax.main"),
        *("--config=configs/quickstart.py", f"--workdir={workdir}"),
        *(f"--config.{override}" for override in TINY.split()),
    ]


def run_to_the_end(workdir):
    done = subprocess.run(
        command(workdir), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def run_and_kill(workdir, appears):
    """Starts the job and ends it with SIGKILL as soon as a file `appears`."""
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 400
    while not (workdir / appears).exists():
        assert process.poll() is None, f"ended before {appears}: {process.stderr.read()[-3000:]}"
        assert time.monotonic() < deadline, f"no {appears}"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def logged_steps(workdir, stage):
    lines = (workdir / stage / "metrics.jsonl").read_text().splitlines()
    return [entry["step"] for entry in map(json.loads, lines) if "loss" in entry]


def sample(workdir, output, *more, expect=0):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "opensora_jax.sample", f"--workdir={workdir}", "--steps=2"),
            *("--prompt=a red circle moves up", f"--output={output}", *more),
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir whose job was killed in each long stage, and then ran to the end."""
    workdir = tmp_path_factory.mktemp("quickstart")
    run_and_kill(workdir, "vqvae/checkpoints/5")
    assert not (workdir / "vqvae/done.json").exists()
    run_and_kill(workdir, "dataset/part-00001.json")
    assert (workdir / "vqvae/done.json").exists()
    assert not json.loads((workdir / "dataset/metadata.json").read_text())["complete"]
    run_and_kill(workdir, "dit/checkpoints/5")
    assert not (workdir / "dit/done.json").exists()
    run_to_the_end(workdir)
    return workdir


def test_killed_in_every_stage_and_run_again_everything_is_there(workdir):
    for stage in ("vqvae", "dit"):
        assert logged_steps(workdir, stage) == list(range(5, 65, 5))
        assert (workdir / stage / "checkpoints" / "60").is_dir()
    metadata = json.loads((workdir / "dataset/metadata.json").read_text())
    assert metadata["complete"]
    assert metadata["n_rows"] == 48 * 3
    assert metadata["counts"]["kept"] == 48
    assert json.loads((workdir / "vqvae/reconstruction.json").read_text())["step"] == 60
    prompts = json.loads((workdir / "dit/samples/step000060/prompts.json").read_text())
    assert all((workdir / "dit/samples/step000060" / p["file"]).stat().st_size for p in prompts)
    fidelity = json.loads((workdir / "fidelity.json").read_text())
    for group in ("seen", "held_out"):
        assert set(fidelity[group]) == {"all", "color", "shape", "direction"}
    assert fidelity["n_samples"] == {"seen": 40, "held_out": 8}
    assert {"vqvae", "preprocess", "dit"} <= set(fidelity["seconds"])
    assert "<video" in (workdir / "report.html").read_text()


def test_run_once_more_every_stage_is_skipped(workdir):
    before = {
        path: path.stat().st_mtime_ns
        for part in ("shapes", "vqvae", "dataset", "dit", "text_model")
        for path in (workdir / part).rglob("*")
        if path.is_file()
    }
    output = run_to_the_end(workdir)
    assert output.count("done already") >= 5  # shapes twice, vqvae, preprocess, dit, fidelity
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_model_in_the_same_workdir_is_refused(workdir):
    done = subprocess.run(
        [*command(workdir), "--config.vqvae.n_codes=32"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "n_codes=32, there 16" in done.stderr
    assert "Traceback" not in done.stderr


def test_samples_depend_on_the_seed_alone(workdir, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(workdir, tmp_path / f"{name}.mp4", f"--seed={seed}")
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    sample(workdir, tmp_path / "best.mp4", "--best")


def test_other_sizes_and_gifs(workdir, tmp_path):
    sample(workdir, tmp_path / "out.gif", "--frames=12", "--height=48", "--fps=4")
    from opensora_jax.data import video_io

    info = video_io.probe(tmp_path / "out.gif")
    assert (info.height, info.width) == (48, 32)
    error = sample(workdir, tmp_path / "bad.mp4", "--height=30", expect=1)
    assert "height=30: expected a positive multiple of 8" in error
    assert not (tmp_path / "bad.mp4").exists()
