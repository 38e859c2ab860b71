"""Checkpoints of the train state and of the data iterator, by Orbax."""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from opensora_jax.train.state import TrainState

PyTree = Any


class Checkpoints:
    """The checkpoints of one training, under `folder`, written in the background.

    Each is complete or absent: Orbax writes under a temporary name and renames. Every field of the
    state is an item of its own, so that inference reads the averaged weights alone.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: PyTree) -> None:
        """Starts writing `state` at `step` and the (JSON) state of the data iterator."""
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self._manager.save(
            step, args=ocp.args.Composite(**items, data=ocp.args.JsonSave(data_state))
        )

    def restore(self, like: TrainState) -> tuple[TrainState, PyTree]:
        """The latest state, placed as the arrays or shapes of `like`, and the iterator's state."""
        restored = self.restore_items(_items(like))
        data = self._manager.restore(
            self.latest_step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
        )
        return like.replace(**restored), data["data"]

    def restore_items(self, like: dict[str, PyTree]) -> dict[str, PyTree]:
        """Some fields of the latest state, placed as the arrays or shapes of `like`."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in items}

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, PyTree]:
    """The fields of a state that hold anything, by name; the step counter as a tree of one leaf."""
    fields = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def write_json(path: epath.PathLike, value: PyTree) -> None:
    """Writes `value` under a temporary name and renames it: whole or absent."""
    path = epath.Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)
