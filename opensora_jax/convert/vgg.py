"""VGG as torchvision saves it, and LPIPS's weights of its channels -> `models.perceptual`."""

import re

import jax.numpy as jnp
import numpy as np
from etils import epath

from opensora_jax import files
from opensora_jax.convert import torch_file
from opensora_jax.models.perceptual import Perceptual

_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def load_perceptual(path: epath.PathLike) -> Perceptual:
    """The distance of a file, or of all files of a folder together.

    Read are `features.N.weight` and `features.N.bias`, torchvision's names of VGG's convolutions,
    whose numbers say where it halves height and width, and, where they are there,
    `linK.model.1.weight`, LPIPS's weights of stage K's channels; without them all weigh alike. What
    is there besides, as VGG's classifier, is left out.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no such convolutions, or they do not fit each other.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder: expected VGG's weights")
    sources = [path]
    if path.is_dir():
        sources = [p for p in sorted(path.iterdir()) if p.suffix in _SUFFIXES]
    found: dict[str, np.ndarray] = {}
    for source in sources:
        tensors = torch_file.load(source)
        if not isinstance(tensors, dict):
            raise ValueError(
                f"{source}: holds a {type(tensors).__name__}: expected tensors by name"
            )
        found |= {key: value for key, value in tensors.items() if isinstance(value, np.ndarray)}
    matches = (re.fullmatch(r"features\.(\d{1,4})\.weight", str(key)) for key in found)
    numbers = sorted(int(match[1]) for match in matches if match)
    if not numbers:
        raise ValueError(f"{path}: no features.N.weight: expected VGG's weights, by torchvision")
    stages, d_in = [], 3
    for number, before in zip(numbers, [None, *numbers], strict=False):
        # A convolution and a ReLU take two numbers, what halves takes one more.
        if before is None or number - before == 3:
            stages.append([])
        elif number - before != 2:
            raise ValueError(f"{path}: features.{before} and then {number}: expected 2 or 3 more")
        kernel, bias = (_array(path, found, f"features.{number}.{k}") for k in ("weight", "bias"))
        if kernel.shape[1:] != (d_in, 3, 3) or bias.shape != kernel.shape[:1]:
            raise ValueError(
                f"{path}: features.{number}: {kernel.shape}, {bias.shape}: expected "
                f"(D, {d_in}, 3, 3), (D,)"
            )
        d_in = len(bias)
        stages[-1].append((jnp.asarray(kernel.transpose(2, 3, 1, 0)), jnp.asarray(bias)))
    return Perceptual(stages, [_weight(path, found, k, stage) for k, stage in enumerate(stages)])


def _weight(path, found, k, stage):
    n = len(stage[-1][1])
    name = f"lin{k}.model.1.weight"
    if name not in found:
        return jnp.ones((n,))
    weight = _array(path, found, name)
    if weight.shape != (1, n, 1, 1):
        raise ValueError(f"{path}: {name}: {weight.shape}: expected (1, {n}, 1, 1)")
    return jnp.asarray(weight.reshape(n))


def _array(path, found, name):
    array = found.get(name)
    if array is None or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"{path}: {files.short(name)}: expected finite floating-point numbers")
    return np.asarray(array, np.float32)
