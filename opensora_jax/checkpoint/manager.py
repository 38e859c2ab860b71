"""Checkpoints of named pytrees, by Orbax.

Which ones stay is decided here, not by Orbax's CheckpointManager: that strikes old ones off its
list when a new one starts to be written, so that a write that fails loses sight of the last whole
one; it tells of the failure only when the next is saved; and it takes damaged ones for whole.
"""

import contextlib
import functools
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from opensora_jax import files, runtime
from opensora_jax.checkpoint import checksums, leftovers, quiet, record
from opensora_jax.mesh import PyTree

logger = logging.getLogger(__name__)

# Beside the checkpoints: the arguments of the model that was trained.
MODEL_FILE = "model.json"
FOLDER = "checkpoints"
BEST = "best"

# Fields of a configuration that decide which examples are in which batch.
_ORDER = ("seed", "batch_size", "validation_share", "n_latent_frames")

# Bytes that are on their way to the disk, by whose they are.
_being_written: dict[int, int] = {}
_ABOUT = "about"

quiet.silence()


class _SummingHandler(ocp.CompositeCheckpointHandler):
    """Items whose writing ends, in each process, with the sums of what that process wrote."""

    async def async_save(self, directory: epath.Path, args: ocp.args.Composite) -> list[Any]:
        written = await super().async_save(directory, args)
        sum_own = functools.partial(checksums.write_own, directory, jax.process_index())
        return [ocp.future.ChainedFuture(written, sum_own)]


@ocp.args.register_with_handler(_SummingHandler, for_save=True, for_restore=True)
class _SummedItems(ocp.args.Composite):
    """Which Orbax wants to know of every handler; it takes the plain ones as well."""


class Checkpoints:
    """The checkpoints of one training, under `folder`/`name`, written in the background.

    Each is complete or absent: Orbax writes under a temporary name and renames. It holds items,
    pytrees of arrays with a name each, so that one can be read without the others; and with them
    notes, the configuration, versions, and checksums of all files.

    What is half-written or damaged in the folder is told and put aside, so that the last whole one
    is what `latest_step` says.

    Args:
      keep: how many of the last ones stay.
      keep_every: those of its multiples stay for good; 0: none.
      config: what is kept with each, for JSON; on resuming, changes are logged.
      may_start_over: where all are damaged, to go on without one instead of raising.

    Raises:
      FileNotFoundError: there are checkpoints, all of them damaged.
      OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        name: str = FOLDER,
        keep: int = 2,
        keep_every: int = 0,
        config: Mapping[str, Any] | None = None,
        may_start_over: bool = False,
    ):
        self._folder = files.absolute(folder) / name
        self._keep, self._keep_every = keep, keep_every
        self._run = {"config": record.as_json(config or {}), "versions": record.versions()}
        if jax.process_index() == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            leftovers.remove_half_written(self._folder)
        self.latest_step = _last_whole(self._folder, put_aside=True, may_start_over=may_start_over)
        self._kept = sorted(ocp.utils.checkpoint_steps(self._folder))
        self._remove_old()  # the run before may have ended before it did
        self._step, self._writing = 0, None  # of the one that is being written, and its folder
        self._checkpointer = ocp.AsyncCheckpointer(
            _SummingHandler(),
            async_options=ocp.AsyncOptions(
                # In the background, a folder that cannot be made leaves others waiting for it.
                create_directories_asynchronously=False,
                post_finalization_callback=self._add_checksums,
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=name
            ),
        )

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        notes: PyTree = None,
        *,
        number: int | None = None,
    ) -> None:
        """Starts writing `items` at `step`, and notes: what else belongs to them, for JSON.

        Args:
          number: names its folder where a step may come twice; by default the step does.

        Raises:
          OSError: this one, or the one before it in the background, could not be written.
        """
        self.wait()
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        about = {"run": self._run, "arrays": record.arrays(items), "notes": notes}
        self._step, self._writing = step, step if number is None else number
        with self._explaining():
            self._expect_room(items)
            self._checkpointer.save(
                self._folder / str(self._writing),
                args=ocp.args.Composite(**trees, **{_ABOUT: ocp.args.JsonSave(about)}),
            )
        self.latest_step = self._writing

    def restore(self, like: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], PyTree]:
        """Items of the latest one, placed as the arrays or shapes of `like`, and its notes.

        Raises:
          ValueError: it is of other arrays than `like`: another optimizer's, say.
        """
        items, about = _restore(self._folder, self.latest_step, like, self._run)
        changed = files.changes(self._run, about["run"])
        if changed:
            logger.info("%s: since then changed: %s", self._folder, "; ".join(changed))
        data = [c for c in changed if c.partition("=")[0].rpartition(".")[2] in _ORDER]
        if data:
            logger.warning(
                "%s: changed since step %d: %s. Batches from here on are others: examples of this "
                "epoch may come twice or not at all",
                *(self._folder, self.latest_step, "; ".join(data)),
            )
        return items, about["notes"]

    def notes(self) -> PyTree:
        """Those of the latest checkpoint."""
        return _restore(self._folder, self.latest_step, {}, self._run)[1]["notes"]

    def check(self) -> None:
        """Tells what went wrong in the background, without waiting for it.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        with self._explaining():
            self._checkpointer.check_for_errors()
            if self._writing is not None:
                path = self._folder / str(self._writing)
                if path.exists() and ocp.utils.is_checkpoint_finalized(path):
                    self._written()

    def wait(self) -> None:
        """Waits for what is being written.

        Raises:
          OSError: it could not be written.
        """
        with self._explaining():
            self._checkpointer.wait_until_finished()
            if self._writing is not None:
                self._written()

    def close(self) -> None:
        """Waits for what is being written, and ends."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _written(self) -> None:
        _being_written.pop(id(self), None)
        self._kept.append(self._writing)
        self._writing = None
        if jax.process_index() == 0:
            files.sync(self._folder)
        self._remove_old()

    def _remove_old(self) -> None:
        last = set(self._kept[-self._keep :])
        removed = [
            step
            for step in self._kept
            if step not in last and not (self._keep_every and step % self._keep_every == 0)
        ]
        for step in removed:
            self._kept.remove(step)
            if jax.process_index() == 0:
                leftovers.remove(self._folder / str(step))

    def _add_checksums(self) -> None:
        """Called by process 0 when all is written and, but on object stores, not yet renamed."""
        temporary = self._folder / f"{self._writing}{leftovers.TEMPORARY}"
        checksums.write(temporary if temporary.exists() else self._folder / str(self._writing))

    def _expect_room(self, items: Mapping[str, PyTree]) -> None:
        """Asks before Orbax starts: in the middle it would fail with many words."""
        if files.is_remote(self._folder):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(items))
        # Others, the best say, may be at their files just now.
        others = sum(size for owner, size in _being_written.items() if owner != id(self))
        _being_written[id(self)] = needed
        free = shutil.disk_usage(self._folder).free
        if needed + others > free:
            also = f" beside {others / 1e6:.1f} MB that are being written" if others else ""
            raise OSError(
                f"it needs up to {needed / 1e6:.1f} MB{also}, the disk has {free / 1e6:.1f} MB"
            )

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Makes one clear error of what Orbax and TensorStore raise."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._writing = None
            _being_written.pop(id(self), None)
            last = f"{self._folder.name}/{self._kept[-1]}" if self._kept else ""
            kept = f"The last whole one is {last}. " if last else ""
            # TensorStore names every file on the way; the cause comes last.
            reason = str(error).partition(" [tensorstore_spec=")[0].rpartition('": ')[2]
            raise OSError(
                f"{self._folder}: the checkpoint of step {self._step} could not be written: "
                f"{reason}. {kept}Make room, or give write permission, and run again"
            ) from error


def restore_items(
    folder: epath.PathLike,
    like: Mapping[str, PyTree],
    *,
    name: str = FOLDER,
    step: int | None = None,
) -> dict[str, PyTree]:
    """Items of a checkpoint in `folder`, placed as `like`, arrays or shapes.

    Args:
      step: of the checkpoint; None: the last that is whole.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is of other arrays.
    """
    folder = files.absolute(folder) / name
    if step is None:
        step = _last_whole(folder, items=(*like, _ABOUT))
    elif not (folder / str(step)).exists():
        there = sorted(ocp.utils.checkpoint_steps(folder))
        raise FileNotFoundError(f"{folder}: no step {step}: expected one of {there}")
    if step is None:
        raise FileNotFoundError(f"{folder}: no checkpoint")
    return _restore(folder, step, like, None)[0]


def latest_step(folder: epath.PathLike, *, name: str = FOLDER) -> int:
    """The step of the checkpoint that `restore_items` reads.

    Raises:
      FileNotFoundError: there is none.
    """
    folder = files.absolute(folder) / name
    step = _last_whole(folder)
    if step is None:
        raise FileNotFoundError(f"{folder}: no checkpoint")
    return step


def read_config(folder: epath.PathLike) -> dict[str, Any]:
    """What the last checkpoint in `folder` says of the configuration; empty where there is none."""
    folder = files.absolute(folder) / FOLDER
    step = _last_whole(folder, items=(_ABOUT,), may_start_over=True)
    return {} if step is None else _restore(folder, step, {}, None)[1]["run"]["config"]


def broadcast_from_first(value: int) -> int:
    """Process 0's value, in every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _last_whole(
    folder: epath.Path,
    *,
    items: tuple[str, ...] | None = None,
    put_aside: bool = False,
    may_start_over: bool = False,
) -> int | None:
    """The last step whose files are as they were written; None: no step.

    The steps are those that process 0 sees; every process looks at a share of their files.

    Args:
      items: those that are to be whole; all by default.
      put_aside: whether damaged ones after it are renamed, out of the way of new ones.
    """
    whole, damaged = -1, []
    is_first = jax.process_index() == 0
    there = sorted(ocp.utils.checkpoint_steps(folder), reverse=True) if is_first else []
    share = jax.process_index(), jax.process_count()
    for i in range(broadcast_from_first(len(there))):
        step = broadcast_from_first(there[i] if is_first else 0)
        problem = runtime.first_text(checksums.damage(folder / str(step), items, share=share))
        if problem is None:
            whole = step
            break
        damaged.append(step)
        logger.warning("%s/%d: this checkpoint is damaged: %s", folder, step, problem)
    if whole < 0 and damaged and not may_start_over:
        raise FileNotFoundError(
            f"{folder}: every checkpoint is damaged ({', '.join(map(str, sorted(damaged)))}); put "
            "back whole ones, or remove the folder to start again"
        )
    for step in damaged if put_aside and is_first else ():
        aside = folder / f"damaged-{step}"
        aside.rmtree(missing_ok=True)
        (folder / str(step)).rename(aside)
        logger.warning("%s: renamed to %s; going on without it", step, aside)
    return None if whole < 0 else whole


def _restore(
    folder: epath.Path, step: int, like: Mapping[str, PyTree], run: dict[str, Any] | None
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """(items, what was saved about them); `run` is what reads, to tell how it differs."""
    path = folder / str(step)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        there = reader.restore(path, args=ocp.args.Composite(**{_ABOUT: ocp.args.JsonRestore()}))
        there = there[_ABOUT]
        if not isinstance(there, dict) or not all(
            isinstance(there.get(name), dict) for name in ("run", "arrays")
        ):
            raise ValueError(f"{path}/{_ABOUT}: expected what a training says of itself")
        wanted = record.arrays(like)
        found = {k: v for k, v in there["arrays"].items() if k.partition("/")[0] in like}
        different = files.changes(wanted, found)
        if different:
            also = files.changes(run, there["run"]) if run else []
            raise ValueError(
                f"{path}: holds the state of another training; {len(different)} arrays differ: "
                f"{'; '.join(different[:2] + also[:5])}. Use another workdir, or the old settings"
            )
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        restored = reader.restore(path, args=ocp.args.Composite(**items)) if items else {}
    return {name: restored[name] for name in items}, there


def record_model(
    folder: epath.PathLike, description: dict[str, PyTree], new_keys: Sequence[str] = ()
) -> None:
    """Writes `folder`/model.json, or checks that it says the same.

    Args:
      new_keys: which files of older versions lack; such a file is left as it is.

    Raises:
      ValueError: naming every key in which the folder's model differs, with both values.
    """
    path = epath.Path(folder) / MODEL_FILE
    if path.exists():
        found = files.read_json(path)
        there = {k: v for k, v in description.items() if k in found or k not in new_keys}
        files.expect_settings(path, there, found)
    elif jax.process_index() == 0:
        files.record_settings(path, description)


def read_model(folder: epath.PathLike) -> dict[str, PyTree]:
    """What `record_model` wrote.

    Raises:
      FileNotFoundError: if the folder holds no model.
    """
    path = epath.Path(folder) / MODEL_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path.parent}: no {MODEL_FILE}, so no model was trained here")
    return files.read_json(path)
