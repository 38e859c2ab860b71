"""Layers against their plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax import mesh as mesh_lib
from opensora_jax.models import cpu, dit, layers


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_parameter_needs_an_axis_a_dimension():
    with pytest.raises(ValueError, match=r"axes=\('embed',\).*\(4, 3\)"):
        layers.param(nnx.Rngs(0), layers.xavier, (4, 3), ("embed",))


def test_add_bias_has_the_gradients_of_a_sum():
    x, bias, dy = normal(0, 2, 3, 4), normal(1, 4), normal(2, 2, 3, 4)
    y, vjp = jax.vjp(cpu.add_bias, x, bias)
    np.testing.assert_allclose(y, x + bias, rtol=1e-6)
    dx, dbias = vjp(jnp.asarray(dy))
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_allclose(dbias, dy.sum((0, 1)), rtol=1e-5, atol=1e-6)


def test_over_tokens_repeats_and_its_gradient_sums():
    x = jnp.arange(6.0).reshape(2, 3)
    dy = jax.random.normal(jax.random.key(0), (2, 5, 3))
    y, vjp = jax.vjp(lambda x: cpu.broadcast_to_tokens(x, 5), x)
    np.testing.assert_array_equal(y, np.repeat(np.asarray(x)[:, None], 5, axis=1))
    np.testing.assert_allclose(vjp(dy)[0], dy.sum(axis=1), rtol=1e-6, atol=1e-6)


def test_dense_is_a_matmul_and_a_bias():
    layer = layers.Dense(4, 6, axes=("embed", "mlp"), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(normal(1, 6))
    x = normal(0, 2, 3, 4)
    expected = x @ np.asarray(layer.kernel[...]) + normal(1, 6)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_follows_pytorch_s_conventions():
    norm = layers.BatchNorm(5, axes=("conv_out",), rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.asarray(normal(1, 5)), jnp.asarray(normal(2, 5))
    x = 3 + 2 * normal(0, 2, 3, 2, 2, 5)
    rows = x.reshape(-1, 5)

    def expected(mean, var):
        return (x - mean) / np.sqrt(var + 1e-5) * normal(1, 5) + normal(2, 5)

    y = norm(jnp.asarray(x))
    # In training: normalized by the biased variance, while the average holds the unbiased one.
    np.testing.assert_allclose(y, expected(rows.mean(0), rows.var(0)), rtol=1e-3, atol=1e-4)
    mean, var = 0.1 * rows.mean(0), 0.9 + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], var, rtol=1e-5)
    norm.eval()
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected(mean, var), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], mean, rtol=1e-5)  # and nothing moves


def test_batch_norm_gradient_passes_through_the_statistics():
    graph, state = nnx.split(layers.BatchNorm(3, axes=("conv_out",), rngs=nnx.Rngs(0)))
    state = nnx.to_pure_dict(state)
    x, weights = normal(0, 8, 3), normal(1, 8, 3)

    def ours(x):
        return jnp.sum(nnx.merge(graph, state)(x) * weights)

    def plain(x):
        return jnp.sum((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5) * weights)

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-3, atol=1e-4)


def test_normalizations():
    x = 3 + 2 * normal(0, 4, 64)
    y = np.asarray(layers.layer_normalize(jnp.asarray(x)))
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-4)
    y = np.asarray(layers.rms_normalize(jnp.asarray(x)))
    np.testing.assert_allclose(y, x / np.sqrt((x**2).mean(-1, keepdims=True)), rtol=1e-5)
    # The same function in bfloat16, whose sums would not do.
    big = jnp.asarray(x + 100, jnp.bfloat16)
    y = layers.layer_normalize(big)
    assert y.dtype == jnp.bfloat16
    expected = layers.layer_normalize(big.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.02)


def test_timestep_embedding_is_cosines_then_sines():
    t, width = np.array([0.0, 1.0, 999.0], np.float32), 8
    frequency = 10_000.0 ** (-np.arange(4) / 4)
    angle = t[:, None] * frequency
    expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    y = layers.timestep_embedding(jnp.asarray(t), width)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert layers.timestep_embedding(jnp.asarray(t), 7).shape == (3, 7)


def test_sinusoidal_positions_tell_every_place():
    embedding = np.asarray(layers.sinusoidal_positions((3, 4, 5), 26))
    assert embedding.shape == (60, 26)
    np.testing.assert_array_equal(embedding[:, 24:], 0.0)
    assert len(np.unique(embedding.round(3), axis=0)) == 60
    # Each third tells one axis: of tokens that differ in width alone, the last.
    row = embedding.reshape(3, 4, 5, 26)[1, 2]
    np.testing.assert_array_equal(row[:, :16], row[:1, :16].repeat(5, axis=0))
    position = np.asarray(layers.timestep_embedding(jnp.arange(5.0), 8, max_period=100.0))
    np.testing.assert_allclose(row[:, 16:24], position, atol=1e-6)


def test_rotated_products_depend_on_differences_of_positions():
    grid, head = (3, 4, 5), 16
    angles = layers.rotary_angles(grid, head)
    assert angles.shape == (60, 8)
    # The same query and the same key at every position.
    q, k = (np.broadcast_to(normal(i, head), (1, 60, 1, head)) for i in (0, 1))
    q, k = (np.asarray(layers.apply_rotary(jnp.asarray(x), angles))[0, :, 0] for x in (q, k))
    product = (q @ k.T).reshape(*grid, *grid)
    a, b = np.meshgrid(*[np.arange(60)] * 2, indexing="ij")
    difference = np.stack(np.unravel_index(a, grid)) - np.stack(np.unravel_index(b, grid))
    values = {}
    for d, value in zip(difference.reshape(3, -1).T, product.reshape(-1), strict=True):
        values.setdefault(tuple(d), []).append(value)
    assert len(values) == 5 * 7 * 9
    for same in values.values():
        np.testing.assert_allclose(same, same[0], atol=1e-4)
    # Every axis matters: a step along each gives another product.
    steps = [values[d][0] for d in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(np.unique(np.round(steps, 3))) == 4


def test_rotation_keeps_norms_and_leaves_what_follows():
    angles = layers.rotary_angles((2, 2, 2), 12)
    x = jnp.asarray(normal(0, 2, 11, 3, 12))
    y = layers.apply_rotary(x, angles)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 8:], x[:, 8:])
    np.testing.assert_array_equal(y[:, 0], x[:, 0])  # position zero
    assert np.abs(np.asarray(y - x)[:, 1:8]).max(-1).min() > 1e-3


def test_gradients_are_summed_in_float32_where_asked_for():
    """Of a whole DiT that computes in bfloat16: in it no gradient has more digits than that."""
    config = dit.DiTConfig(
        depth=2, width=16, heads=2, channels=2, out_channels=2, patch=1, text_width=6
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 2, 4, 4, 2), np.float32)
    text = rng.standard_normal((8, 3, 6), np.float32)

    def has_more_digits(reduce_dtype):
        execution = dit.Execution(dtype=jnp.bfloat16, reduce_dtype=reduce_dtype)
        model = dit.DiT(config, rngs=nnx.Rngs(0), execution=execution)
        graph, params = nnx.split(model)
        draw = np.random.default_rng(1).standard_normal
        params = jax.tree.map(lambda p: 0.3 * draw(p.shape, np.float32), params)

        def loss(params):
            out = nnx.merge(graph, params)(x, jnp.full(8, 500.0), text, jnp.full(8, 3))
            return jnp.mean((out - x) ** 2)

        mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "context": 1, "tensor": 2})
        with jax.set_mesh(mesh):
            gradients = jax.jit(jax.grad(loss))(params)
        return {
            jax.tree_util.keystr(path): bool((g != g.astype(jnp.bfloat16)).any())
            for path, g in jax.tree_util.tree_leaves_with_path(gradients)
            if "null_text" not in jax.tree_util.keystr(path)  # dropped by none
        }

    narrow, wide = has_more_digits(None), has_more_digits(jnp.float32)
    assert not any(narrow.values()), narrow
    assert all(wide.values()), wide
