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
from opensora_jax import process, rngs
from opensora_jax.checkpoint.best import Best
from opensora_jax.checkpoint.manager import Checkpoints, broadcast_from_first
from opensora_jax.process import Stopped
from opensora_jax.train import monitor, preemption, summary
from opensora_jax.train import state as state_lib
from opensora_jax.train.metrics_log import MetricsWriter
from opensora_jax.train.profiler import Profiler
from opensora_jax.train.settings import LoopSettings, StepSettings, Throughput
from opensora_jax.train.state import Task, TrainState
from opensora_jax.train.step import jit_train_step

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
    settings: LoopSettings,
    step_settings: StepSettings,
    throughput: Throughput,
    loading: Callable[[], dict[str, float]] | None = None,
    evaluations: Sequence[Evaluation] = (),
    start_from: Callable[[], Mapping[str, Any]] = dict,
    config: Mapping[str, Any] | None = None,
) -> TrainState:
    """Trains to `settings.steps`, going on from the last whole checkpoint in `folder`, if any.

    Args:
      batches: a Grain iterator (`get_state`, `set_state`) of this process's share of each batch.
      loading: called at log steps; how fast batches were loaded since, to be logged beside how fast
        steps could have taken them.
      start_from: called where there is no checkpoint; gives `state.create` the parameters that a
        new training starts from, the others being random.
      config: kept with the checkpoints, for JSON.

    Returns:
      The final state, which is also the last checkpoint.

    Raises:
      FloatingPointError: too many steps in a row were not finite.
      OSError: a checkpoint could not be written, or all there are are damaged.
      Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    folder = epath.Path(folder)
    kept = {"keep": settings.keep_checkpoints, "keep_every": settings.keep_every}
    with (
        preemption.deferred(folder.name),
        contextlib.closing(Checkpoints(folder, config=config, **kept)) as checkpoints,
        contextlib.closing(Best(folder)) as best,
    ):
        window = monitor.Window(throughput, loading)
        health = monitor.Health(settings.max_skipped_steps)

        # Restore.
        with preemption.interruptible():
            if checkpoints.latest_step is None:
                key = rngs.key(step_settings.seed, "init")
                state, _ = state_lib.create(task, tx, mesh, key, start_from())
            else:
                like = state_lib.abstract(task, tx, mesh)
                items, notes = checkpoints.restore(state_lib.to_items(like))
                state = state_lib.from_items(like, items)
                batches.set_state(notes["data"])
                window.resume(notes["window"])
                logger.info("%s: going on from step %d", folder.name, checkpoints.latest_step)
        logger.info("%s: %s", folder.name, summary.table(state))
        done = saved = int(state.step)
        if done > settings.steps:
            logger.warning(
                "%s: the checkpoint is of step %d, beyond steps=%d: nothing is left to train",
                *(folder.name, done, settings.steps),
            )
        shardings = jax.tree.map(lambda x: x.sharding, state)
        train_step = jit_train_step(task, tx, schedule, step_settings, shardings)
        compiled: dict[tuple, Callable] = {}  # by the shapes of the batch

        with (
            contextlib.closing(MetricsWriter(folder, done)) as log,
            contextlib.closing(Profiler(folder, settings.profile, done)) as profiler,
            tqdm(
                total=settings.steps,
                initial=done,
                desc=folder.name,
                unit="step",
                disable=jax.process_index() > 0,
            ) as progress,
        ):
            evaluated: list[tuple[int, dict[str, float]]] = []

            def draw() -> dict[str, jax.Array]:
                with jax.transfer_guard_host_to_device("allow"):  # the one transfer there is to be
                    return mesh_lib.shard_batch(next(batches), mesh)

            def shapes_of(batch: dict[str, jax.Array]) -> tuple:
                return tuple((name, batch[name].shape) for name in sorted(batch))

            def update_for(batch: dict[str, jax.Array]) -> Callable:
                shapes = shapes_of(batch)
                if shapes not in compiled:
                    start = time.perf_counter()
                    with preemption.interruptible(), jax.set_mesh(mesh):
                        compiled[shapes] = train_step.lower(state, batch).compile()
                    window.pause(time.perf_counter() - start)
                return compiled[shapes]

            def save(step: int) -> None:
                nonlocal saved
                if step < settings.steps and int(state.skipped["in_a_row"]) >= step - saved:
                    return  # nothing came of the steps since: it would push a good one out
                saved = step
                settle()
                log.flush()  # a run that goes on from here does not log these steps again
                notes = {"data": data_state, "window": window.pending()}
                checkpoints.save(step, state_lib.to_items(state), notes)

            def preserve(step: int) -> None:
                """Sees that nothing is lost where a signal may end the process at once."""
                if jax.process_count() == 1:
                    if step > saved:
                        save(step)
                    checkpoints.wait()

            def evaluate(step: int) -> None:
                is_last = step >= settings.steps
                due = [e for e in evaluations if step % e.every == 0 or is_last]
                if not due:
                    return
                preserve(step)
                start = time.perf_counter()
                with preemption.interruptible():
                    values = {k: v for evaluation in due for k, v in evaluation.run(state).items()}
                seconds = time.perf_counter() - start
                window.pause(seconds)
                if VALIDATION_LOSS in values:
                    best.save_if_better(step, values[VALIDATION_LOSS], {"ema": state.ema})
                evaluated.append((step, {**values, EVALUATED: seconds}))

            def settle() -> None:
                """Logs evaluations once their best weights are whole, or a kill would lose them."""
                if evaluated:
                    best.wait()
                while evaluated:
                    log.write(*evaluated.pop(0))

            if done and not broadcast_from_first(log.has(done, EVALUATED)):
                evaluate(done)  # the run before stopped between checkpoint and evaluations
            if done < settings.steps:
                batch = window.timed(draw)
                update = update_for(batch)

            for step in range(done + 1, settings.steps + 1):
                is_last = step == settings.steps
                profiler.start_before(step)
                with (
                    jax.set_mesh(mesh),
                    jax.transfer_guard("disallow"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, metrics = update(state, batch)
                    window.add(metrics)
                    data_state = batches.get_state()
                    if not is_last:
                        batch = window.timed(draw)  # while the device is at this step
                profiler.stop_after(step, metrics)

                if step % settings.log_every == 0 or is_last:
                    values, steps = window.close()
                    settle()
                    log.write(step, values)
                    progress.set_postfix(loss=f"{values['loss']:.4f}")
                    progress.update(step - progress.n)
                    health.check(step, steps, checkpoints.latest_step)
                    checkpoints.check()

                # First the checkpoint: an evaluation that fails must not lose what was trained.
                try:
                    preemption.check()
                    if step % settings.checkpoint_every == 0 or is_last:
                        save(step)
                    evaluate(step)
                    if not is_last:
                        if shapes_of(batch) not in compiled:
                            preserve(step)
                        update = update_for(batch)
                except Stopped:
                    if saved != step:
                        save(step)
                    checkpoints.wait()
                    seconds = process.seconds_since_signal()
                    after = f", {seconds:.1f} s after the signal" if seconds else ""
                    logger.warning("%s: saved at step %d%s", folder.name, saved, after)
                    raise
            settle()
        return state
