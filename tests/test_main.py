"""All stages of the shipped quickstart at toy size, also stopped and killed for real in each."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from configs import quickstart
from opensora_jax import files, main
from opensora_jax.config import STAGES

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow

TOY = """
    vqvae.n_codes=16 vqvae.n_hiddens=8 vqvae.n_res_layers=0
    dit.depth=1 dit.width=16 dit.heads=1 dit.unroll=1 dit.batch_size=8 dit.validation_share=0.2
    sample.steps=2
"""
# Two steps of each training: what takes the time is to compile.
SHORT = """
    shapes.n_videos=24 shapes.n_held_out=4 preprocess.batch_size=8
    vqvae.steps=2 vqvae.log_every=1 vqvae.checkpoint_every=1
    dit.steps=2 dit.log_every=1 dit.checkpoint_every=1
    fidelity.n_samples=8 fidelity.batch_size=4
"""
# Long enough to be killed in.
LONG = """
    shapes.n_videos=48 shapes.n_held_out=8 preprocess.videos_per_part=4 preprocess.batch_size=4
    vqvae.steps=60 vqvae.log_every=5 vqvae.eval_every=30 vqvae.checkpoint_every=5
    dit.steps=60 dit.log_every=5 dit.eval_every=30 dit.checkpoint_every=5
    fidelity.n_samples=48
"""


def environment(**variables):
    """One device: the eight of the suite would only make this slower."""
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **variables}


def command(workdir, overrides=TOY + LONG, config="quickstart"):
    return [
        *(sys.executable, "-m", "opensora_jax.main"),
        *(f"--config=configs/{config}.py", f"--workdir={workdir}"),
        *(f"--config.{override}" for override in overrides.split()),
    ]


def run_to_the_end(workdir, overrides=TOY + LONG, config="quickstart", **variables):
    done = subprocess.run(
        command(workdir, overrides, config),
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def run_and_stop(workdir, appears, number=signal.SIGKILL, overrides=TOY + LONG):
    """Starts the job and sends it a signal as soon as a file `appears`; returns its exit status."""
    process = subprocess.Popen(
        command(workdir, overrides),
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
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert "Traceback" not in errors
    return process.returncode


def written(workdir):
    """When each file of the stages, but the report, was written."""
    parts = ("shapes", "vqvae", "text_model", "dataset", "dit")
    paths = [path for part in parts for path in (workdir / part).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in paths}


def seconds(workdir):
    return json.loads((workdir / "seconds.json").read_text())


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


# --------------------------------------------------------------------------------- in a minute


def test_all_stages_of_quickstart_and_once_more(tmp_path):
    compile_fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    run_to_the_end(tmp_path, TOY + SHORT, **compile_fast)
    assert len(list((tmp_path / "shapes" / "train" / "videos").glob("*.mp4"))) == 24
    for stage in ("vqvae", "dit"):
        assert logged_steps(tmp_path, stage) == [1, 2]
        assert (tmp_path / stage / "checkpoints" / "2").is_dir()
    assert json.loads((tmp_path / "vqvae/reconstruction.json").read_text())["step"] == 2
    metadata = json.loads((tmp_path / "dataset/metadata.json").read_text())
    assert metadata["complete"]
    assert metadata["n_rows"] == 24 * 3
    prompts = json.loads((tmp_path / "dit/samples/step000002/prompts.json").read_text())
    assert prompts[0]["prompt"] == "a red circle moves to the left"
    assert all((tmp_path / "dit/samples/step000002" / p["file"]).stat().st_size for p in prompts)
    fidelity = json.loads((tmp_path / "fidelity.json").read_text())
    assert fidelity["n_samples"] == {"seen": 6, "held_out": 2}
    assert set(fidelity["seconds"]) == set(STAGES)
    assert "<video" in (tmp_path / "report.html").read_text()

    before = written(tmp_path)
    output = run_to_the_end(tmp_path, TOY + SHORT, **compile_fast)
    assert output.count("done already") == 6  # the two splits of shapes, and four stages
    assert written(tmp_path) == before


def test_time_until_sigterm_counts(tmp_path):
    overrides = "stages=shapes shapes.n_videos=100000"
    status = run_and_stop(tmp_path, "shapes/train/videos/video9.mp4", signal.SIGTERM, overrides)
    assert status == 0
    first = seconds(tmp_path)["shapes"]
    assert first > 0
    run_and_stop(tmp_path, "shapes/train/videos/video99.mp4", signal.SIGTERM, overrides)
    assert seconds(tmp_path)["shapes"] > first


def test_time_until_an_error_counts(tmp_path):
    files.write_json(tmp_path / "seconds.json", {"shapes": 100.0})
    (tmp_path / "shapes" / "train").mkdir(parents=True)
    files.write_json(tmp_path / "shapes" / "train" / "params.json", {"n_videos": 1})
    c = quickstart.get_config()
    c.stages = ("shapes",)
    with pytest.raises(ValueError, match="made with other settings"):
        main.run(c, epath.Path(tmp_path))
    assert seconds(tmp_path)["shapes"] >= 100.0


# -------------------------------------------------------------------- stopped and killed: minutes


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir whose job was killed in each long stage, and then ran to the end."""
    workdir = tmp_path_factory.mktemp("quickstart")
    assert run_and_stop(workdir, "vqvae/checkpoints/5") == -signal.SIGKILL
    assert not (workdir / "vqvae/done.json").exists()
    assert run_and_stop(workdir, "dataset/part-00001.json") == -signal.SIGKILL
    assert (workdir / "vqvae/done.json").exists()
    assert not json.loads((workdir / "dataset/metadata.json").read_text())["complete"]
    assert run_and_stop(workdir, "dit/checkpoints/5") == -signal.SIGKILL
    assert not (workdir / "dit/done.json").exists()
    assert "dit" not in seconds(workdir)
    assert run_and_stop(workdir, "dit/checkpoints/15", signal.SIGTERM) == 0
    assert seconds(workdir)["dit"] > 0
    run_to_the_end(workdir)
    return workdir


@slow
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


@slow
def test_all_stages_of_the_world_of_scenes(tmp_path):
    overrides = f"{TOY} {SHORT} fidelity.n_samples=10"
    run_to_the_end(tmp_path, overrides, "world", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    reconstruction = json.loads((tmp_path / "vqvae/reconstruction.json").read_text())
    assert "detected_all" in reconstruction
    fidelity = json.loads((tmp_path / "fidelity.json").read_text())
    assert fidelity["n_samples"] == {"seen": 5, "held_out": 5}
    assert fidelity["real"]["all"] == 1.0
    assert list(fidelity["categories"]) == ["motion", "relation", "count", "change", "bounce"]
    assert "what it is about" in (tmp_path / "report.html").read_text()


@slow
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


@slow
def test_samples_depend_on_the_seed_alone(workdir, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample(workdir, tmp_path / f"{name}.mp4", f"--seed={seed}")
    a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    sample(workdir, tmp_path / "best.mp4", "--best")


@slow
def test_smaller_sizes_and_gifs(workdir, tmp_path):
    sample(workdir, tmp_path / "out.gif", "--frames=4", "--height=16", "--fps=4")
    from opensora_jax.data import video_io

    info = video_io.probe(tmp_path / "out.gif")
    assert (info.height, info.width) == (16, 32)
    error = sample(workdir, tmp_path / "bad.mp4", "--height=30", expect=1)
    assert "height=30: expected a positive multiple of 8" in error
    assert not (tmp_path / "bad.mp4").exists()
