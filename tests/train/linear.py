"""The smallest training there is, for tests of the loop."""

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from opensora_jax import mesh as mesh_lib
from opensora_jax.train import loop, metrics_log, optim
from opensora_jax.train.settings import LoopSettings, StepSettings, Throughput

N, D = 64, 4
SPEED = Throughput(tokens_per_step=16)
# What differs from run to run.
TIMES = ("tokens_per_second", "data_wait_share", "evaluation_seconds", "tflops_per_device", "mfu")


class Linear:
    """Least squares with a count of its calls as extra state; `noise` disturbs the inputs."""

    def __init__(self, noise=0.0):
        self._noise = noise

    def init(self, key):
        return {"kernel": 0.1 * jax.random.normal(key, (D, 2))}, {"calls": jnp.zeros(())}

    def param_shardings(self, mesh):
        return {"kernel": mesh_lib.replicated(mesh)}

    def loss(self, params, extra, batch, key, step):
        x = batch["x"] + self._noise * jax.random.normal(key, batch["x"].shape)
        error = x @ params["kernel"] - batch["y"]
        metrics = {"bias": jnp.mean(error), "before": step.astype(jnp.float32)}
        return jnp.mean(error**2), ({"calls": extra["calls"] + 1}, metrics)


class Rows:
    def __init__(self, bad=()):
        rng = np.random.default_rng(0)
        self._x = rng.normal(size=(N, D)).astype(np.float32)
        self._y = (self._x @ rng.normal(size=(D, 2))).astype(np.float32)
        self._x[list(bad)] = np.nan

    def __repr__(self):
        return "Rows"

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": self._x[i], "y": self._y[i]}


def batches(bad=(), shuffled=True):
    rows = grain.MapDataset.source(Rows(bad))
    rows = rows.shuffle(seed=0) if shuffled else rows
    few = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(rows.repeat().batch(16, drop_remainder=True).to_iter_dataset(few))


def optimizer():
    schedule = optim.schedule(0.3, 2, 10)  # of every test, so that one program serves all
    tx = optim.make("adamw", schedule, b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0)
    return tx, schedule


def step_settings(accumulate=1):
    return StepSettings(seed=0, ema_decay=0.99, accumulate=accumulate)


def one_device():
    return jax.make_mesh(
        (1, 1, 1, 1), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1]
    )


def fit(folder, data=None, evaluations=(), start_from=dict, throughput=SPEED, **settings):
    settings = LoopSettings(**{"steps": 10, "log_every": 1, "checkpoint_every": 4} | settings)
    return loop.fit(
        Linear(noise=0.1),
        *optimizer(),
        data or batches(),
        mesh=one_device(),
        folder=folder,
        settings=settings,
        step_settings=step_settings(),
        throughput=throughput,
        evaluations=evaluations,
        start_from=start_from,
    )


def metrics(folder):
    return metrics_log.read_metrics(folder / "metrics.jsonl")


def numbers(folder):
    """What was logged, but for times."""
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(folder)]
    return [line for line in lines if set(line) != {"step"}]


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))
