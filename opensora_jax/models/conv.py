"""Stride-1 3-D convolution, written for what each platform computes fast.

TPUs and GPUs have convolution units; XLA's CPU convolutions, above all their gradients, run at a
third of the speed of the same work as matmuls, one for each tap of the kernel.

Shape suffixes: B batch, T, H, W positions, C features in, F features out; the kernel is (kt, kh,
kw, C, F).
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp


@jax.custom_vjp
def conv(x_BTHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlation of x with the kernel where they overlap whole, (B, T - kt + 1, ..., F)."""
    return jax.lax.platform_dependent(x_BTHWC, kernel, cpu=_conv_matmul, default=_conv_xla)


def _conv_xla(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding="VALID",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _conv_matmul(x, kernel):
    c, f = kernel.shape[3:]
    if f > c:  # adding up wide outputs would cost more than the matmuls
        return _conv_xla(x, kernel)
    x, kernel = _fold_width(x, kernel)
    *taps, c, f = kernel.shape
    shape = [n - k + 1 for n, k in zip(x.shape[1:4], taps, strict=True)]
    terms = zip(_windows(x, taps, shape), kernel.reshape(-1, c, f), strict=True)
    y = sum(window.reshape(-1, c) @ w for window, w in terms)
    return y.reshape(x.shape[0], *shape, f)


def _fold_width(x, kernel):
    """Moves the taps along W into channels: a third of the matmuls to compile, each wider."""
    kt, kh, kw, c, f = kernel.shape
    if kw < 3:
        return x, kernel
    n = x.shape[3] - kw + 1
    x = jnp.concatenate([jax.lax.slice_in_dim(x, i, i + n, axis=3) for i in range(kw)], axis=4)
    return x, kernel.reshape(kt, kh, 1, kw * c, f)


def _windows(x, taps, shape) -> Iterator[jax.Array]:
    """What each tap of the kernel sees of x."""
    for offset in itertools.product(*map(range, taps)):
        stop = [o + n for o, n in zip(offset, shape, strict=True)]
        yield jax.lax.slice(x, (0, *offset, 0), (x.shape[0], *stop, x.shape[4]))


def _forward(x, kernel):
    return conv(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    # The gradient of the input is itself a convolution, of dy with the flipped kernel.
    border = [(k - 1, k - 1) for k in kernel.shape[:3]]
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    dx = conv(jnp.pad(dy, ((0, 0), *border, (0, 0))), flipped)
    dw = jax.lax.platform_dependent(
        x, kernel, dy, cpu=_kernel_gradient_matmul, default=_kernel_gradient_xla
    )
    return dx, dw


def _kernel_gradient_xla(x, kernel, dy):
    return jax.vjp(lambda w: _conv_xla(x, w), kernel)[1](dy)[0]


def _kernel_gradient_matmul(x, kernel, dy):
    x, folded = _fold_width(x, kernel)
    *taps, c, f = folded.shape
    flat = dy.reshape(-1, f)
    windows = _windows(x, taps, dy.shape[1:4])
    return jnp.stack([window.reshape(-1, c).T @ flat for window in windows]).reshape(kernel.shape)


conv.defvjp(_forward, _backward)
