"""The one training loop, for every task.

Its order: restore, then for each step update, draw the next batch while the device is at it, log,
save, evaluate. A checkpoint holds the state after a step and the data iterator's state before the
next batch, so a resumed run is the uninterrupted one, bit by bit on the same devices.
"""

import contextlib
import dataclasses
import functools
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
from opensora_jax.train import checkpoint, summary, watch, writer
from opensora_jax.train import state as state_lib
from opensora_jax.train.preemption import Preempted, Preemption
from opensora_jax.train.state import Task, TrainState
from opensora_jax.train.step import Settings, jit_train_step

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
    with contextlib.ExitStack() as stack:

        def closing(thing):
            return stack.enter_context(contextlib.closing(thing))

        preemption = stack.enter_context(Preemption(folder.name))
        window, health = watch.Window(settings), watch.Health(settings)
        checkpoints = closing(
            checkpoint.Checkpoints(
                folder,
                keep=settings.keep_checkpoints,
                keep_every=settings.keep_every,
                config=config,
            )
        )
        best = closing(checkpoint.Best(folder))
        with preemption.interruptible():
            if checkpoints.latest_step is None:
                key = rngs.key(settings.seed, "init")
                state, _ = state_lib.create(task, tx, mesh, key, start_from())
            else:
                state, notes = checkpoints.restore(state_lib.abstract(task, tx, mesh))
                batches.set_state(notes["data"])
                window.resume(notes["window"])
                logger.info("%s: going on from step %d", folder.name, checkpoints.latest_step)
        first = int(state.step)
        log = closing(writer.MetricsWriter(folder, first))
        progress = closing(
            tqdm(
                total=settings.steps,
                initial=first,
                desc=folder.name,
                unit="step",
                disable=jax.process_index() > 0,
            )
        )
        logger.info("%s: %s", folder.name, summary.table(state))
        shardings = jax.tree.map(lambda x: x.sharding, state)
        update = jit_train_step(task, tx, schedule, settings, shardings)
        evaluate = functools.partial(_evaluate, evaluations, settings, preemption, best, log)

        def draw() -> dict[str, jax.Array]:
            return mesh_lib.shard_batch(next(batches), mesh)

        def save(step: int, data_state: Any) -> None:
            notes = {"data": data_state, "window": window.pending()}
            checkpoints.save(step, state, notes)

        if first and not checkpoint.agreed(log.has(first, EVALUATED)):
            evaluate(first, state)  # stopped between checkpoint and evaluations
        if first < settings.steps:
            batch = window.timed(draw)

        for step in range(first + 1, settings.steps + 1):
            is_last = step == settings.steps
            with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
                state, metrics = update(state, batch)
                window.add(metrics)
                data_state = batches.get_state()
                if not is_last:
                    batch = window.timed(draw)  # while the device is at this step

            if step % settings.log_every == 0 or is_last:
                values, steps = window.close()
                log.write(step, values)
                progress.set_postfix(loss=f"{values['loss']:.4f}")
                progress.update(step - progress.n)
                health.look(step, steps, checkpoints.latest_step)
                checkpoints.check()

            # First the checkpoint: an evaluation that fails must not lose what was trained.
            try:
                preemption.check(step)
                if step % settings.checkpoint_every == 0 or is_last:
                    save(step, data_state)
                window.pause(evaluate(step, state))
            except Preempted:
                if checkpoints.latest_step != step:
                    save(step, data_state)
                raise
    return state


def _evaluate(
    evaluations: Sequence[Evaluation],
    settings: Settings,
    preemption: Preemption,
    best: checkpoint.Best,
    log: writer.MetricsWriter,
    step: int,
    state: TrainState,
) -> float:
    """Runs what is due at `step`; returns the seconds that it took."""
    due = [e for e in evaluations if step % e.every == 0 or step >= settings.steps]
    if not due:
        return 0.0
    start = time.perf_counter()
    with preemption.interruptible():
        values = {k: v for evaluation in due for k, v in evaluation.run(state).items()}
    seconds = time.perf_counter() - start
    if VALIDATION_LOSS in values:
        best.offer(step, values[VALIDATION_LOSS], state)
    log.write(step, {**values, EVALUATED: seconds})
    return seconds
