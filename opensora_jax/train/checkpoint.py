"""Checkpoints of the train state and of the data iterator, by Orbax."""

import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from opensora_jax import files
from opensora_jax.train.state import TrainState

PyTree = Any

# Beside the checkpoints: the arguments of the model that was trained.
MODEL_FILE = "model.json"
FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one training, under `folder`/checkpoints, written in the background.

    Each is complete or absent: Orbax writes under a temporary name and renames. Every field of the
    state is an item of its own, so that inference reads the averaged weights alone.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        folder = epath.Path(folder).resolve() / FOLDER
        self._manager = ocp.CheckpointManager(folder, options=options)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: PyTree) -> None:
        """Starts writing `state` at `step` and the (JSON) state of the data iterator."""
        self._save(step, _items(state), data=ocp.args.JsonSave(data_state))

    def save_items(self, step: int, items: dict[str, PyTree]) -> None:
        """Starts writing some fields of a state, for `restore_items`."""
        self._save(step, items)

    def _save(self, step, items, **others):
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        self._manager.save(step, args=ocp.args.Composite(**trees, **others))

    def restore(self, like: TrainState) -> tuple[TrainState, PyTree]:
        """The latest state, placed as the arrays or shapes of `like`, and the iterator's state."""
        restored = self.restore_items(_items(like))
        data = self._manager.restore(
            self.latest_step, args=ocp.args.Composite(data=ocp.args.JsonRestore())
        )
        restored["step"] = restored["step"]["step"]
        return like.replace(**restored), data["data"]

    def restore_items(self, like: dict[str, PyTree]) -> dict[str, PyTree]:
        """Some fields of the latest state, placed as the arrays or shapes of `like`.

        Raises:
          FileNotFoundError: if there is no checkpoint.
        """
        if self.latest_step is None:
            raise FileNotFoundError(f"{self._manager.directory}: no checkpoint")
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in items}

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _items(state: TrainState) -> dict[str, PyTree]:
    """The fields of a state that hold anything, by name."""
    fields = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
    fields["step"] = {"step": state.step}  # Orbax takes trees, not single arrays
    return {name: tree for name, tree in fields.items() if jax.tree.leaves(tree)}


def claim(folder: epath.PathLike, description: dict[str, PyTree]) -> None:
    """Writes `folder`/model.json, or checks that it says the same.

    Raises:
      ValueError: naming every key in which the folder's model differs, with both values.
    """
    path = epath.Path(folder) / MODEL_FILE
    description = json.loads(json.dumps(description))
    if not path.exists():
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(path, description)
        return
    known = read_description(folder)
    keys = sorted(known.keys() | description.keys())
    different = [k for k in keys if known.get(k) != description.get(k)]
    if different:
        differences = "; ".join(
            f"{k}={description.get(k)!r}, there {known.get(k)!r}" for k in different
        )
        raise ValueError(
            f"{path.parent}: holds the training of another model: {differences}. Use another "
            "workdir, or remove that folder"
        )


def read_description(folder: epath.PathLike) -> dict[str, PyTree]:
    """What `claim` wrote.

    Raises:
      FileNotFoundError: if the folder holds no model.
    """
    path = epath.Path(folder) / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {MODEL_FILE}, so no model was trained here")
    return json.loads(path.read_text())
