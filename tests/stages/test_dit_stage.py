"""The dit stage, divided over eight devices, started from a checkpoint of facebookresearch/DiT."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from configs import default
from opensora_jax import mesh as mesh_lib
from opensora_jax import rngs
from opensora_jax.convert import torch_file
from opensora_jax.convert.dit import open_blocks
from opensora_jax.data import dataset
from opensora_jax.data.dataset import write_part
from opensora_jax.stages import common
from opensora_jax.stages import dit as stage
from opensora_jax.tasks.dit import Latents
from opensora_jax.train import checkpoint
from opensora_jax.train import state as state_lib

CHECKPOINT = Path(__file__).parents[1] / "golden" / "dit_tiny.pt"
N_CODES, DIM, TEXT_WIDTH = 16, 4, 6
METADATA = {
    "downsample": [2, 2, 2],
    "vqvae": "no_vqvae",  # so no sample videos
    "vqvae_fingerprint": "abc",
    "text_model": "no_text_model",
    "resolution": [8, 8],
}


def write_dataset(folder):
    rng = np.random.default_rng(0)
    rows = [
        {
            "video_file": f"video{i}.mp4",
            "caption": f"caption {i}",
            "fps": 8.0,
            "video_latent_states": rng.integers(0, N_CODES, (2, 4, 4)),
            "text_latent_states": rng.normal(size=(3, TEXT_WIDTH)).astype(np.float32),
        }
        for i in range(16)
    ]
    write_part(folder, 0, rows, N_CODES, {"kept": 16, "filtered": [], "failed": []})
    dataset.finish_dataset(folder, METADATA, rng.normal(size=(N_CODES, DIM)).astype(np.float32))


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


def test_weights_and_averages_start_from_the_checkpoint_and_are_divided():
    config = make_config("", optimizer="muon", steps=10)
    latents = Latents(np.eye(DIM, dtype=np.float32), np.ones(DIM))
    sizes = {"grid": (2, 4, 4), "text_length": 3, "text_width": TEXT_WIDTH}
    training = common.dit_training(config, latents, **sizes)
    blocks = open_blocks(CHECKPOINT, common.dit_maker(training.dit, dtype="float32"))()
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


def test_what_does_not_fit_is_told_before_the_folder_is_claimed(data, tmp_path):
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
    arguments = checkpoint.read_description(tmp_path / "dit")["dit"]
    model = nnx.eval_shape(lambda: common.dit_maker(arguments, dtype="float32")(nnx.Rngs(0)))
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


def test_tokens_divide_over_the_context_axis(tmp_path):
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
