"""The one training loop, for every task.

Its order: restore, then for each step update, draw the next batch while the device is at it, log,
save, evaluate. A checkpoint holds the state after a step and the data iterator's state before the
next batch, so a resumed run is the uninterrupted one, bit by bit on the same devices.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from opensora_jax import mesh as mesh_lib
from opensora_jax import rngs
from opensora_jax.checkpoint.manager import Best, Checkpoints, broadcast_from_first
from opensora_jax.train import metrics_log, monitor, summary
from opensora_jax.train import state as state_lib
from opensora_jax.train.preemption import Preempted, Preemption
from opensora_jax.train.state import Task, TrainState
from opensora_jax.train.step import Metrics, Settings, jit_train_step

logger = logging.getLogger(__name__)

# The scalar by which evaluations say how good the averaged weights are: the lowest is kept.
VALIDATION_LOSS = "validation_loss"
# Logged when the evaluations of a step are done.
EVALUATED = "evaluation_seconds"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """`run(state)` every `every` steps and after the last; it returns scalars to log."""

    every: int
    run: Callable[[TrainState], dict[str, float]]


def fit(
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    mesh: Mesh,
    folder: epath.PathLike,
    settings: Settings,
    evaluations: Sequence[Evaluation] = (),
    start_from: Callable[[], Mapping[str, Any]] = dict,
    config: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains to `settings.steps`, going on from the last whole checkpoint in `folder`, if any.

    Args:
      batches: a Grain iterator (`get_state`, `set_state`) of this process's share of each batch.
      start_from: called where there is no checkpoint; gives `state.create` the parameters that a
        new training starts from, the others being random.
      config: kept with the checkpoints, for JSON.

    Returns:
      The final state, which is also the last checkpoint.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
      OSError: a checkpoint could not be written, or all there are are damaged.
      Preempted: SIGTERM came; the state is saved.
    """
    folder = epath.Path(folder)
    kept = {"keep": settings.keep_checkpoints, "keep_every": settings.keep_every}
    with (
        Preemption(folder.name) as preemption,
        contextlib.closing(Checkpoints(folder, config=config, **kept)) as checkpoints,
        contextlib.closing(Best(folder)) as best,
    ):
        window = monitor.Window(settings)
        with preemption.interruptible():
            if checkpoints.latest_step is None:
                key = rngs.key(settings.seed, "init")
                state, _ = state_lib.create(task, tx, mesh, key, start_from())
            else:
                state, notes = checkpoints.restore(state_lib.abstract(task, tx, mesh))
                batches.set_state(notes["data"])
                window.resume(notes["window"])
                logger.info("%s: going on from step %d", folder.name, checkpoints.latest_step)
        logger.info("%s: %s", folder.name, summary.table(state))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        update = jit_train_step(task, tx, schedule, settings, shardings)
        first = int(state.step)
        log = metrics_log.MetricsWriter(folder, first)
        with tqdm(
            total=settings.steps,
            initial=first,
            desc=folder.name,
            unit="step",
            disable=jax.process_index() > 0,
        ) as progress:
            loop = _Loop(
                update=update,
                batches=batches,
                mesh=mesh,
                settings=settings,
                evaluations=evaluations,
                preemption=preemption,
                checkpoints=checkpoints,
                best=best,
                log=log,
                progress=progress,
                window=window,
                health=monitor.Health(settings),
            )
            return loop.run(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loop:
    """The steps of one run, with what `fit` made for them."""

    update: Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]
    batches: Iterator[dict[str, np.ndarray]]
    mesh: Mesh
    settings: Settings
    evaluations: Sequence[Evaluation]
    preemption: Preemption
    checkpoints: Checkpoints
    best: Best
    log: metrics_log.MetricsWriter
    progress: tqdm
    window: monitor.Window
    health: monitor.Health

    def run(self, state: TrainState) -> TrainState:
        """The state after the last step."""
        settings, first = self.settings, int(state.step)
        if first and not broadcast_from_first(self.log.has(first, EVALUATED)):
            self._evaluate(first, state)  # stopped between checkpoint and evaluations
        if first < settings.steps:
            batch = self.window.timed(self._draw)

        for step in range(first + 1, settings.steps + 1):
            is_last = step == settings.steps
            with jax.set_mesh(self.mesh), jax.transfer_guard("disallow"):
                state, metrics = self.update(state, batch)
                self.window.add(metrics)
                data_state = self.batches.get_state()
                if not is_last:
                    batch = self.window.timed(self._draw)  # while the device is at this step

            if step % settings.log_every == 0 or is_last:
                self._report(step)
            # First the checkpoint: an evaluation that fails must not lose what was trained.
            try:
                self.preemption.check(step)
                if step % settings.checkpoint_every == 0 or is_last:
                    self._save(step, state, data_state)
                self._evaluate(step, state)
            except Preempted:
                if self.checkpoints.latest_step != step:
                    self._save(step, state, data_state)
                raise
        return state

    def _draw(self) -> dict[str, jax.Array]:
        with jax.transfer_guard_host_to_device("allow"):  # the one transfer there is to be
            return mesh_lib.shard_batch(next(self.batches), self.mesh)

    def _report(self, step: int) -> None:
        """Logs the steps since the last time, and looks whether all is well with them."""
        values, steps = self.window.close()
        self.log.write(step, values)
        self.progress.set_postfix(loss=f"{values['loss']:.4f}")
        self.progress.update(step - self.progress.n)
        self.health.check(step, steps, self.checkpoints.latest_step)
        self.checkpoints.check()

    def _save(self, step: int, state: TrainState, data_state: Any) -> None:
        notes = {"data": data_state, "window": self.window.pending()}
        self.checkpoints.save(step, state, notes)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Runs what is due at `step`, and logs it."""
        is_last = step >= self.settings.steps
        due = [e for e in self.evaluations if step % e.every == 0 or is_last]
        if not due:
            return
        start = time.perf_counter()
        with self.preemption.interruptible():
            values = {k: v for evaluation in due for k, v in evaluation.run(state).items()}
        seconds = time.perf_counter() - start
        self.window.pause(seconds)
        if VALIDATION_LOSS in values:
            self.best.save_if_better(step, values[VALIDATION_LOSS], state)
        self.log.write(step, {**values, EVALUATED: seconds})
