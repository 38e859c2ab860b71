"""Weights of facebookresearch/DiT (https://github.com/facebookresearch/DiT) for `models.dit`.

What is the same there loads: the attention, MLP and adaLN modulation of the blocks, and the
embedding of time. What depends on the latents or on the text starts fresh.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import flax.traverse_util
import numpy as np
from etils import epath
from flax import nnx

from opensora_jax.convert import table, torch_file
from opensora_jax.files import short
from opensora_jax.models.dit import SIZES, DiT, DiTConfig

logger = logging.getLogger(__name__)


def _linear(theirs: str, ours: str, part: str = "") -> list[table.Row]:
    """A torch linear layer: its weight is (out, in), ours (in, out)."""
    return [
        (f"{theirs}.weight{part}", f"{ours}.kernel", (1, 0)),
        (f"{theirs}.bias{part}", f"{ours}.bias", None),
    ]


TABLE: list[table.Row] = [
    *_linear("t_embedder.mlp.0", "time_in"),
    *_linear("t_embedder.mlp.2", "time_out"),
    *_linear("blocks.#.attn.qkv", "blocks.attention.query", "[0/3]"),
    *_linear("blocks.#.attn.qkv", "blocks.attention.key", "[1/3]"),
    *_linear("blocks.#.attn.qkv", "blocks.attention.value", "[2/3]"),
    *_linear("blocks.#.attn.proj", "blocks.attention.out"),
    *_linear("blocks.#.mlp.fc1", "blocks.mlp.up"),
    *_linear("blocks.#.mlp.fc2", "blocks.mlp.down"),
    *_linear("blocks.#.adaLN_modulation.1", "blocks.modulation"),
]
# What belongs to their image latents and classes.
UNUSED = r"(pos_embed|x_embedder|y_embedder|final_layer)(\..*)?"


def open_blocks(path: epath.PathLike, config: DiTConfig) -> Callable[[], dict[str, Any]]:
    """Checks that a checkpoint of facebookresearch/DiT fits a DiT, reading names and shapes only.

    Args:
      path: a bare state_dict, as published, or a checkpoint of their train.py, whose averaged
        weights ("ema") are taken.
      config: of the DiT.

    Returns:
      A function that reads the weights: a part of the DiT's tree of parameters, nested dicts
      with numpy arrays. It logs what is in it and what is not.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a checkpoint; another depth, width or number of heads; a missing,
        unexpected or misshapen weight.
    """
    tensors = _state_dict(torch_file.load(path), path)
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    params = flax.traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)), sep=".")
    _check_size(tensors, config, path)
    origins = table.match(params, tensors, TABLE, source=str(path), ignored=UNUSED)

    def load() -> dict[str, Any]:
        values = {name: origin.read(tensors, params[name]) for name, origin in origins.items()}
        fresh = {name: param for name, param in params.items() if name not in values}
        unused = {name: x for name, x in tensors.items() if re.fullmatch(UNUSED, name)}
        logger.info("loaded from %s: %s", path, _summary(values))
        logger.info("starts fresh: %s", _summary(fresh))
        logger.info("in the file, but not used: %s", _summary(unused))
        return flax.traverse_util.unflatten_dict(values, sep=".")

    return load


def _state_dict(checkpoint: Any, path: epath.PathLike) -> dict[str, np.ndarray]:
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a checkpoint")
    wholes = [checkpoint[key] for key in ("ema", "model", "state_dict") if key in checkpoint]
    tensors = wholes[0] if wholes else checkpoint
    first = "blocks.0.attn.qkv.weight"
    if not isinstance(tensors, dict) or np.ndim(tensors.get(first)) != 2:
        raise ValueError(f"{path}: no matrix {first}; expected a DiT of facebookresearch/DiT")
    for name, x in tensors.items():
        if not isinstance(name, str) or not isinstance(x, np.ndarray):
            raise ValueError(
                f"{path}: {short(name)} is a {type(x).__name__}, expected only tensors"
            )
    return tensors


def _check_size(tensors: dict[str, np.ndarray], config: DiTConfig, path: epath.PathLike) -> None:
    """Raises where the sizes differ; heads show in no shape, but go with each published size."""
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    theirs = (len(blocks), tensors["blocks.0.attn.qkv.weight"].shape[-1])
    if theirs != (config.depth, config.width):
        raise ValueError(
            f"{path}: a DiT of depth {theirs[0]} and width {theirs[1]}, "
            f"expected depth {config.depth} and width {config.width} as the configuration says"
        )
    for size in SIZES.values():
        if size[:2] == theirs and size[2] != config.heads:
            raise ValueError(
                f"{path}: a DiT of {size[2]} heads, the configuration says {config.heads}"
            )


def _summary(arrays: dict[str, Any]) -> str:
    """The number of parameters, and of those in each layer."""
    sizes = Counter()
    for name, x in arrays.items():
        sizes[name.rpartition(".")[0] or name] += x.size
    layers = ", ".join(f"{layer} {size:,}" for layer, size in sizes.items())
    return f"{sizes.total():,} parameters ({layers or 'none'})"
