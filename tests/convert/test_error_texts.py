"""Errors about files that others made are short, whatever is in the files, and come soon."""

import functools
import json
import shutil
import struct
import time
from pathlib import Path

import flax.serialization
import msgpack
import numpy as np
import pytest
import videogpt_reference as reference
from safetensors.numpy import load_file, save_file
from torch_writer import Call, Name, Writer, save, save_pickle

from opensora_jax.convert import torch_file
from opensora_jax.convert.clip import load_clip_text
from opensora_jax.convert.dit import open_blocks
from opensora_jax.convert.videogpt import load_videogpt
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import TextEncoder
from opensora_jax.inference.tokenizer import load_tokenizer
from opensora_jax.models.dit import DiTConfig

GOLDEN = Path(__file__).parents[1] / "golden"
LONG = "x" * 1_000_000
X = np.zeros(4, np.float32)
# 2^30 empty tuples in a hundred bytes: pairs of the one before, thirty times.
DOUBLED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 30


def expect_short(load, path):
    start = time.monotonic()
    with pytest.raises((ValueError, OSError)) as caught:
        load(path)
    assert time.monotonic() - start < 20  # seconds, on a busy machine
    assert len(str(caught.value)) < 2000
    assert str(caught.value).startswith(str(path))


def storage(kind="FloatStorage", key="0", n=4):
    """A tensor of one storage, with its parts as given."""
    dump = Writer().dump
    pid = dump(("storage", Name(f"torch.{kind}"), key, "cpu", n)) + b"Q"
    rest = dump(0) + dump((4,)) + dump((1,)) + dump(False) + dump({})
    return dump(Name("torch._utils._rebuild_tensor_v2")) + b"(" + pid + rest + b"tR"


def untyped(dtype):
    dump = Writer().dump
    pid = dump(("storage", Name("torch.storage.UntypedStorage"), "0", "cpu", 16)) + b"Q"
    rest = b"".join(map(dump, (0, (4,), (1,), False, {}, Name(dtype))))
    return dump(Name("torch._utils._rebuild_tensor_v3")) + b"(" + pid + rest + b"tR"


@pytest.mark.parametrize(
    "pickled",
    [
        Writer().dump(Call(f"posix.{LONG}")),
        storage(kind=LONG),
        storage(key=LONG),
        storage(n=2**2000),
        untyped(f"torch.{LONG}"),
        b"F" + LONG.encode() + b"\n",
        b"I" + LONG.encode() + b"\n",
        b"\x8b" + struct.pack("<i", 100_000) + b"\x01" * 100_000,
        b"V" + b"\\u" + LONG.encode() + b"\n",
    ],
    ids=["call", "storage type", "key", "size", "dtype", "float", "int", "long", "text"],
)
def test_pickles(tmp_path, pickled):
    save_pickle(tmp_path / "x.pt", b"\x80\x02" + pickled + b".", [X])
    expect_short(torch_file.load, tmp_path / "x.pt")


def test_names_in_a_zip_file(tmp_path):
    save_pickle(tmp_path / "x.pt", Writer().pickle(X), prefix="x" * 60_000)
    expect_short(torch_file.load, tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["downsample", "sequence_length"])
def test_a_value_that_a_few_bytes_make_endless(tmp_path, name):
    writer = Writer()
    dump = writer.dump
    tensors = {"codebook.embeddings": np.zeros((2, 2), np.float32)}
    tensors["encoder.conv_last.conv.weight"] = np.zeros((1, 1, 1, 1, 1), np.float32)
    start = b"\x80\x02}(" + dump("state_dict") + dump(tensors) + dump("hyper_parameters")
    save_pickle(tmp_path / "x.ckpt", start + b"}(" + dump(name) + DOUBLED + b"uu.", writer.storages)
    expect_short(load_videogpt, tmp_path / "x.ckpt")


def many(tensors):
    return {**tensors, **{f"{i}.{'y' * 200}": X for i in range(5000)}}


@pytest.mark.parametrize("change", [many, lambda t: {**t, LONG: X}, lambda t: {**t, LONG: 3}])
def test_weights_of_videogpt(tmp_path, change):
    save(tmp_path / "x.ckpt", change(reference.random_state_dict((2, 2, 2))))
    load = functools.partial(load_videogpt, downsample=(2, 2, 2))
    expect_short(load, tmp_path / "x.ckpt")


def test_more_layers_than_a_number_can_tell(tmp_path):
    tensors = reference.random_state_dict((2, 2, 2))
    tensors |= {f"encoder.convs.{i}.conv.weight": X for i in range(5000)}
    save(tmp_path / "x.ckpt", tensors)
    expect_short(functools.partial(load_videogpt, downsample=(2, 2, 2)), tmp_path / "x.ckpt")


@pytest.mark.parametrize("change", [many, lambda t: {**t, LONG: X}, lambda t: {**t, LONG: 3}])
def test_weights_of_a_dit(tmp_path, change):
    save(tmp_path / "dit.pt", change(torch_file.load(GOLDEN / "dit_tiny.pt")))
    config = DiTConfig(
        depth=2, width=48, heads=4, channels=3, out_channels=3, patch=1, text_width=6
    )
    expect_short(lambda path: open_blocks(path, config), tmp_path / "dit.pt")


def entry(name="x", dtype="F32", shape=(4,), offsets=(0, 16)):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "header",
    [
        entry(name=LONG, dtype="F99"),
        entry(name=LONG, offsets=(0, 17)),
        entry(dtype=LONG),
        entry(shape=[1] * 100_000),
        entry(shape=LONG),
        entry(offsets=(10**4000, 0)),
        entry(offsets=(0, 10**4000)),
        entry(offsets=[0] * 100_000),
        {"x": LONG},
        {"x": [LONG]},
    ],
    ids=["name", "end", "dtype", "axes", "shape", "start", "large", "offsets", "text", "list"],
)
def test_headers_of_safetensors(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    expect_short(torch_file.load, tmp_path / "x.safetensors")


@pytest.fixture
def clip(tmp_path):
    """A folder with the golden config only."""
    shutil.copy(GOLDEN / "clip_text" / "config.json", tmp_path)
    return tmp_path


def packed_array(shape, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    "tree",
    [
        {LONG: X},
        {LONG: 3},
        {"a": {LONG: LONG}},
        {b"a": {3: X}},
        {str(i): X for i in range(5000)},
        [LONG],
        LONG,
        {"a": packed_array((4,), LONG, bytes(16))},
        {"a": packed_array((1,) * 100_000, "float32", bytes(16))},
        {"a": msgpack.ExtType(1, LONG.encode())},
        {"a": {"__msgpack_chunked_array__": True, "shape": {LONG: 1}, "chunks": {}}},
        {"a": {"__msgpack_chunked_array__": True, LONG: 1}},
    ],
    ids=lambda tree: type(tree).__name__,
)
def test_trees_of_flax(clip, tree):
    data = msgpack.packb(tree, default=flax.serialization._msgpack_ext_pack)
    (clip / "flax_model.msgpack").write_bytes(data)
    expect_short(load_clip_text, clip)


def test_a_deep_tree_of_flax(clip):
    (clip / "flax_model.msgpack").write_bytes(b"\x81\xa1a" * 100_000 + b"\x01")
    expect_short(load_clip_text, clip)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": LONG},
        {"model_type": [LONG]},
        {"model_type": "clip", "text_config": LONG},
        {"model_type": "clip", "text_config_dict": [1] * 100_000},
        *(
            {"model_type": "clip_text_model", key: value}
            for key, value in {
                "hidden_act": LONG,
                "hidden_size": LONG,
                "vocab_size": 10**4000,
                "num_hidden_layers": 10**9,
                "num_attention_heads": {LONG: LONG},
                "layer_norm_eps": [0.5] * 100_000,
            }.items()
        ),
        LONG,
    ],
    ids=lambda config: str(config)[:50],
)
def test_configs(clip, config):
    (clip / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "clip_text" / "model.safetensors", clip)
    expect_short(load_clip_text, clip)


@pytest.mark.parametrize(
    "weight_map",
    [LONG, {"a": LONG}, {"a": [LONG]}, {"a": "../model.safetensors"}, [1] * 100_000]
    + [{str(i): f"{'y' * 200}{i}" for i in range(5000)}],
    ids=["text", "name", "list", "elsewhere", "numbers", "many"],
)
def test_indices_of_shards(clip, weight_map):
    index = clip / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    expect_short(load_clip_text, clip)


def test_weights_of_clip(clip):
    tensors = load_file(GOLDEN / "clip_text" / "model.safetensors")
    save_file(many(tensors), clip / "model.safetensors")
    expect_short(load_clip_text, clip)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text", [LONG, "{", f'{{"{LONG}": 1}}', "[" * 100_000, json.dumps({"tokenizer_class": LONG})]
)
def test_files_of_a_text_tokenizer(tmp_path, name, text):
    make_small_text_model(tmp_path / "text", ["a red circle"])
    (tmp_path / "text" / name).write_text(text)
    try:
        TextEncoder(tmp_path / "text")
    except ValueError:
        expect_short(TextEncoder, tmp_path / "text")
    else:
        assert name == "tokenizer_config.json"  # some of it may be anything


@pytest.mark.parametrize(
    "description",
    [{LONG: 1}, {"n_codes": LONG}, {"dit": {}, "vqvae": LONG}, {"dit": {}, "vqvae": [1] * 100_000}],
    ids=["key", "value", "text", "list"],
)
def test_descriptions_of_tokenizers(tmp_path, description):
    (tmp_path / "model.json").write_text(json.dumps(description))
    expect_short(load_tokenizer, tmp_path)
