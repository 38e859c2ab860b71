"""The objectives by their names, and how checkpoints and configurations describe them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from opensora_jax.diffusion import ddpm, flow
from opensora_jax.diffusion.objective import Objective
from opensora_jax.diffusion.on_codes import Masked, Metric
from opensora_jax.diffusion.on_embeddings import DDPM, RectifiedFlow

# By the name in the configuration.
OBJECTIVES: dict[str, type] = {kind.name: kind for kind in (RectifiedFlow, DDPM, Masked, Metric)}

# What networks of one objective or another give.
PREDICTIONS = tuple(dict.fromkeys((*flow.PREDICTIONS, *ddpm.PREDICTIONS)))


def from_fields(fields: Mapping[str, Any]) -> Objective:
    """The objective that a configuration, or a checkpoint's description, names.

    Args:
      fields: `objective`, a key of `OBJECTIVES`, and beside it the fields of that class; those that
        older descriptions lack are as they were.
    """
    kind = OBJECTIVES[fields["objective"]]
    names = [field.name for field in dataclasses.fields(kind)]
    given = {name: fields[name] for name in names if name in fields}
    if kind is DDPM and given.get("prediction") == "velocity":
        given["prediction"] = "noise"  # as older descriptions of all objectives but flow say
    return kind(**given)


def to_fields(objective: Objective) -> dict[str, Any]:
    """What `from_fields` takes, for JSON; the same keys for every objective."""
    defaults: dict[str, Any] = {}
    for kind in OBJECTIVES.values():
        defaults = dataclasses.asdict(kind()) | defaults
    return {"objective": objective.name, **defaults, **dataclasses.asdict(objective)}
