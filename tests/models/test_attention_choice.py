"""The TPU's attention, interpreted, and attention on a mesh, against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opensora_jax import mesh as mesh_lib
from opensora_jax.models import attention as attention_lib


@pytest.mark.parametrize("lengths", [pytest.param(None, marks=pytest.mark.slow), (3, 9)])
def test_splash_attention_is_attention(lengths):
    # 140 queries and 9 keys: neither fills blocks of 128.
    b, n, s, h, size = 2, 140, 9, 2, 16
    shapes = ((b, n, h, size), (b, s, h, size), (b, s, h, size), (b, n, h, size))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    *arrays, d_out = (jax.random.normal(key, x) for key, x in zip(keys, shapes, strict=True))
    lengths = None if lengths is None else jnp.array(lengths, jnp.int32)

    def splash(q, k, v):
        return attention_lib._splash(q, k, v, lengths, interpret=True)

    def plain(q, k, v):
        return attention_lib.attention(q, k, v, lengths)

    (out, vjp), (expected, expected_vjp) = jax.vjp(splash, *arrays), jax.vjp(plain, *arrays)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(vjp(d_out), expected_vjp(d_out), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("n", [1, 128, 129, 512, 513, 1568, 2304])
def test_blocks_cover_with_little_padding(n):
    block = attention_lib._block(n)
    assert block % 128 == 0
    assert block <= 512
    assert -n % block < 128 * -(-n // 512)


@pytest.mark.parametrize("sharded_keys", [False, True])
def test_sharded_attention_is_attention(sharded_keys):
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 1, "context": 2, "tensor": 2})
    s = 6 if sharded_keys else 5
    q, k, v = (
        np.random.default_rng(i).normal(size=(4, n, 4, 8)).astype(np.float32)
        for i, n in enumerate((6, s, s))
    )
    lengths = np.array([1, 2, 5, 3], np.int32)
    expected = attention_lib.attention(q, k, v, lengths)
    sharded = jax.jit(functools.partial(attention_lib.attention, sharded_keys=sharded_keys))
    with jax.set_mesh(mesh):
        out = sharded(q, k, v, lengths)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    # Sharded over examples, tokens and heads.
    assert {x.data.shape for x in out.addressable_shards} == {(2, 3, 2, 8)}
