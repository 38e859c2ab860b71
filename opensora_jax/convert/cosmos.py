"""Cosmos-Tokenizer's discrete video tokenizers (https://github.com/NVIDIA/Cosmos-Tokenizer) to
`models.cosmos`.

They are published as TorchScript archives: zip files with the weights, as attributes of modules,
beside program text, which is neither run nor read.
"""

import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from opensora_jax.convert import table, torch_file
from opensora_jax.convert.unpickle import MOST_NAME, Placeholder
from opensora_jax.files import short
from opensora_jax.models.cosmos import Cosmos, CosmosConfig

CONV = (2, 3, 4, 1, 0)  # (out, in, T, H, W) to (T, H, W, in, out)
LEVELS = (8, 8, 8, 5, 5, 5)  # of all published ones; a state_dict does not say them
HALVES = ("encoder.jit", "decoder.jit")
WHOLE = ("autoencoder.jit", "model.safetensors", "model.pt")
# Constants of the original's modules; its wavelets are the exact ones, whatever their dtype.
IGNORED = r".*\.(wavelets|_arange|patch_size_buffer)|(inv_quant\.)?quantizer\..*"
_NAME = re.compile(r"DV(\d{1,4})x(\d{1,4})x(\d{1,4})", re.IGNORECASE)
MOST_VALUES = 100_000  # in an archive; the published ones hold some 3,000


def _conv(theirs: str, ours: str) -> list[table.Row]:
    return [
        (f"{theirs}.conv3d.weight", f"{ours}.kernel", CONV),
        (f"{theirs}.conv3d.bias", f"{ours}.bias", None),
    ]


def _factorized(theirs: str, ours: str) -> list[table.Row]:
    return [*_conv(f"{theirs}.0", f"{ours}.space"), *_conv(f"{theirs}.1", f"{ours}.time")]


def _norm(theirs: str, ours: str) -> list[table.Row]:
    return [
        (f"{theirs}.norm.weight", f"{ours}.scale", None),
        (f"{theirs}.norm.bias", f"{ours}.bias", None),
    ]


def _block(theirs: str, ours: str) -> list[table.Row]:
    return [
        *_norm(f"{theirs}.norm1", f"{ours}.norm_1"),
        *_factorized(f"{theirs}.conv1", f"{ours}.conv_1"),
        *_norm(f"{theirs}.norm2", f"{ours}.norm_2"),
        *_factorized(f"{theirs}.conv2", f"{ours}.conv_2"),
        *_conv(f"{theirs}.nin_shortcut", f"{ours}.shortcut"),
    ]


def _attention(theirs: str, ours: str) -> list[table.Row]:
    names = {"q": "query", "k": "key", "v": "value", "proj_out": "out"}
    return [
        row
        for i, axis in enumerate(("space", "time"))
        for rows in (
            _norm(f"{theirs}.{i}.norm", f"{ours}.{axis}.norm"),
            *(_conv(f"{theirs}.{i}.{q}", f"{ours}.{axis}.{name}") for q, name in names.items()),
        )
        for row in rows
    ]


def _network(name: str, levels: str, resample: str, order: tuple[str, str]) -> list[table.Row]:
    """The encoder or decoder; `order` is that of its resampling convolutions."""
    theirs, ours = f"{name}.{levels}.*", f"{name}.levels.*"
    first, second = order
    return [
        *_factorized(f"{name}.conv_in", f"{name}.conv_in"),
        *_block(f"{theirs}.block.*", f"{ours}.blocks.*"),
        *_attention(f"{theirs}.attn.*", f"{ours}.attention.*"),
        *_conv(f"{theirs}.{resample}.conv1", f"{ours}.resample.{first}"),
        *_conv(f"{theirs}.{resample}.conv2", f"{ours}.resample.{second}"),
        *_conv(f"{theirs}.{resample}.conv3", f"{ours}.resample.out"),
        *_block(f"{name}.mid.block_1", f"{name}.middle.block_1"),
        *_attention(f"{name}.mid.attn_1", f"{name}.middle.attention"),
        *_block(f"{name}.mid.block_2", f"{name}.middle.block_2"),
        *_norm(f"{name}.norm_out", f"{name}.norm_out"),
        *_factorized(f"{name}.conv_out", f"{name}.conv_out"),
    ]


NAMES = [
    *_network("encoder", "down", "downsample", ("space", "time")),
    *_conv("quant_conv", "pre_quant"),
    *_conv("post_quant_conv", "post_quant"),
    *_network("decoder", "up", "upsample", ("time", "space")),
]


def load_cosmos(
    path: epath.PathLike,
    downsample: tuple[int, int, int] | None = None,
    *,
    n_frames: int = 17,
    dtype: jnp.dtype = jnp.float32,
) -> Cosmos:
    """A discrete video tokenizer of Cosmos-Tokenizer.

    Sizes follow from the shapes of the weights.

    Args:
      path: a folder with autoencoder.jit, or with encoder.jit and decoder.jit, or with a state_dict
        (model.safetensors, model.pt); or one such file that holds the whole tokenizer.
      downsample: (T, H, W) factors, which weights cannot tell; by default those in the path's
        names, as in Cosmos-Tokenizer-DV4x8x8.
      n_frames: frames of the windows that long videos are cut into, 1 + a multiple of T's factor.
      dtype: compute dtype.

    Raises:
      FileNotFoundError: no such file, or none of them in the folder.
      ValueError: not such a tokenizer; a missing, unexpected or misshapen weight; unknown or
        impossible `downsample`, or another than the path says.
    """
    path = epath.Path(path)
    tensors = _tensors(path)
    first = _shape(tensors, "encoder.conv_in.0.conv3d.weight", path)
    patch = round((first[1] / 3) ** (1 / 3))
    if 3 * patch**3 != first[1]:
        raise ValueError(
            f"{path}: the encoder takes {first[1]} channels, expected 3 for each pixel of a cube"
        )
    numbers = [
        re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.0\.", name) for name in tensors
    ]
    blocks = {(int(found[1]), int(found[2])) for found in numbers if found}
    n_levels = 1 + max((level for level, _ in blocks), default=-1)
    widths = [
        _shape(tensors, f"encoder.down.{i}.block.0.conv1.0.conv3d.weight", path)[0]
        for i in range(n_levels)
    ]
    if not widths or any(width % first[0] for width in widths):
        raise ValueError(
            f"{path}: levels of {short(widths)} channels, expected multiples of {first[0]}"
        )
    attention = {re.match(r"encoder\.down\.(\d+)\.attn\.", name) for name in tensors}
    try:
        config = CosmosConfig(
            downsample=_downsample(path, downsample),
            levels=_levels(tensors, path),
            channels=first[0],
            multipliers=tuple(width // first[0] for width in widths),
            n_res_blocks=len({block for level, block in blocks if level == 0}),
            encoder_latents=_shape(tensors, "encoder.conv_out.1.conv3d.weight", path)[0],
            decoder_latents=_shape(tensors, "decoder.conv_in.0.conv3d.weight", path)[1],
            patch=patch,
            attention_levels=tuple(sorted({int(found[1]) for found in attention if found})),
            n_frames=n_frames,
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if str(path) in message else f"{path}: {message}") from None
    model = table.fill(
        lambda: Cosmos(config, rngs=nnx.Rngs(0), dtype=dtype),
        tensors,
        NAMES,
        source=str(path),
        ignored=IGNORED,
    )
    model.eval()
    return model


def is_published(path: epath.PathLike) -> bool:
    """Whether a file or folder looks like what `load_cosmos` reads: by its names alone."""
    path = epath.Path(path)
    archives = (*HALVES, *(name for name in WHOLE if name.endswith(".jit")))
    if path.suffix == ".jit" or any((path / name).exists() for name in archives):
        return True
    is_named = any(_NAME.search(part) for part in path.parts)
    return is_named and (path.is_file() or any((path / name).exists() for name in WHOLE))


def _tensors(path: epath.Path) -> dict[str, np.ndarray]:
    """All weights by the names of the original's whole tokenizer."""
    if not path.is_dir():
        return _contents(path)
    for name in WHOLE:
        if (path / name).exists():
            return _contents(path / name)
    halves = [path / name for name in HALVES]
    for half in halves:
        if not half.exists():
            raise FileNotFoundError(
                f"{path}: no {half.name}: expected {WHOLE[0]}, or {' and '.join(HALVES)}"
            )
    return {name: x for half in halves for name, x in _contents(half).items()}


def _contents(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays in a file, by name, whatever the way in which they are nested."""
    found = torch_file.load(path)
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    tensors = {}
    for n, (name, value) in enumerate(_leaves(found, "", 0)):
        if n >= MOST_VALUES:
            raise ValueError(f"{path}: more than {MOST_VALUES} values, expected a tokenizer")
        if isinstance(value, np.ndarray):
            tensors[name] = value
    return tensors


def _leaves(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    """(name, value) of what modules hold; a module's state is the dict of its attributes."""
    if isinstance(value, Placeholder):
        value = value.state
    if not isinstance(value, dict) or depth > 20:
        yield prefix, value
        return
    yield prefix, None  # so that what is empty counts too
    for name, inner in value.items():
        if isinstance(name, str):
            if len(prefix) + len(name) > MOST_NAME:
                raise ValueError(f"a name of {len(prefix) + len(name)} characters")
            yield from _leaves(inner, f"{prefix}.{name}" if prefix else name, depth + 1)


def _shape(tensors: dict[str, np.ndarray], name: str, path: epath.Path) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(
            f"{path}: missing {name}; expected a whole discrete video tokenizer of Cosmos-Tokenizer"
        )
    shape = tensors[name].shape
    if len(shape) != 5 or 0 in shape:
        raise ValueError(f"{path}: {name} has shape {short(shape)}, expected 5 axes")
    return shape


def _downsample(path: epath.Path, asked: Any) -> tuple[int, int, int]:
    """What is asked for and what the names in `path` say, which must agree."""
    found = [_NAME.search(part) for part in path.parts]
    named = [tuple(map(int, match.groups())) for match in found if match]
    if asked is not None:
        asked = tuple(asked)
        if len(asked) != 3 or not all(type(n) is int and n > 0 for n in asked):
            raise ValueError(f"{path}: downsample={short(asked)}, expected three numbers (T, H, W)")
        if named and named[-1] != asked:
            raise ValueError(f"{path}: downsample={asked}, but its name says {named[-1]}")
        return asked
    if not named:
        raise ValueError(
            f"{path}: weights do not tell the downsampling; give downsample, for instance "
            "(4, 8, 8), as in the name DV4x8x8"
        )
    return named[-1]


def _levels(tensors: dict[str, np.ndarray], path: epath.Path) -> tuple[int, ...]:
    """The quantization's levels, which TorchScript archives hold and state_dicts do not."""
    dim = _shape(tensors, "quant_conv.conv3d.weight", path)[0]
    found = tensors.get("quantizer._levels", np.array(LEVELS))
    if found.shape != (dim,) or found.dtype.kind not in "iu":
        known = "its own" if "quantizer._levels" in tensors else "those of the published ones"
        raise ValueError(
            f"{path}: latents of {dim} dimensions, but levels of {short(found.shape)} ({known}); "
            "expected a tokenizer with finite scalar quantization"
        )
    return tuple(int(n) for n in found)
