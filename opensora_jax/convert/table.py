"""Foreign tensors to the parameters of our modules, by a table of names.

A row is (their name, our path, axes). A `*` in our path stands for a number that also takes the
place of the `*` in their name. A `#` in their name counts layers: those tensors are stacked on
the first axis of our parameter. `[i/n]` after their name takes the i-th of n equal parts of their
first axis. `axes` transposes their layout into ours (None: the same).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from opensora_jax.files import short

Row = tuple[str, str, tuple[int, ...] | None]
Model = TypeVar("Model", bound=nnx.Module)

_MOST_PROBLEMS = 5  # that an error names


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
      ValueError: names the first of the missing, misshapen and unexpected weights.
    """
    graph, abstract = nnx.split(nnx.eval_shape(make))
    variables = {".".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(abstract)}
    params = {name: variable for name, (_, variable) in variables.items()}
    origins = match(params, tensors, table, source=source, ignored=ignored)
    if unfilled := params.keys() - origins.keys():
        raise ValueError(f"no row of the table fills {', '.join(sorted(unfilled))}")
    filled = [
        (path, variable.replace(jnp.asarray(origins[name].read(tensors, variable))))
        for name, (path, variable) in variables.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


class Origin(NamedTuple):
    """Where a parameter comes from."""

    names: list[str]  # one a layer where it is stacked
    shape: tuple[int, ...]  # of the tensors of these names
    rows: slice | EllipsisType  # which of them it takes, on the first axis
    axes: tuple[int, ...] | None  # then how to transpose

    def read(self, tensors: Mapping[str, np.ndarray], param: Any) -> np.ndarray:
        """The value, of the shape and dtype of `param`."""
        parts = [tensors[name][self.rows] for name in self.names]
        parts = parts if self.axes is None else [part.transpose(self.axes) for part in parts]
        value = parts[0] if parts[0].shape == param.shape else np.stack(parts)
        return np.asarray(value, param.dtype)


def match(
    params: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Row],
    *,
    source: str,
    ignored: str,
) -> dict[str, Origin]:
    """The origin of each parameter that `table` has a row for.

    Args:
      params: what has a shape and a dtype, by our path.

    The other arguments, and the error, are those of `fill`.
    """
    origins = {path: _origin(path, param.shape, table) for path, param in params.items()}
    origins = {path: origin for path, origin in origins.items() if origin is not None}
    expected = {name: origin.shape for origin in origins.values() for name in origin.names}
    problems = [
        problem
        for name, shape in expected.items()
        if (problem := _problem(name, tensors, shape)) is not None
    ]
    problems += [
        f"unexpected {short(name)}"
        for name in tensors
        if name not in expected and not re.fullmatch(ignored, name)
    ]
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown):,} more")
        raise ValueError(f"{source}: the weights do not fit: {'; '.join(shown)}")
    return origins


def _origin(path: str, shape: tuple[int, ...], table: Sequence[Row]) -> Origin | None:
    """What fills our parameter `path`; None where no row does."""
    for theirs, ours, axes in table:
        found = re.fullmatch(re.escape(ours).replace(r"\*", r"(\d+)"), path)
        if found is None:
            continue
        for number in found.groups():
            theirs = theirs.replace("*", number, 1)
        theirs, part, n_parts = re.fullmatch(r"(.*?)(?:\[(\d+)/(\d+)\])?", theirs).groups()
        names = [theirs]
        if "#" in theirs:
            names = [theirs.replace("#", str(layer)) for layer in range(shape[0])]
            shape = shape[1:]
        if axes is not None:
            shape = tuple(shape[axes.index(axis)] for axis in range(len(shape)))
        rows = ...
        if part is not None:
            rows = slice(int(part) * shape[0], (int(part) + 1) * shape[0])
            shape = (int(n_parts) * shape[0], *shape[1:])
        return Origin(names, shape, rows, axes)
    return None


def _problem(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> str | None:
    if name not in tensors:
        return f"missing {short(name)} {shape}"
    if tensors[name].shape != shape:
        found = short(tensors[name].shape)
        return f"{short(name)} has shape {found}, expected {shape}"
    return None
