"""Sampling from a DiT of random weights: its defaults, and mistakes told before anything runs."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from opensora_jax import cli, sample
from opensora_jax import mesh as mesh_lib
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.data import video_io
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.models.dit import PLAIN
from opensora_jax.tasks.dit import DiTTask

ROOT = Path(__file__).parents[1]
VQVAE = Path(__file__).parent / "golden" / "videogpt_stride4x4x4.ckpt"
DIT = {
    "depth": 1,
    "width": 16,
    "heads": 1,
    "channels": 16,
    "out_channels": 16,
    "patch": 2,
    "text_width": 16,
    "text_mode": "cross_attention",
}


def write_dit(workdir, config, **dit):
    """A DiT as the stage `dit` leaves it, `config` being what its checkpoint says of its own."""
    text_model = workdir / "text_model"
    make_small_text_model(text_model, ["a red circle"], width=16, depth=1, heads=1)
    description = {
        "dit": DIT | dit,
        "latent_grid": [2, 4, 4],
        "text_length": 8,
        "objective": "flow",
        "time_shift": 1.0,
        "prediction": "velocity",
        "latent_table": [[(i * j % 7) - 3.0 for j in range(16)] for i in range(64)],
        "vqvae": str(VQVAE),
        "text_model": str(text_model),
        "fps": 8.0,
        "downsample": [4, 4, 4],
    }
    folder = workdir / "dit"
    checkpoint.record_model(folder, description)
    shapes, _ = jax.eval_shape(Generator.load(folder).task.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.5 * rng.standard_normal(x.shape, np.float32), shapes)
    checkpoints = checkpoint.Checkpoints(folder, config=config)
    checkpoints.save(4, {"ema": params})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    settings = {"steps": 2, "guidance": 3.0, "ancestral": False, "prompts": []}  # as it was
    return write_dit(tmp_path_factory.mktemp("run"), {"sample": settings, "seed": 0})


def settings(folder, *argv):
    return sample._settings(sample._parser().parse_args(["--workdir=w", *argv]), folder)


def test_defaults_are_those_of_the_training(workdir, tmp_path):
    folder = workdir / "dit"
    expected = sample.DEFAULTS | {"steps": 2, "guidance": 3.0}
    assert settings(folder) == expected
    given = ("--steps=7", "--guidance=1.5", "--sampler=heun", "--guidance_to=0.8")
    changes = {"steps": 7, "guidance": 1.5, "sampler": "heun", "guidance_to": 0.8}
    assert settings(folder, *given) == expected | changes
    # And of models that say nothing of it, or have no checkpoint, of the default configuration.
    checkpoints = checkpoint.Checkpoints(tmp_path, config={"seed": 0, "dit": {"steps": 4}})
    checkpoints.save(4, {"ema": {"x": np.zeros(3)}})
    checkpoints.close()
    expected = default.get_config().sample.to_dict()
    expected.pop("prompts")
    assert settings(tmp_path) == settings(tmp_path / "nothing") == expected == sample.DEFAULTS


def test_what_was_called_ancestral_is_a_sampler(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, config={"sample": {"ancestral": True}})
    checkpoints.save(4, {"ema": {"x": np.zeros(3)}})
    checkpoints.close()
    assert settings(tmp_path)["sampler"] == "ancestral"


def test_a_resumed_training_may_change_them(tmp_path):
    for step, n in ((4, 2), (8, 3)):
        checkpoints = checkpoint.Checkpoints(tmp_path, config={"sample": {"steps": n}})
        checkpoints.save(step, {"ema": {"x": np.zeros(3)}})
        checkpoints.close()
        assert settings(tmp_path)["steps"] == n


def test_a_prompt_to_a_video(workdir, tmp_path):
    videos = []
    for name, more in (("a", []), ("b", ["--steps=2", "--guidance=3", "--sampler=euler"])):
        output = tmp_path / f"{name}.mp4"
        sample.main([f"--workdir={workdir}", "--prompt=a red circle", f"--output={output}", *more])
        videos.append(output.read_bytes())
    assert videos[0] == videos[1]
    assert video_io.probe(output).fps == 8


def on(workdir, sizes, n_devices):
    """Videos of three prompts, drawn on a mesh of these sizes."""
    mesh = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1) | sizes, jax.devices()[:n_devices])
    generator = Generator(DiTDescription.read(workdir / "dit"), mesh=mesh)
    params = generator.restore(workdir / "dit")
    prompts = ["a red circle", "a circle", "red"]
    return params, generator.sample(prompts, params=params, sampling=Sampling(3, 3.0), seed=1)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_many_devices_hold_a_part_each_and_draw_the_same(workdir, sizes):
    _, expected = on(workdir, {}, 1)
    params, videos = on(workdir, sizes, 8)
    np.testing.assert_array_equal(videos, expected)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(params))
    assert held < 0.5 * sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_processes_draw_together_and_the_first_writes(workdir, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "opensora_jax.sample", f"--workdir={workdir}", "--prompt=red"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    runs = [environment, *(environment | many | {"JAX_PROCESS_ID": str(i)} for i in range(2))]
    processes = [
        subprocess.Popen([*command, f"--output={tmp_path / f'{i}.mp4'}"], env=run, cwd=ROOT)
        for i, run in enumerate(runs)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mp4", "1.mp4"]
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()


def test_weights_are_in_the_dtype_of_compute(workdir):
    description = DiTDescription.read(workdir / "dit")
    execution = dataclasses.replace(PLAIN, dtype=jnp.dtype(jnp.bfloat16))
    task = DiTTask(description.dit, description.latents, description.objective, execution=execution)
    generator = Generator(description, task)
    params = generator.restore(workdir / "dit")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    video = generator.sample(["red"], params=params, sampling=Sampling(2, 3.0), seed=1)
    assert video.shape == (1, 8, 16, 16, 3)


def test_prompts_of_a_file_at_another_size_and_rate(workdir, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\n\n  a circle  \n".encode())
    output = tmp_path / "new" / "out.gif"
    prompts = f"--prompts_file={tmp_path / 'prompts.txt'}"
    sample.main([f"--workdir={workdir}", prompts, f"--output={output}", "--height=8", "--fps=4"])
    written = sorted(output.parent.iterdir())
    assert [path.name for path in written] == ["out-00.gif", "out-01.gif"]
    info = video_io.probe(written[0])
    assert (info.height, info.width) == (8, 16)


@pytest.mark.parametrize("argument", ["--frames=16", "--height=24", "--width=32"])
def test_sizes_beyond_the_training_are_refused(workdir, tmp_path, capsys, argument):
    argv = [f"--workdir={workdir}", "--prompt=red", f"--output={tmp_path / 'out.mp4'}", argument]
    message = error_of(capsys, *argv)
    assert argument.removeprefix("--") in message
    assert "trained on up to 8 frames of 16 x 16 and knows no positions beyond" in message
    assert not list(tmp_path.iterdir())


def test_between_sizes_of_the_training_there_are_others(workdir):
    generator = Generator.load(workdir / "dit")
    grids = ((2, 4, 4), (2, 2, 8), (2, 8, 2), (1, 6, 6))
    generator._description = dataclasses.replace(generator._description, latent_grids=grids)
    assert generator.latent_grid(8, 16, 16) == (2, 4, 4)
    assert generator.latent_grid(8, 8, 24) == (2, 2, 6)  # of no trained aspect ratio
    assert generator.latent_grid(4, 16, 32) == (1, 4, 8)
    # Of no one of these sizes a part, and still of some length.
    assert [generator.longest(*size) for size in ((16, 16), (8, 24), (16, 32))] == [2, 2, 1]
    for size in ((8, 16, 24), (8, 24, 24), (4, 8, 40), (12, 8, 8)):
        with pytest.raises(ValueError, match="expected no more of any, and no more in all"):
            generator.latent_grid(*size)


def error_of(capsys, *argv):
    """What the command says and its exit status: a message stands for 1."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: sample.main(argv))
    if stop.value.code == 2:
        return capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code.startswith("error: ")
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize("fps", ["inf", "nan", "1e300", "100000", "0", "-1", "1e-9"])
def test_rates_are_bounded(fps, capsys):
    message = error_of(capsys, "--workdir=w", "--prompt=a", f"--fps={fps}")
    assert f"--fps: {fps}: expected one from 0.01 to 1000" in message


@pytest.mark.parametrize("argument", ["--seed=-1", f"--seed={2**32}", "--steps=0", "--guidance=0"])
def test_other_numbers_too(argument, capsys):
    assert argument.split("=")[0] in error_of(capsys, "--workdir=w", "--prompt=a", argument)


def test_outputs_that_cannot_be_written_are_told_before_anything_is_loaded(tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "out-01.mp4").mkdir()
    (tmp_path / "file").touch()
    # No such workdir: what is told of the output comes first.
    start = [f"--workdir={tmp_path / 'nowhere'}", "--prompt=a"]
    for more, message in [
        (["--output", tmp_path / "folder.mp4"], "folder.mp4: a folder, expected the name of"),
        (["--prompt=b", "--output", tmp_path / "out.mp4"], "out-01.mp4: a folder"),
        (["--output", tmp_path / "file" / "out.mp4"], f"{tmp_path / 'file'}"),
        (["--output", "/proc/out.mp4"], "/proc"),
        (["--output", tmp_path / f"{'x' * 300}.mp4"], "File name too long"),
        (["--output", tmp_path / "out.avi"], "expected a name that ends in .mp4 or .gif"),
    ]:
        assert message in error_of(capsys, *start, *map(str, more))


def test_prompts_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "latin1.txt").write_bytes("ein Kreis f\xe4llt".encode("latin1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, message in [
        ("latin1.txt", "latin1.txt: not UTF-8 text (invalid continuation byte at byte 11)"),
        ("missing.txt", "missing.txt"),
        (".", "Is a directory"),
        ("blank.txt", "--prompt: expected at least one"),
    ]:
        argv = ["--workdir=w", "--prompts_file", str(tmp_path / name)]
        assert message in error_of(capsys, *argv)


def test_a_workdir_without_a_dit(workdir, tmp_path, capsys):
    (tmp_path / "dit").mkdir()
    other = tmp_path / "other" / "dit"
    other.mkdir(parents=True)
    (other / "model.json").write_text(json.dumps({"n_codes": 4}))
    for folder, message in [
        (tmp_path / "nowhere", "nowhere: no such folder"),
        (tmp_path, "no DiT was trained here"),
        (workdir / "dit", f"did you mean {workdir}?"),
        (other.parent, f"{other}: holds another model than a DiT"),
    ]:
        argv = [f"--workdir={folder}", "--prompt=a", f"--output={tmp_path / 'out.mp4'}"]
        assert message in error_of(capsys, *argv)
    assert not (tmp_path / "out.mp4").exists()


def test_no_checkpoint_in_the_folder(workdir, tmp_path, capsys):
    (tmp_path / "dit").mkdir()
    (tmp_path / "dit" / "model.json").write_bytes((workdir / "dit" / "model.json").read_bytes())
    argv = [f"--workdir={tmp_path}", "--prompt=a", f"--output={tmp_path / 'out.mp4'}"]
    assert f"{tmp_path / 'dit' / 'checkpoints'}: no checkpoint" in error_of(capsys, *argv)
