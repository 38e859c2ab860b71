"""Captions to features: valid tokens only, one caption independent of the others."""

import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.text_encoder import BATCH_SIZE, TextEncoder

COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
CAPTIONS = [
    f"a {color} {shape} {verb} {direction}"
    for color in COLORS
    for shape in SHAPES
    for direction in DIRECTIONS
    for verb in ("moves", "is going")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "model"
    make_small_text_model(folder, CAPTIONS)
    return folder


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder(folder)


def test_one_feature_per_valid_token(encoder, folder):
    features = encoder.encode(["A red circle", "", "word " * 100])
    # Beginning and end count; a text that is too long is cut, its end kept.
    assert [f.shape for f in features] == [(5, 64), (2, 64), (32, 64)]
    assert {f.dtype for f in features} == {np.dtype(np.float32)}
    assert (encoder.width, encoder.max_length, encoder.name) == (64, 32, str(folder))
    assert encoder.encode([]) == []
    with pytest.raises(TypeError, match="captions='a red circle'"):
        encoder.encode("a red circle")


def test_features_do_not_depend_on_the_company(encoder):
    captions = CAPTIONS[: BATCH_SIZE + 5] + ["red " * 20, "blue " * 31]
    together = encoder.encode(captions)
    for i in (0, 7, BATCH_SIZE, BATCH_SIZE + 4, -2, -1):
        (alone,) = encoder.encode([captions[i]])
        np.testing.assert_array_equal(alone, together[i])


def test_compiled_once_per_padded_length(folder):
    encoder = TextEncoder(folder)
    for n in (1, BATCH_SIZE, BATCH_SIZE + 1):
        encoder.encode(CAPTIONS[:n])
    assert encoder._apply._cache_size() == 1


def test_case_is_ignored_and_unknown_words_are_one(encoder):
    def same(a, b):
        a, b = encoder.encode([a, b])
        return a.shape == b.shape and np.array_equal(a, b)

    assert same("A Red circle", "a red circle")
    assert same("a purple circle", "a crimson circle")
    assert not same("a purple circle", "a red circle")


def accuracy(features, labels):
    """Of a linear classifier fitted to one half of the features, on the other half."""
    x = np.c_[features, np.ones(len(features))]
    y = np.array(labels)
    classes = np.unique(y)
    order = np.random.default_rng(0).permutation(len(y))
    fit, rest = order[::2], order[1::2]
    targets = (y[fit, None] == classes) * 1.0
    ridge = x[fit].T @ x[fit] + 1e-3 * np.eye(x.shape[1])
    scores = x[rest] @ np.linalg.solve(ridge, x[fit].T @ targets)
    return np.mean(classes[scores.argmax(-1)] == y[rest])


def test_words_are_readable_where_they_stand(encoder):
    words = [word for caption in CAPTIONS for word in caption.split()]
    features = np.concatenate([f[1:-1] for f in encoder.encode(CAPTIONS)])
    assert accuracy(features, words) == 1.0


def test_the_last_token_tells_captions_and_word_order_apart(encoder):
    last = np.stack([f[-1] for f in encoder.encode(CAPTIONS)])
    for position, values in ((1, COLORS), (2, SHAPES), (-1, DIRECTIONS)):
        labels = [caption.split()[position] for caption in CAPTIONS]
        assert set(labels) == set(values)
        assert accuracy(last, labels) > 0.95
    a, b, c = (
        f[-1]
        for f in encoder.encode(
            [
                "a red circle moves left a blue square",
                "a blue circle moves left a red square",
                "a blue circle moves left a green square",
            ]
        )
    )
    assert np.linalg.norm(a - b) > 0.2 * np.linalg.norm(a - c)


def test_same_arguments_same_files(folder, tmp_path):
    make_small_text_model(tmp_path / "a", reversed(CAPTIONS))
    make_small_text_model(tmp_path / "a", CAPTIONS)  # there already: nothing happens
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(ValueError, match=r"other settings: small_text_model\.seed=1, there 0"):
        make_small_text_model(tmp_path / "a", CAPTIONS, seed=1)
    with pytest.raises(ValueError, match="no words"):
        make_small_text_model(tmp_path / "b", ["", " "])
    with pytest.raises(ValueError, match="heads=5"):
        make_small_text_model(tmp_path / "b", CAPTIONS, heads=5)
    make_small_text_model(tmp_path / "c", CAPTIONS, seed=1)
    one, other = (load_file(d / "model.safetensors") for d in (folder, tmp_path / "c"))
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    assert not np.array_equal(one[name], other[name])


def test_a_name_on_the_hub_is_found_in_the_local_cache(folder, encoder, tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--small-text"
    shutil.copytree(folder, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cached = TextEncoder("someone/small-text")
    assert cached.name == "someone/small-text"
    np.testing.assert_array_equal(cached.encode(["a circle"])[0], encoder.encode(["a circle"])[0])


def test_no_notice_about_pytorch(folder):
    script = (
        f"from opensora_jax.inference.text_encoder import TextEncoder; TextEncoder({str(folder)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "PyTorch" not in done.stdout + done.stderr


def test_bad_folders_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("no-such/model", "no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"(?s){name}.*name and the network"):
            TextEncoder(name)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*tokenizer"):
        TextEncoder(tmp_path)
    shutil.copytree(folder, tmp_path / "short")
    weights = load_file(folder / "model.safetensors")
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = weights[name][:-3]
    save_file(weights, tmp_path / "short" / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] -= 3
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"tokenizer has 19 tokens.* 16"):
        TextEncoder(tmp_path / "short")
