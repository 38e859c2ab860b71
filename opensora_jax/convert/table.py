"""Foreign tensors to the parameters of our modules, by a table of names.

A row is (their name, our path, axes). A `*` in our path stands for a number that also takes the
place of the `*` in their name. A `#` in their name counts layers: those tensors are stacked on
the first axis of our parameter. `axes` transposes their layout into ours (None: the same).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Row = tuple[str, str, tuple[int, ...] | None]
Model = TypeVar("Model", bound=nnx.Module)


def fill(
    make: Callable[[], Model],
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Row],
    *,
    source: str,
    ignored: str = r"(?!)",
) -> Model:
    """The module that `make` constructs, holding `tensors`.

    Args:
        make: constructor without arguments; only its shapes are evaluated.
        tensors: arrays by their name, cast to the dtype of the parameter they fill.
        table: one row for every parameter, see the top of this file.
        source: the file or folder that errors name.
        ignored: regular expression of the names that have no place in the module.

    Raises:
        ValueError: names every missing, unexpected and misshapen weight.
    """
    graph, abstract = nnx.split(nnx.eval_shape(make))
    problems, used, values = [], set(), []
    for path, variable in nnx.to_flat_state(abstract):
        names, shape, axes = _sources(".".join(map(str, path)), variable.shape, table)
        used.update(names)
        wrong = [_problem(name, tensors, shape) for name in names]
        problems += filter(None, wrong)
        if not any(wrong):
            parts = [tensors[name] for name in names]
            parts = parts if axes is None else [part.transpose(axes) for part in parts]
            value = parts[0] if parts[0].shape == variable.shape else np.stack(parts)
            values.append((path, variable.replace(jnp.asarray(value, variable.dtype))))
    problems += [
        f"unexpected {name}"
        for name in tensors
        if name not in used and not re.fullmatch(ignored, name)
    ]
    if problems:
        raise ValueError(f"{source}: the weights do not fit: " + "; ".join(problems))
    return nnx.merge(graph, nnx.from_flat_state(values))


def _sources(
    path: str, shape: tuple[int, ...], table: Sequence[Row]
) -> tuple[list[str], tuple[int, ...], tuple[int, ...] | None]:
    """Names and shape of the tensors that fill our parameter `path`, and how to transpose them."""
    for theirs, ours, axes in table:
        match = re.fullmatch(re.escape(ours).replace(r"\*", r"(\d+)"), path)
        if match is None:
            continue
        for number in match.groups():
            theirs = theirs.replace("*", number, 1)
        names = [theirs]
        if "#" in theirs:
            names = [theirs.replace("#", str(layer)) for layer in range(shape[0])]
            shape = shape[1:]
        if axes is not None:
            shape = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        return names, shape, axes
    raise ValueError(f"parameter {path}: no row of the table fills it")


def _problem(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> str | None:
    if name not in tensors:
        return f"missing {name} {shape}"
    if tensors[name].shape != shape:
        return f"{name} has shape {tensors[name].shape}, expected {shape}"
    return None
