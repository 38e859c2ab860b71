"""Checkpoints of facebookresearch/DiT: the same numbers, and a training that starts from one."""

import dataclasses
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from torch_writer import New, save

from opensora_jax.convert import torch_file
from opensora_jax.convert.dit import open_blocks
from opensora_jax.models import layers
from opensora_jax.models.dit import Block, DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "dit_tiny.pt"
DEPTH, WIDTH, HEADS = 2, 48, 4


# A DiT of the checkpoint's sizes; everything around the blocks is of other sizes.
CONFIG = DiTConfig(
    depth=DEPTH, width=WIDTH, heads=HEADS, channels=3, out_channels=3, patch=1, text_width=6
)
# Its blocks have no cross-attention.
ORIGINAL = dataclasses.replace(CONFIG, text_mode="in_context")


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "dit_tiny.npz"))


@pytest.fixture(scope="module")
def tensors():
    return dict(torch_file.load(CHECKPOINT))


@pytest.fixture(scope="module")
def params():
    return open_blocks(CHECKPOINT, ORIGINAL)()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "dit.pt"


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_block_is_the_original_one(params, golden):
    original = {"cross_attention": False, "qk_norm": False}
    graph = nnx.graphdef(nnx.eval_shape(lambda: Block(WIDTH, HEADS, rngs=nnx.Rngs(0), **original)))
    block = jax.jit(lambda weights, x, c: nnx.merge(graph, weights)(x, c))
    for i in range(DEPTH):
        weights = jax.tree.map(lambda w, i=i: w[i], params["blocks"])
        out = block(weights, golden[f"b{i}_x"], golden[f"b{i}_c"])
        # Close enough to tell the approximate GELU from the exact one: a block adds little here.
        np.testing.assert_allclose(out, golden[f"b{i}_out"], atol=2e-6, rtol=0)


def test_the_embedding_of_time_is_the_original_one(params, golden):
    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    embedding = layers.timestep_embedding(golden["t"], 256)
    out = dense("time_out", jax.nn.silu(dense("time_in", embedding)))
    np.testing.assert_allclose(out, golden["t_emb"], atol=1e-5, rtol=0)


def test_what_loads_and_what_starts_fresh_is_logged(caplog):
    caplog.set_level(logging.INFO, "opensora_jax")
    params = open_blocks(CHECKPOINT, CONFIG)()
    assert set(params) == {"time_in", "time_out", "blocks"}
    assert set(params["blocks"]) == {"attention", "mlp", "modulation"}
    assert set(params["blocks"]["attention"]) == {"query", "key", "value", "out"}
    loaded, fresh, unused = (record.getMessage() for record in caplog.records)
    n = sum(x.size for x in jax.tree.leaves(params))
    assert loaded.startswith(f"loaded from {CHECKPOINT}: {n:,} parameters")
    for layer in ("blocks.attention.query 4,704", "blocks.mlp.up 18,816", "time_in 12,336"):
        assert layer in loaded
    for layer in ("patch_embedding", "final", "text_in", "blocks.cross_attention.query",
                  "blocks.attention.query_norm"):  # fmt: skip
        assert f"{layer} " in fresh
        assert f"{layer} " not in loaded
    assert "blocks.mlp" not in fresh
    assert "pos_embed 768" in unused


@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
def test_checkpoints_of_a_training(path, params, tensors, key):
    zeros = {name: np.zeros_like(x) for name, x in tensors.items()}
    others = {"model": zeros} if key == "ema" else {}  # the averaged weights come first
    args = New("argparse.Namespace", {"model": "DiT-XL/2", "global_seed": 0})
    save(path, {**others, key: tensors, "opt": {"state": {0: {"step": 7}}}, "args": args})
    assert_same(open_blocks(path, ORIGINAL)(), params)


def test_other_sizes_are_told_with_both_values(path, tensors):
    for given in ({"depth": 3}, {"width": 64}):
        ours = {"depth": DEPTH, "width": WIDTH} | given
        expected = (
            rf"depth 2 and width 48, expected depth {ours['depth']} and width {ours['width']}"
        )
        with pytest.raises(ValueError, match=rf"dit_tiny\.pt: .*{expected}"):
            open_blocks(CHECKPOINT, dataclasses.replace(CONFIG, **given))


def test_heads_of_a_published_size(path):
    """No shape shows the number of heads; another one would load, and compute something else."""
    sizes = {"depth": 12, "width": 384}
    linears = {
        "t_embedder.mlp.0": (384, 256),
        "t_embedder.mlp.2": (384, 384),
        **{
            f"blocks.{i}.{name}": shape
            for i in range(12)
            for name, shape in {
                "attn.qkv": (1152, 384),
                "attn.proj": (384, 384),
                "mlp.fc1": (1536, 384),
                "mlp.fc2": (384, 1536),
                "adaLN_modulation.1": (2304, 384),
            }.items()
        },
    }
    zeros = np.zeros(2304 * 384, np.float32)
    tensors = {}
    for name, (n_out, n_in) in linears.items():
        tensors |= {
            f"{name}.weight": zeros[: n_out * n_in].reshape(n_out, n_in),
            f"{name}.bias": zeros[:n_out],
        }
    save(path, tensors)
    open_blocks(path, dataclasses.replace(CONFIG, **sizes, heads=6))
    with pytest.raises(ValueError, match=r"dit\.pt: a DiT of 6 heads, the configuration says 12"):
        open_blocks(path, dataclasses.replace(CONFIG, **sizes, heads=12))


def test_wrong_weights_are_named(path, tensors):
    changed = dict(tensors)
    del changed["blocks.1.attn.qkv.bias"]
    changed["blocks.0.attn.q_norm.weight"] = np.ones(12, np.float32)
    changed["blocks.1.mlp.fc1.weight"] = np.zeros((96, 48), np.float32)
    save(path, changed)
    with pytest.raises(ValueError, match=r"dit\.pt: the weights do not fit") as error:
        open_blocks(path, CONFIG)
    message = str(error.value)
    assert message.count("missing 'blocks.1.attn.qkv.bias' (144,)") == 1  # not once for each third
    assert "unexpected 'blocks.0.attn.q_norm.weight'" in message
    assert "'blocks.1.mlp.fc1.weight' has shape (96, 48), expected (192, 48)" in message
    assert message.count(";") == 2  # and nothing else


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1], "holds a list"),
        ({"ema": None}, r"no matrix blocks\.0\.attn\.qkv\.weight"),
        ({"codebook.embeddings": np.zeros((2, 2), np.float32)}, "expected a DiT of facebook"),
        ({"blocks.0.attn.qkv.weight": np.zeros(3, np.float32)}, "no matrix"),
        ({"blocks.0.attn.qkv.weight": np.zeros((3, 1), np.float32), "x": 3}, "'x' is a int"),
    ],
)
def test_other_files_are_refused(path, content, match):
    save(path, content)
    with pytest.raises(ValueError, match=rf"dit\.pt: .*{match}"):
        open_blocks(path, CONFIG)


def test_a_file_that_is_not_there(path):
    with pytest.raises(FileNotFoundError, match=r"dit\.pt"):
        open_blocks(path, CONFIG)
