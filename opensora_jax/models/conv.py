"""Stride-1 3-D convolution: XLA's where there are convolution units, on CPUs `cpu.conv`.

A strided one is the same over cells: `fold` the axis, of the input and of the kernel.

Shape suffixes: B batch, T, H, W positions, C features in, F features out; the kernel is (kt, kh,
kw, C, F).
"""

import functools

import jax
import jax.numpy as jnp

from opensora_jax.models import cpu


@jax.custom_vjp
def conv(x_BTHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Correlation of x with the kernel where they overlap whole, (B, T - kt + 1, ..., F)."""
    return jax.lax.platform_dependent(x_BTHWC, kernel, cpu=cpu.conv, default=_conv_xla)


def _forward(x, kernel):
    return conv(x, kernel), (x, kernel)


def _backward(saved, dy):
    x, kernel = saved
    # The gradient of the input is itself a convolution, of dy with the flipped kernel.
    border = [(k - 1, k - 1) for k in kernel.shape[:3]]
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    dx = conv(jnp.pad(dy, ((0, 0), *border, (0, 0))), flipped)

    def gradient_of(conv):
        return lambda x, kernel, dy: jax.vjp(functools.partial(conv, x), kernel)[1](dy)[0]

    dw = jax.lax.platform_dependent(
        x, kernel, dy, cpu=gradient_of(cpu.conv), default=gradient_of(_conv_xla)
    )
    return dx, dw


conv.defvjp(_forward, _backward)


def _conv_xla(x, kernel):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1, 1),
        padding="VALID",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def fold(x: jax.Array, axis: int, channel: int) -> jax.Array:
    """Pairs along `axis` (an odd last one is dropped) become channels: n -> n // 2, C -> 2 C."""
    n = x.shape[axis] // 2
    x = jax.lax.slice_in_dim(x, 0, 2 * n, axis=axis)
    shape = list(x.shape)
    x = jnp.moveaxis(x.reshape(*shape[:axis], n, 2, *shape[axis + 1 :]), axis + 1, channel)
    shape[axis] = n
    shape[channel] *= 2
    return x.reshape(shape)


def unfold(x: jax.Array, axis: int, channel: int) -> jax.Array:
    """The inverse of `fold`: C -> C // 2, n -> 2 n."""
    shape = list(x.shape)
    shape[channel] //= 2
    x = x.reshape(*shape[:channel], 2, *shape[channel:])
    shape[axis] *= 2
    return jnp.moveaxis(x, channel, axis + 1).reshape(shape)
