"""The text tower gives transformers' numbers, whatever stands around the valid tokens."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.convert.clip import load_clip_text
from opensora_jax.models.clip_text import ClipText, ClipTextConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "clip_text"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "expected.npz"))


CONFIG = ClipTextConfig(vocab_size=11, width=8, depth=3, heads=2, mlp_width=16, max_length=6)


def small(**options):
    return ClipText(dataclasses.replace(CONFIG, **options), rngs=nnx.Rngs(0))


def test_same_function_as_transformers(golden):
    model = load_clip_text(GOLDEN)
    out = model(golden["input_ids"], golden["attention_mask"])
    valid = golden["attention_mask"] != 0
    assert out.shape == golden["last_hidden_state"].shape
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out[valid], golden["last_hidden_state"][valid], atol=1e-5, rtol=0)


def test_bfloat16_computes_near_the_same(golden):
    model = load_clip_text(GOLDEN, dtype=jnp.bfloat16)
    assert model.blocks.query.kernel.dtype == jnp.float32
    out = model(golden["input_ids"], golden["attention_mask"])
    valid = golden["attention_mask"] != 0
    error = np.abs(out[valid] - golden["last_hidden_state"][valid])
    assert 1e-5 < error.max() < 0.1  # not the float32 path, and still the same function


def test_padding_and_later_tokens_change_nothing():
    model = small()
    ids = np.array([[1, 2, 3, 4, 5, 6]])
    ones = np.ones_like(ids)
    whole = model(ids, ones)
    np.testing.assert_allclose(model(ids[:, :4], ones[:, :4]), whole[:, :4], atol=1e-6)
    changed = ids.copy()
    changed[:, 4:] = 9
    mask = ones.copy()
    mask[:, 4:] = 0
    np.testing.assert_allclose(model(changed, mask)[:, :4], whole[:, :4], atol=1e-6)
    changed[:, 1] = 9
    assert np.abs(model(changed, mask)[:, 3] - whole[:, 3]).max() > 1e-4


def test_masked_tokens_are_not_attended():
    model = small()
    mask = np.array([[1, 0, 1]])
    a, b = model(np.array([[1, 2, 3]]), mask), model(np.array([[1, 7, 3]]), mask)
    np.testing.assert_array_equal(a[:, 2], b[:, 2])


def test_activations_differ_and_unknown_is_named():
    ids = np.array([[1, 2, 3]])
    one, other = (small(activation=a)(ids, ids > 0) for a in ("gelu", "quick_gelu"))
    assert 1e-6 < np.abs(one - other).max() < 0.1
    with pytest.raises(ValueError, match=r"'swish'.*quick_gelu"):
        small(activation="swish")


def test_shapes_are_checked():
    model = small()
    with pytest.raises(ValueError, match=r"7 tokens.*6 positions"):
        model(np.zeros((1, 7), int), np.ones((1, 7), int))
    with pytest.raises(ValueError, match="attention_mask"):
        model(np.zeros((1, 4), int), np.ones((1, 3), int))
    with pytest.raises(ValueError, match="heads=3"):
        dataclasses.replace(CONFIG, heads=3)
