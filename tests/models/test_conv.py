"""Our convolutions are XLA's, in values and in gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opensora_jax.models.conv import conv
from opensora_jax.models.vqvae import Conv, ConvTranspose

STRIDES = [(2, 2, 2), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 2, 2), (2, 1, 1)))]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def lax_conv(x, kernel, strides=(1, 1, 1), padding=((0, 0),) * 3, lhs_dilation=None):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        lhs_dilation=lhs_dilation,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )


def values_and_gradients(f, *args):
    """f(*args), and the gradients of its product with fixed random numbers."""
    y, vjp = jax.vjp(f, *args)
    return y, *vjp(normal(9, *y.shape))


def assert_equal_functions(f, reference, *args):
    ours = jax.jit(lambda *args: values_and_gradients(f, *args))(*args)
    theirs = jax.jit(lambda *args: values_and_gradients(reference, *args))(*args)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("taps", "c", "f"),
    [
        ((1, 1, 1), 6, 4),
        ((2, 2, 2), 6, 4),
        ((3, 3, 3), 6, 4),
        ((1, 2, 3), 5, 5),
        ((3, 3, 3), 2, 7),  # wide output
        ((2, 1, 4), 8, 3),
    ],
)
def test_conv_is_xla_s(taps, c, f):
    x, kernel = normal(0, 2, 4, 5, 6, c), normal(1, *taps, c, f)
    assert_equal_functions(conv, lax_conv, x, kernel)


def same_padding(k, stride):
    return [((k - s + 1) // 2, (k - s) // 2) for s in stride]


def function_of(make, bias):
    """The layer as a function of x and its kernel, with this bias."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    return lambda x, w: nnx.merge(graph, {"kernel": w, "bias": bias})(x)


@pytest.mark.parametrize(
    ("kernel", "stride"),
    [
        (1, (1, 1, 1)),
        (3, (1, 1, 1)),
        (4, (1, 2, 2)),
        pytest.param(4, (2, 2, 2), marks=pytest.mark.slow),
        pytest.param(4, (2, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_strided_conv_is_xla_s(kernel, stride):
    x, w, bias = normal(0, 2, 4, 6, 8, 3), normal(1, *[kernel] * 3, 3, 2), normal(2, 2)
    ours = function_of(partial(Conv, 3, 2, kernel, stride), bias)

    def reference(x, w):
        return lax_conv(x, w, stride, same_padding(kernel, stride)) + bias

    assert ours(x, w).shape == (2, *[n // s for n, s in zip((4, 6, 8), stride, strict=True)], 2)
    assert_equal_functions(ours, reference, x, w)


@pytest.mark.parametrize("stride", STRIDES)
def test_transposed_conv_is_xla_s(stride):
    x, w, bias = normal(0, 2, 2, 3, 4, 4), normal(1, 4, 4, 4, 4, 3), normal(2, 3)
    ours = function_of(partial(ConvTranspose, 4, 3, stride), bias)

    def reference(x, w):
        """A convolution of the input with zeros between its elements."""
        x = jnp.pad(x, ((0, 0), *same_padding(4, stride), (0, 0)))
        return lax_conv(x, jnp.flip(w, (0, 1, 2)), lhs_dilation=stride) + bias

    assert ours(x, w).shape == (2, *[n * s for n, s in zip((2, 3, 4), stride, strict=True)], 3)
    assert_equal_functions(ours, reference, x, w)


def test_compute_dtype_is_an_argument():
    layer = Conv(4, 4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = layer(normal(0, 1, 2, 4, 4, 4))
    assert y.dtype == jnp.bfloat16
    assert layer.kernel[...].dtype == jnp.float32
