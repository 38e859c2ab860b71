"""The same ClipText from every format and kind of checkpoint; wrong weights are named."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from torch_writer import save

from opensora_jax.convert.clip import load_clip_text

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_text"
FORMATS = ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin"]


@pytest.fixture
def folder(tmp_path):
    """A folder with the golden config only."""
    shutil.copy(GOLDEN / "config.json", tmp_path)
    return tmp_path


@pytest.fixture
def tensors():
    return load_file(GOLDEN / "model.safetensors")


def assert_equal(one, other):
    one, other = (nnx.to_pure_dict(nnx.state(model)) for model in (one, other))
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_bit_identical(folder, name):
    shutil.copy(GOLDEN / name, folder)
    assert_equal(load_clip_text(folder), load_clip_text(GOLDEN))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(folder, tensors, name):
    stem, suffix = name.split(".")
    write = save_file if suffix == "safetensors" else lambda shard, path: save(path, shard)
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        shard = f"{stem}-0000{i + 1}-of-00002.{suffix}"
        write({name: tensors[name] for name in names[i::2]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::2], shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(load_clip_text(folder), load_clip_text(GOLDEN))
    (folder / shard).unlink()
    with pytest.raises(FileNotFoundError, match=shard):
        load_clip_text(folder)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("depth", [1, 2])
def test_text_only_checkpoints(folder, tensors, prefix, depth):
    config = json.loads((GOLDEN / "config.json").read_text())["text_config"]
    config["num_hidden_layers"] = depth
    (folder / "config.json").write_text(json.dumps(config))
    text = {
        name.replace("text_model.", prefix): x
        for name, x in tensors.items()
        if name.startswith("text_model.") and (depth == 2 or "layers.1." not in name)
    }
    text["text_projection.weight"] = tensors["text_projection.weight"]
    save_file(text, folder / "model.safetensors")
    model = load_clip_text(folder)
    ids = np.arange(6)[None]
    same = np.allclose(model(ids, ids >= 0), load_clip_text(GOLDEN)(ids, ids >= 0), atol=1e-6)
    assert same == (depth == 2)


def test_gelu_half_precision_and_old_buffers(folder, tensors):
    config = json.loads((GOLDEN / "config.json").read_text())
    # Old configs repeat the text settings, which then count.
    config["text_config_dict"] = {**config["text_config"], "hidden_act": "gelu"}
    (folder / "config.json").write_text(json.dumps(config))
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    half["text_model.embeddings.position_ids"] = np.arange(20)[None]
    save(folder / "pytorch_model.bin", half)
    model, golden = load_clip_text(folder), load_clip_text(GOLDEN)
    assert model.token_embedding.embedding.dtype == np.float32
    ids = np.arange(6)[None]
    difference = np.abs(model(ids, ids >= 0) - golden(ids, ids >= 0)).max()
    assert 1e-4 < difference < 0.1


def test_defaults_of_the_config(folder):
    """config.json may leave out what equals the defaults of transformers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **sizes}))
    shutil.copy(GOLDEN / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"token_embedding.*\(99, 32\), expected \(49408, 32\)"):
        load_clip_text(folder)


def test_wrong_weights_are_named(folder, tensors):
    bias = "text_model.encoder.layers.1.mlp.fc1.bias"
    kernel = "text_model.encoder.layers.0.mlp.fc1.weight"
    tensors[bias + "x"] = tensors.pop(bias)
    tensors[kernel] = np.ascontiguousarray(tensors[kernel].T)
    tensors["text_model.encoder.layers.2.mlp.fc1.bias"] = tensors[bias + "x"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="weights do not fit") as error:
        load_clip_text(folder)
    message = str(error.value)
    assert str(folder) in message
    assert "missing 'text_model.encoder.layers.1.mlp.fc1.bias' (64,)" in message
    assert "unexpected 'text_model.encoder.layers.1.mlp.fc1.biasx'" in message
    assert "unexpected 'text_model.encoder.layers.2.mlp.fc1.bias'" in message
    assert (
        "'text_model.encoder.layers.0.mlp.fc1.weight' has shape (32, 64), expected (64, 32)"
        in message
    )
    assert message.count(";") == 3  # and nothing else


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ('{"model_type": "bert"}', "model_type='bert'"),
        ('{"model_type": "clip", "text_config": {"hidden_act": "swish"}}', "swish"),
        ('{"model_type": "clip", "text_config": {"hidden_size": "x"}}', "hidden_size='x'"),
        ('{"model_type": "clip", "text_config": {"hidden_size": 0}}', "hidden_size=0"),
        ("[1]", "config.json"),
        ("{", "config.json"),
    ],
)
def test_wrong_configs_are_named(folder, config, match):
    (folder / "config.json").write_text(config)
    shutil.copy(GOLDEN / "model.safetensors", folder)
    with pytest.raises(ValueError, match=match):
        load_clip_text(folder)


def test_absent_or_broken_files(folder):
    with pytest.raises(FileNotFoundError, match=r"no weights; expected one of model\.safetensors"):
        load_clip_text(folder)
    content = (GOLDEN / "flax_model.msgpack").read_bytes()
    for broken in (content[:1000], b"", b"\xc1", b"\x01"):
        (folder / "flax_model.msgpack").write_bytes(broken)
        with pytest.raises(ValueError, match=r"flax_model\.msgpack"):
            load_clip_text(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_clip_text(folder)
