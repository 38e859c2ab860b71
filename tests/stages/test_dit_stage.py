"""The dit stage: over eight devices, from facebookresearch/DiT's weights, with each objective."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from flax import nnx

from configs import default
from opensora_jax import files, rngs
from opensora_jax import mesh as mesh_lib
from opensora_jax.build import training as build
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.convert import torch_file
from opensora_jax.convert.dit import open_blocks
from opensora_jax.data import dataset, dataset_writer
from opensora_jax.data.dataset_writer import write_part
from opensora_jax.diffusion.sampling import Sampling
from opensora_jax.inference.generator import DiTDescription, Generator
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import decode, load_tokenizer
from opensora_jax.models.dit import DiT
from opensora_jax.stages import dit as stage
from opensora_jax.tasks.dit import Latents
from opensora_jax.train import state as state_lib

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT, VQVAE_PATH = GOLDEN / "dit_tiny.pt", GOLDEN / "videogpt_stride4x4x4.ckpt"
N_CODES, DIM, TEXT_WIDTH = 16, 4, 6
METADATA = {
    "downsample": [2, 2, 2],
    "vqvae": "no_vqvae",  # so no sample videos
    "vqvae_fingerprint": "abc",
    "text_model": "no_text_model",
    "resolution": [8, 8],
}


def write_dataset(folder, grid=(2, 4, 4), **metadata):
    rng = np.random.default_rng(0)
    rows = [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": rng.integers(0, N_CODES, grid),
            "text_latent_states": rng.normal(size=(3, TEXT_WIDTH)).astype(np.float32),
        }
        for i in range(16)
    ]
    write_part(folder, 0, rows, N_CODES, {"kept": 16, "filtered": [], "failed": []})
    codebook = np.random.default_rng(1).normal(size=(N_CODES, DIM)).astype(np.float32)
    resolution = [2 * n for n in grid[1:]]
    dataset_writer.finish_dataset(
        folder, METADATA | {"resolution": resolution} | metadata, codebook
    )


def make_config(data, **given):
    c = default.get_config()
    c.data.dataset = str(data)
    c.mesh.update({"data": 2, "fsdp": 2, "tensor": 2})
    c.dit.update(
        {
            "size": "",
            "depth": 2,
            "width": 48,
            "heads": 4,
            "batch_size": 8,
            "validation_share": 0.0,
            "remat": "none",
            "warmup_steps": 0,
            "init_from": str(CHECKPOINT),
        }
    )
    c.dit.update(given)
    return c


def check_blocks(params, atol=0.0):
    """That these parameters are the checkpoint's where it has any, and new where not."""
    tensors, blocks = torch_file.load(CHECKPOINT), params["blocks"]
    for i in range(2):
        qkv = np.split(tensors[f"blocks.{i}.attn.qkv.weight"], 3)
        for name, weight in zip(("query", "key", "value"), qkv, strict=True):
            assert_close(blocks["attention"][name]["kernel"][i], weight.T, atol)
        bias = tensors[f"blocks.{i}.adaLN_modulation.1.bias"]
        assert_close(blocks["modulation"]["bias"][i], bias, atol)
    assert_close(params["time_in"]["bias"], tensors["t_embedder.mlp.0.bias"], atol)
    assert_close(blocks["attention"]["query_norm"]["scale"], 1, atol)
    assert_close(blocks["cross_attention"]["out"]["kernel"], 0, atol)
    assert_close(params["final"]["kernel"], 0, atol)
    assert np.std(params["patch_embedding"]["kernel"]) > 0.05


def assert_close(a, b, atol):
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder)
    return folder


def test_weights_and_averages_start_from_the_checkpoint_and_are_sharded():
    config = make_config("", optimizer="muon", steps=10)
    latents = Latents(np.eye(DIM, dtype=np.float32))
    sizes = {"grid": (2, 4, 4), "text_length": 3, "text_width": TEXT_WIDTH}
    training = build.dit_training(config, latents, **sizes)
    blocks = open_blocks(CHECKPOINT, training.task.config)()
    mesh = mesh_lib.make_mesh(config.mesh)
    state, shardings = state_lib.create(
        training.task, training.tx, mesh, rngs.key(0, "init"), blocks
    )
    for params in (state.params, state.ema):
        check_blocks(params)
    for array, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding == sharding
    kernel = state.ema["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4


@pytest.mark.slow
def test_a_dataset_that_is_streamed_trains_the_same(data, tmp_path):
    lines = {}
    for name in ("resident", "streamed"):
        sizes = {"depth": 1, "width": 24, "heads": 2}
        config = make_config(data, steps=4, log_every=2, init_from="", **sizes)
        config.mesh.update({"data": 8, "fsdp": 1, "tensor": 1})
        config.data.stream = name == "streamed"
        config.data.cache_dir = str(tmp_path / "cache")
        stage.run(config, tmp_path / name)
        text = (tmp_path / name / "dit" / "metrics.jsonl").read_text()
        lines[name] = [json.loads(line) for line in text.splitlines()]
    for one, other in zip(lines["resident"], lines["streamed"], strict=True):
        assert one.keys() - {"evaluation_seconds"} <= other.keys()
        for key in ("loss", "grad_norm"):
            assert one.get(key) == other.get(key)
    speeds = [line for line in lines["streamed"] if "loss" in line]
    assert all(line["rows_needed_per_second"] > 0 for line in speeds)
    assert speeds[0]["rows_read_per_second"] > 0
    assert {"store_retries", "cache_share"} <= speeds[0].keys()
    assert not any("rows_read_per_second" in line for line in lines["resident"])


def test_one_model_learns_several_sizes(data, tmp_path):
    write_dataset(tmp_path / "wide", (4, 4, 6))
    names = f"{data},{tmp_path / 'wide'}"
    sizes = {"n_latent_frames": (1, 2), "batch_size": 4, "log_every": 1, "init_from": ""}
    config = make_config(names, steps=30, validation_share=0.2, **sizes)
    stage.run(config, tmp_path / "run")
    folder = tmp_path / "run" / "dit"
    description = DiTDescription.read(folder)
    assert description.latent_grids == [[1, 4, 4], [2, 4, 4], [1, 4, 6], [2, 4, 6]]
    assert description.dit.extent == [2, 2, 3]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 31))
    assert any("validation_loss" in line for line in lines)
    # And goes on, as it was.
    config.dit.steps = 32
    stage.run(config, tmp_path / "run")
    assert checkpoint.latest_step(folder) == 32


def test_a_folder_of_buckets_is_trained_on_whole_each_at_its_own_length(tmp_path):
    grids = {"4x8x16": (2, 4, 8), "4x16x8": (2, 8, 4), "1x12x12": (1, 6, 6), "6x8x8": (3, 4, 4)}
    for name, grid in grids.items():
        write_dataset(tmp_path / name, grid, window=4, settings={"bucket": name})
    config = make_config(tmp_path, validation_share=0.0)
    listed = {"complete": False, "datasets": list(grids)}
    files.write_json(tmp_path / "buckets.json", listed)
    with pytest.raises(ValueError, match=r'buckets\.json: no "complete": true: not finished'):
        stage.run(config, tmp_path / "run")
    files.write_json(tmp_path / "buckets.json", {**listed, "complete": True})
    sets = [dataset.open_dataset(path) for path in build.dataset_folders(config, tmp_path)]
    lengths, mesh = stage._lengths(config.dit, sets, None), mesh_lib.make_mesh(config.mesh)
    training, validation = stage._buckets(config.dit, sets, lengths, mesh)
    assert [bucket.grid for bucket in training] == list(grids.values())
    assert not validation
    # Batches of about as many tokens, on four devices.
    assert [bucket.batch_size for bucket in training] == [8, 8, 12, 8]
    for asked, expected in ((2, [[2], [2], [1], [2]]), ((1, 3), [[1, 2], [1, 2], [1], [1, 3]])):
        config.dit.n_latent_frames = asked
        assert stage._lengths(config.dit, sets, None) == expected


def test_sizes_of_one_training_have_one_tokenizer(data, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, vqvae_fingerprint="another")
    with pytest.raises(ValueError, match=r"vqvae_fingerprint=.*another.*expected .*abc"):
        stage.run(make_config(f"{data},{other}", init_from=""), tmp_path / "run")


def test_what_does_not_fit_is_told_before_anything_is_written(data, tmp_path):
    with pytest.raises(ValueError, match="depth 2 and width 48, expected depth 3 and width 48"):
        stage.run(make_config(data, depth=3), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing_here\.pt"):
        stage.run(make_config(data, init_from="nothing_here.pt"), tmp_path)
    assert not (tmp_path / "dit").exists()


def restore(workdir, like):
    """The step of the last checkpoint, and its weights and averaged weights."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
    with contextlib.closing(checkpoint.Checkpoints(workdir / "dit")) as checkpoints:
        step = checkpoints.latest_step
    return step, checkpoint.restore_items(workdir / "dit", {"params": like, "ema": like})


@pytest.mark.slow
def test_a_resumed_training_does_not_start_again(data, tmp_path):
    stage.run(make_config(data, steps=3, learning_rate=0.01), tmp_path)
    config = DiTDescription.read(tmp_path / "dit").dit
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    like = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    step, trained = restore(tmp_path, like)
    assert step == 3
    for params in trained.values():
        check_blocks(params, atol=0.05)  # a step of Adam moves each weight by a hundredth
    with pytest.raises(AssertionError):
        check_blocks(trained["params"], atol=0.005)
    # Steps that move nothing: what was trained before is still there.
    stage.run(make_config(data, steps=4, learning_rate=1e-9), tmp_path)
    step, resumed = restore(tmp_path, like)
    assert step == 4
    jax.tree.map(functools.partial(assert_close, atol=1e-6), trained["params"], resumed["params"])


def test_two_columns_are_enough_and_the_length_suits_most_of_the_data(tmp_path, caplog):
    """Of a dataset that others wrote, of videos of many lengths; samples show its own texts."""
    caplog.set_level("INFO", "opensora_jax")
    rng = np.random.default_rng(0)
    frames = [1] + [4] * 8 + [5] * 31
    columns = {
        "video_latent_states": [rng.integers(0, 64, (n, 4, 4)).tolist() for n in frames],
        "text_latent_states": [rng.normal(size=(3, 16)).tolist() for _ in frames],
    }
    data = tmp_path / "data"
    datasets.Dataset.from_dict(columns).save_to_disk(data)
    np.save(data / "codebook.npy", np.asarray(load_tokenizer(VQVAE_PATH).codebook))
    make_small_text_model(tmp_path / "text", ["a"], width=16, depth=1, heads=1)
    metadata = {
        "codebook": "codebook.npy",
        "n_codes": 64,
        "downsample": [4, 4, 4],
        "vqvae": str(VQVAE_PATH),
        "text_model": str(tmp_path / "text"),
        "text_width": 16,
        "resolution": [16, 16],
        "fps": 8,
    }
    (data / "metadata.json").write_text(json.dumps(metadata))
    given = {"steps": 1, "depth": 1, "width": 16, "heads": 2, "validation_share": 0.2}
    config = make_config(data, init_from="", eval_every=1, **given)
    config.sample.steps = 1
    stage.run(config, tmp_path / "run")
    assert DiTDescription.read(tmp_path / "run" / "dit").latent_grid == [4, 4, 4]
    assert "dit.n_latent_frames is 4, which suits most of the data" in caplog.text
    assert "1 of 40 rows are shorter and left out" in caplog.text
    (samples,) = (tmp_path / "run" / "dit" / "samples").iterdir()
    prompts = json.loads((samples / "prompts.json").read_text())
    assert len(prompts) == stage.N_PROMPTS
    assert all((samples / p["file"]).exists() and p["prompt"].startswith("row ") for p in prompts)


def test_tokens_are_sharded_over_the_context_axis(tmp_path):
    write_dataset(tmp_path / "data")
    # 8 tokens of video and 3 of text.
    c = make_config(tmp_path / "data", init_from="", text_mode="in_context")
    c.mesh.update({"data": 2, "fsdp": 2, "context": 2, "tensor": 1})
    message = (
        r"mesh\.context=2: expected a divisor of the 8 tokens of a 2x4x4 grid .* and 3 of text"
    )
    with pytest.raises(ValueError, match=message):
        stage.run(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_window_travels_from_the_dataset_to_the_model_and_older_models_go_on(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    metadata = json.loads((data / "metadata.json").read_text())
    dataset_writer.write_metadata(tmp_path / "data", metadata | {"window": 4})
    config = make_config(tmp_path / "data", init_from="", steps=1)
    stage.run(config, tmp_path)
    found = checkpoint.read_model(tmp_path / "dit")
    assert found["window"] == DiTDescription.read(tmp_path / "dit").window == 4
    del found["window"]
    (tmp_path / "dit" / "model.json").write_text(json.dumps(found))
    config.dit.steps = 2
    stage.run(config, tmp_path)
    assert DiTDescription.read(tmp_path / "dit").window is None
    dataset_writer.write_metadata(tmp_path / "data", metadata | {"window": 3})
    config.dit.steps = 3
    with pytest.raises(ValueError, match=r"window=3: expected the frames .* a multiple of 2"):
        stage.run(config, tmp_path)


def test_more_components_than_there_are_are_all_also_when_gone_on_with(data, tmp_path):
    config = make_config(data, init_from="", components=DIM + 3, steps=1)
    stage.run(config, tmp_path)
    config.dit.steps = 2
    stage.run(config, tmp_path)
    assert DiTDescription.read(tmp_path / "dit").latents.channels == DIM
    found = checkpoint.read_model(tmp_path / "dit")
    (tmp_path / "dit" / "model.json").write_text(json.dumps(found | {"dit": {"a": 1}}))
    with pytest.raises(ValueError, match=r"model\.json: not what this version writes of a DiT"):
        DiTDescription.read(tmp_path / "dit")


def test_a_training_of_ddpm_from_before_it_had_predictions_goes_on(data, tmp_path):
    config = make_config(data, init_from="", objective="ddpm", prediction="noise", steps=1)
    stage.run(config, tmp_path)
    found = checkpoint.read_model(tmp_path / "dit")
    assert found["prediction"] == "noise"
    older = json.dumps(found | {"prediction": "velocity"})
    (tmp_path / "dit" / "model.json").write_text(older)
    config.dit.update(steps=2, prediction="auto")
    stage.run(config, tmp_path)
    assert checkpoint.latest_step(tmp_path / "dit") == 2
    assert (tmp_path / "dit" / "model.json").read_text() == older


def write_two_videos(folder):
    """A dataset of two tiny videos, many times over, so that epochs, which take time, are few.

    Returns:
      Their captions and codes.
    """
    captions = ["a red circle", "a blue square"]
    codes = np.random.default_rng(1).integers(N_CODES, size=(2, 1, 2, 2))
    make_small_text_model(folder / "text", captions, width=TEXT_WIDTH, depth=1, heads=1)
    features = TextEncoder(folder / "text").encode(captions)
    rows = [
        {
            "video_file": f"{caption}.mp4",
            "caption": caption,
            "fps": 8.0,
            "video_latent_states": c,
            "text_latent_states": f,
        }
        for caption, c, f in zip(captions, codes, features, strict=True)
    ]
    counts = {"kept": 2, "filtered": [], "failed": []}
    write_part(folder, 0, rows * 256, N_CODES, counts)
    paths = {"vqvae": str(VQVAE_PATH), "text_model": str(folder / "text"), "downsample": [4, 4, 4]}
    corners = np.stack(np.meshgrid(*[[-1.0, 1.0]] * DIM), axis=-1).reshape(N_CODES, DIM)
    dataset_writer.finish_dataset(folder, METADATA | paths, corners.astype(np.float32))
    return captions, codes


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ddpm", "masked", "metric"])
def test_each_objective_learns_two_videos_and_samples_them(tmp_path, objective):
    captions, codes = write_two_videos(tmp_path / "dataset")
    sampler = "ancestral" if objective == "ddpm" else "auto"
    fields = f"""
        dit.objective={objective} sample.sampler={sampler} dit.size= dit.depth=1 dit.width=64
        dit.heads=2 dit.text_mode=in_context dit.validation_share=0 dit.batch_size=32
        dit.steps=300 dit.learning_rate=5e-3
        dit.warmup_steps=0 dit.ema_decay=0.95 dit.remat=none dit.checkpoint_every=300
        sample.guidance=1
    """
    command = [sys.executable, "-m", "opensora_jax.main", "--config=configs/default.py"]
    command += [f"--workdir={tmp_path}", "--config.stages=('dit',)"]
    command += [f"--config.{field}" for field in fields.split()]
    # On one device: with eight, 300 steps take longer than all the rest.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "dit"
    assert len(list((folder / "samples" / "step000300").glob("*.mp4"))) == 2

    generator = Generator.load(folder)
    videos = generator.sample(
        captions * 4, params=generator.restore(folder), sampling=Sampling(30, 1.0), seed=0
    )
    expected = decode(load_tokenizer(VQVAE_PATH), codes)
    assert (expected[0] != expected[1]).any()
    same = (videos == np.tile(expected, (4, 1, 1, 1, 1))).all(axis=(1, 2, 3, 4))
    assert same.sum() >= 6

    description = checkpoint.read_model(folder)
    channels, out = (description["dit"][name] for name in ("channels", "out_channels"))
    assert (channels, out) == {
        "ddpm": (DIM, 2 * DIM),
        "masked": (DIM + 1, out),
        "metric": (DIM, out),
    }[objective]
    assert description["dit"]["n_codes"] == (None if objective == "ddpm" else N_CODES)
    config = make_config(tmp_path / "dataset", init_from="", depth=1)
    with pytest.raises(
        ValueError, match=f"other settings: .*objective='flow', there '{objective}'"
    ):
        stage.run(config, tmp_path)
