"""A distance of images that sees what people see, from the features of a frozen network.

LPIPS (arXiv:1801.03924): features of VGG's stages, each position's normalized, squared differences,
weighted by channel. Shape suffixes: N images, H height, W width, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp

# Of ImageNet's pixels in [0, 1], red, green and blue.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perceptual:
    """Attributes:
    stages: of each, (kernel (3, 3, C, D), bias (D,)) of its convolutions; between two stages height
      and width are halved.
    weights: of each stage, (D,) of its channels in the distance.
    """

    stages: list[list[tuple[jax.Array, jax.Array]]]
    weights: list[jax.Array]

    def __call__(self, a_NHWC: jax.Array, b_NHWC: jax.Array) -> jax.Array:
        """The mean distance of images in [-0.5, 0.5], of 2 ** (number of stages - 1) pixels or
        more a side; scalar, differentiable in both."""
        total = jnp.zeros(())
        a, b = (_normalized(x) for x in (a_NHWC, b_NHWC))
        for i, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            if i:
                a, b = _halved(a), _halved(b)
            for kernel, bias in stage:
                a, b = (jax.nn.relu(_conv(x, kernel) + bias) for x in (a, b))
            difference = (_directions(a) - _directions(b)) ** 2
            total += jnp.mean(difference @ weight)
        return total


def _normalized(x_NHWC):
    return (x_NHWC.astype(jnp.float32) + 0.5 - jnp.array(MEAN)) / jnp.array(STD)


def _conv(x_NHWC, kernel):
    return jax.lax.conv_general_dilated(
        x_NHWC, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _halved(x_NHWC):
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x_NHWC, -jnp.inf, jax.lax.max, window, window, "VALID")


def _directions(x_NHWC):
    # Inside the root, so that features of nothing have a gradient.
    return x_NHWC * jax.lax.rsqrt(jnp.sum(x_NHWC**2, axis=-1, keepdims=True) + 1e-10)
