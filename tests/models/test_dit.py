"""The DiT: adaLN-Zero, text modes, padding, dropped text, rematerialization, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models import layers
from opensora_jax.models.dit import REMAT_POLICIES, TEXT_MODES, DiT, DiTConfig, Execution

GRID, CHANNELS, TEXT_WIDTH = (2, 4, 6), 3, 8


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CONFIG = DiTConfig(
    depth=2,
    width=24,
    heads=2,
    channels=CHANNELS,
    out_channels=CHANNELS,
    patch=2,
    text_width=TEXT_WIDTH,
)


def new(text_mode="cross_attention", **execution):
    config = dataclasses.replace(CONFIG, text_mode=text_mode)
    return DiT(config, rngs=nnx.Rngs(0), execution=Execution(**execution))


def make(text_mode="cross_attention", **execution):
    """(graph, weights) of a tiny DiT whose weights are random where they start at zero."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: new(text_mode, **execution)))
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(shapes))
    return graph, tree.unflatten(0.2 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves))


def inputs(n_text=5):
    return {
        "x": normal(0, 3, *GRID, CHANNELS),
        "time": np.array([10.0, 500.0, 990.0], np.float32),
        "text": normal(1, 3, n_text, TEXT_WIDTH),
        "lengths": np.array([2, 3, 5], np.int32),
    }


@functools.partial(jax.jit, static_argnums=0)
def _call(graph, weights, *args):
    return nnx.merge(graph, weights)(*args)


def call(model, x, time, text, lengths, drop=(False, False, False)):
    return np.asarray(_call(*model, x, time, text, lengths, np.array(drop)))


@pytest.fixture(scope="module", params=TEXT_MODES)
def model(request):
    return make(request.param)


def test_patches_round_trip_in_the_order_time_height_width():
    x = jnp.arange(2 * 2 * 4 * 6 * 3).reshape(2, *GRID, 3)
    patches = layers.to_patches(x, 2)
    assert patches.shape == (2, 2 * 2 * 3, 2 * 2 * 3)
    # Token 4 of 2 x 3 a frame: first frame, second row, second column of patches.
    np.testing.assert_array_equal(patches[1, 4], x[1, 0, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(layers.from_patches(patches, GRID, 2), x)


@pytest.mark.parametrize("text_mode", TEXT_MODES)
def test_a_new_model_is_zero_and_its_blocks_the_identity(text_mode):
    given = inputs()
    tokens, condition, text = normal(2, 3, 6, 24), normal(3, 3, 24), normal(4, 3, 5, 24)

    @jax.jit
    def run():
        model = new(text_mode)
        graph, blocks = nnx.split(model.blocks)
        first = nnx.merge(graph, jax.tree.map(lambda w: w[0], nnx.to_pure_dict(blocks)))
        out = model(*(given[name] for name in ("x", "time", "text", "lengths")))
        return out, first(tokens, condition, text)

    out, after_block = run()
    np.testing.assert_array_equal(out, np.zeros((3, *GRID, CHANNELS)))
    np.testing.assert_array_equal(after_block, tokens)


def test_everything_that_goes_in_matters(model):
    given = inputs()
    out = call(model, **given)
    assert out.shape == (3, *GRID, CHANNELS)
    assert out.dtype == np.float32
    for name in ("x", "time", "text", "lengths"):
        other = dict(given)
        other[name] = given[name].copy()
        # In the last example, a feature of its last token, its last latent, ...
        other[name].reshape(-1)[-1] -= 2
        changed = np.abs(call(model, **other) - out).reshape(3, -1).max(-1)
        assert changed[2] > 1e-4, name
        np.testing.assert_array_equal(changed[:2], 0.0, err_msg=name)


def test_padding_of_the_text_changes_nothing(model):
    given = inputs()
    out = call(model, **given)
    other = given["text"].copy()
    for row, n in zip(other, given["lengths"], strict=True):
        row[n:] = 1e3
    np.testing.assert_allclose(call(model, **given | {"text": other}), out, atol=1e-5)
    longer = np.pad(given["text"], ((0, 0), (0, 4), (0, 0)), constant_values=7.0)
    np.testing.assert_allclose(call(model, **given | {"text": longer}), out, atol=1e-5)


def test_dropped_text_is_one_null_text(model):
    given = inputs()
    drop = np.array([True, False, True])
    kept, dropped = call(model, **given), call(model, **given, drop=drop)
    np.testing.assert_allclose(dropped[1], kept[1], atol=1e-5)
    assert np.abs(dropped - kept)[[0, 2]].reshape(2, -1).max(-1).min() > 1e-3
    other = given | {"text": normal(5, 3, 5, TEXT_WIDTH), "lengths": np.array([5, 3, 1], np.int32)}
    other["text"][1] = given["text"][1]
    np.testing.assert_allclose(call(model, **other, drop=drop), dropped, atol=1e-5)


def test_the_null_text_is_a_parameter(model):
    graph, weights = model
    given, drop = inputs(), np.array([True, False, True])
    out = call(model, **given, drop=drop)
    other = (graph, {**weights, "null_text": weights["null_text"][::-1]})
    changed = np.abs(call(other, **given, drop=drop) - out).reshape(3, -1).max(-1)
    assert changed[[0, 2]].min() > 1e-4
    assert changed[1] == 0


@pytest.mark.slow
def test_remat_policies_have_equal_gradients():
    given = inputs()
    args = [given[name] for name in ("x", "time", "text", "lengths")]

    def loss(weights, graph):
        return jnp.sum(nnx.merge(graph, weights)(*args) ** 2)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    gradients = {}
    for remat in REMAT_POLICIES:
        graph, weights = make(remat=remat)
        gradients[remat] = gradient(weights, graph)
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a, b, rtol=1e-3, atol=1e-4 * (1e-3 + float(jnp.abs(b).max()))
            ),
            gradients[remat],
            gradients["none"],
        )


def test_bfloat16_is_close_and_float32_outside():
    reference = call(make(), **inputs())
    out = call(make(dtype=jnp.bfloat16), **inputs())
    assert out.dtype == np.float32
    error = np.abs(out - reference).max() / np.abs(reference).max()
    assert 0 < error < 0.1


def test_sizes_that_do_not_fit_are_named():
    for bad in ({"width": 25}, {"heads": 8}, {"text_mode": "concat"}):
        ((name, value),) = bad.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            dataclasses.replace(CONFIG, **bad)
    graph, weights = make()
    with pytest.raises(ValueError, match=r"4x5.*patch 2"):
        call((graph, weights), **inputs() | {"x": normal(0, 3, 2, 4, 5, CHANNELS)})
