"""What the training loop keeps an eye on between log steps: means, speeds, numerical health."""

import collections
import logging
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from opensora_jax.train.settings import Throughput
from opensora_jax.train.step import Metrics

logger = logging.getLogger(__name__)

# A gradient norm so many times the median of the last ones is a spike.
SPIKE = 10.0
# Norms that the median is of: at least, at most.
_FEWEST, _MOST = 20, 1000

# Counters, whose means say nothing.
_COUNTERS = ("skipped_steps", "skipped_in_a_row")


class Window:
    """The steps since the last log step.

    `close` and `pending` alone fetch numbers from the device; `add` only keeps the host from
    running ahead of it by more than two steps.

    Args:
      loading: of `loop.fit`.
    """

    def __init__(
        self, throughput: Throughput, loading: Callable[[], dict[str, float]] | None = None
    ):
        self._throughput, self._loading = throughput, loading
        self._restart([])

    def _restart(self, steps: list[Metrics]) -> None:
        self._steps, self._n_before = steps, len(steps)
        self._waited, self._since = 0.0, time.perf_counter()
        self._sizes: list[int] = []

    def timed(self, draw: Callable[[], Any]) -> Any:
        """The result of `draw`; its time counts as waiting if the device ran out of work."""
        start = time.perf_counter()
        batch = draw()
        if self._loading is not None:
            self._sizes.append(len(jax.tree.leaves(batch)[0]))
        running = self._steps[-1]["loss"] if self._steps else None
        if not isinstance(running, jax.Array) or running.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def pause(self, seconds: float) -> None:
        """Leaves out time that was spent on something else."""
        self._since += seconds

    def add(self, metrics: Metrics) -> None:
        self._steps.append(metrics)
        if len(self._steps) > 1:
            # The device has the next step queued already; so it never waits, but batches do not
            # pile up on it either, and a request to stop is met after two steps.
            jax.block_until_ready(self._steps[-2])

    def pending(self) -> list[dict[str, float]]:
        """The steps so far, for a checkpoint: means are to come out the same after resuming."""
        self._steps = _fetch(self._steps)
        return [{name: float(value) for name, value in step.items()} for step in self._steps]

    def resume(self, pending: list[dict[str, float]]) -> None:
        """Starts with the steps that `pending` gave."""
        self._restart([{k: np.float32(v) for k, v in step.items()} for step in pending])

    def close(self) -> tuple[dict[str, float], list[dict[str, np.float32]]]:
        """(means over the steps that were not skipped, and speeds; each step): a new window."""
        steps = _fetch(self._steps)
        good = [step for step in steps if not step["skipped_in_a_row"]] or steps
        values = {
            name: float(np.mean([step[name] for step in good]))
            for name in steps[0]
            if name not in _COUNTERS
        }
        values["grad_norm_max"] = float(max(step["grad_norm"] for step in good))
        values["learning_rate"] = float(steps[-1]["learning_rate"])
        values["skipped_steps"] = int(steps[-1]["skipped_steps"])
        values |= self._speeds(len(steps) - self._n_before)
        self._restart([])
        return values, steps

    def _speeds(self, n: int) -> dict[str, float]:
        elapsed, throughput = time.perf_counter() - self._since, self._throughput
        speeds = {
            "tokens_per_second": n * throughput.tokens_per_step / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        if self._loading is not None and self._sizes:
            rows = n * float(np.mean(self._sizes))
            # Of a loader that is never waited for.
            speeds["rows_needed_per_second"] = rows / max(elapsed - self._waited, 1e-9)
            speeds |= self._loading()
        if throughput.flops_per_step:
            flops = n * throughput.flops_per_step / elapsed / jax.device_count()
            speeds["tflops_per_device"] = flops / 1e12
            if throughput.peak_flops:
                speeds["mfu"] = flops / throughput.peak_flops
        return speeds


def _fetch(steps: list[Metrics]) -> list[dict[str, np.float32]]:
    return [{k: np.float32(v) for k, v in step.items()} for step in jax.device_get(steps)]


class Health:
    """Tells of skipped steps and of spikes of the gradient, and when to give up.

    Args:
      max_skipped_steps: so many in a row end the training.
    """

    def __init__(self, max_skipped_steps: int):
        self._most_skipped = max_skipped_steps
        self._norms = collections.deque(maxlen=_MOST)

    def check(
        self, last: int, steps: list[dict[str, np.float32]], last_checkpoint: int | None
    ) -> None:
        """Looks at the steps that ended with number `last`.

        Raises:
          FloatingPointError: too many in a row were not finite.
        """
        numbered = list(enumerate(steps, start=last - len(steps) + 1))
        skipped = [(i, step) for i, step in numbered if step["skipped_in_a_row"]]
        if skipped:
            i, step = skipped[-1]
            said = f"loss={step['loss']}, gradient norm={step['grad_norm']}"
            logger.warning(
                "step %d was not finite (%s) and left out, as %d of the last %d steps, %d in all",
                *(i, said, len(skipped), len(steps), step["skipped_steps"]),
            )
            in_a_row = max(int(step["skipped_in_a_row"]) for _, step in skipped)
            if in_a_row >= self._most_skipped:
                kept = "There is no checkpoint yet"
                if last_checkpoint is not None:
                    kept = f"The last good checkpoint is of step {last_checkpoint}"
                raise FloatingPointError(
                    f"step {i}: {in_a_row} steps in a row were not finite ({said}), and none of "
                    f"them changed the model. {kept}. Try a lower learning_rate or clip_norm, a "
                    "longer warmup_steps or dtype=float32, or look for what is wrong with the data"
                )
        norms = {i: step["grad_norm"] for i, step in numbered if not step["skipped_in_a_row"]}
        if norms and len(self._norms) >= _FEWEST:
            median, worst = np.median(self._norms), max(norms, key=norms.get)
            if norms[worst] > SPIKE * median:
                logger.warning(
                    "step %d: a spike: gradient norm %.3g; the last %d steps' median is %.3g",
                    *(worst, norms[worst], len(self._norms), median),
                )
        self._norms.extend(norms.values())
