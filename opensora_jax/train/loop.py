"""The one training loop, for every task.

Its order: restore, then for each step draw a batch, update, log, save, evaluate. A checkpoint is
taken after a step with the data iterator's state right then, so a resumed run sees the next batch.
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
from opensora_jax.train import checkpoint, summary, writer
from opensora_jax.train import state as state_lib
from opensora_jax.train.state import Task, TrainState
from opensora_jax.train.step import Metrics, Settings, jit_train_step

logger = logging.getLogger(__name__)


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
) -> TrainState:
    """Trains to `settings.steps`, going on from the last checkpoint in `folder` if there is one.

    Args:
      batches: a Grain iterator (`get_state`, `set_state`) of this process's share of each batch.
      start_from: called where there is no checkpoint; gives `state.create` the parameters that a
        new training starts from, the others being random.

    Returns:
      The final state, which is also the last checkpoint.

    Raises:
      FloatingPointError: at a log or checkpoint step whose loss or gradient norm is not finite.
    """
    folder = epath.Path(folder)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(folder)))
        is_new = checkpoints.latest_step is None
        key = rngs.key(settings.seed, "init")
        state, shardings = state_lib.create(task, tx, mesh, key, start_from() if is_new else None)
        if not is_new:
            state, data_state = checkpoints.restore(state)
            batches.set_state(data_state)
            logger.info("%s: going on from step %d", folder.name, int(state.step))
        logger.info("%s: %s", folder.name, summary.table(state))
        update = jit_train_step(task, tx, schedule, settings, shardings)
        first = int(state.step)
        log = stack.enter_context(contextlib.closing(writer.MetricsWriter(folder, first)))
        progress = tqdm(
            total=settings.steps,
            initial=first,
            desc=folder.name,
            unit="step",
            disable=jax.process_index() > 0,
        )
        stack.enter_context(progress)
        window = _Window(settings)

        def evaluate(step: int, is_last: bool) -> None:
            for evaluation in evaluations:
                if step % evaluation.every == 0 or is_last:
                    values = window.paused(functools.partial(evaluation.run, state))
                    if values:
                        log.write(step, values)

        if first >= settings.steps:  # stopped between the last checkpoint and its evaluations
            evaluate(first, is_last=True)

        for step in range(first + 1, settings.steps + 1):
            batch = window.timed(lambda: mesh_lib.shard_batch(next(batches), mesh))
            with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
                state, metrics = update(state, batch)
            window.add(metrics)
            is_last = step == settings.steps

            if step % settings.log_every == 0 or is_last:
                values = window.close()
                log.write(step, values)
                progress.set_postfix(loss=f"{values['loss']:.4f}")
                progress.update(step - progress.n)
                _check_finite(step, values, checkpoints.latest_step)

            # First the checkpoint: an evaluation that fails must not lose what was trained.
            if step % settings.checkpoint_every == 0 or is_last:
                # A state that is not finite must not replace one that is.
                _check_finite(step, jax.device_get(metrics), checkpoints.latest_step)
                checkpoints.save(step, state, batches.get_state())

            evaluate(step, is_last)
    return state


class _Window:
    """What happened since the last log step; only `close` waits for the device."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._restart()

    def _restart(self):
        self._pending, self._waited, self._since = [], 0.0, time.perf_counter()

    def timed(self, draw: Callable[[], Any]) -> Any:
        """The result of `draw`; its time counts as waiting for data."""
        start = time.perf_counter()
        batch = draw()
        self._waited += time.perf_counter() - start
        return batch

    def paused(self, evaluate: Callable[[], Any]) -> Any:
        """The result of `evaluate`; its time does not count."""
        start = time.perf_counter()
        result = evaluate()
        self._since += time.perf_counter() - start
        return result

    def add(self, metrics: Metrics) -> None:
        self._pending.append(metrics)

    def close(self) -> dict[str, float]:
        """Means over the window's steps, with speeds; starts a new window."""
        values = jax.device_get(self._pending)
        means = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        means["learning_rate"] = float(values[-1]["learning_rate"])
        elapsed = time.perf_counter() - self._since
        means["tokens_per_second"] = self._settings.tokens_per_step * len(values) / elapsed
        means["data_wait_share"] = self._waited / elapsed
        self._restart()
        return means


def _check_finite(step: int, values: dict[str, Any], last_checkpoint: int | None) -> None:
    for name in ("loss", "grad_norm"):
        if not np.isfinite(values[name]):
            raise FloatingPointError(
                f"{name}={values[name]} at step {step}: expected a finite number. The last "
                f"checkpoint is of step {last_checkpoint}; try a lower learning rate."
            )
