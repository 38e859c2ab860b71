"""The training loop: steps, microbatches, resuming, what is not finite."""

import functools
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from opensora_jax import mesh as mesh_lib
from opensora_jax import rngs
from opensora_jax.train import checkpoint, loop, optim, step, writer
from opensora_jax.train import state as state_lib

N, D = 64, 4
SPEEDS = ("tokens_per_second", "data_wait_share")


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
    def __init__(self, bad=None):
        rng = np.random.default_rng(0)
        self._x = rng.normal(size=(N, D)).astype(np.float32)
        self._y = (self._x @ rng.normal(size=(D, 2))).astype(np.float32)
        if bad is not None:
            self._x[bad] = np.nan

    def __repr__(self):
        return "Rows"

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": self._x[i], "y": self._y[i]}


def batches(bad=None, shuffled=True):
    rows = grain.MapDataset.source(Rows(bad))
    rows = rows.shuffle(seed=0) if shuffled else rows
    return iter(rows.repeat().batch(16, drop_remainder=True).to_iter_dataset())


def optimizer(settings):
    schedule = optim.schedule(0.3, 2, settings.steps)
    tx = optim.make("adamw", schedule, b1=0.9, b2=0.99, weight_decay=0.01, clip_norm=1.0)
    return tx, schedule


def make_settings(**given):
    return loop.Settings(
        **{
            "steps": 10,
            "seed": 0,
            "ema_decay": 0.99,
            "accumulate": 1,
            "log_every": 1,
            "checkpoint_every": 4,
            "tokens_per_step": 16,
        }
        | given
    )


def one_device():
    return jax.make_mesh(
        (1, 1, 1, 1), mesh_lib.AXES, axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:1]
    )


def fit(folder, data=None, evaluations=(), start_from=dict, **given):
    settings = make_settings(**given)
    return loop.fit(
        Linear(noise=0.1),
        *optimizer(settings),
        data or batches(),
        mesh=one_device(),
        folder=folder,
        settings=settings,
        evaluations=evaluations,
        start_from=start_from,
    )


def metrics(folder):
    return writer.read_metrics(folder / "metrics.jsonl")


def without_speeds(lines):
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_it_learns_and_writes_what_it_measures(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"held_out": float(state.extra["calls"])}

    state = fit(tmp_path, evaluations=[loop.Evaluation(4, evaluate)], log_every=3)
    assert int(state.step) == 10
    assert float(state.extra["calls"]) == 10
    assert seen == [4, 8, 10]
    lines = metrics(tmp_path)
    assert [(line["step"], "loss" in line) for line in lines] == [
        (3, True), (4, False), (6, True), (8, False), (9, True), (10, True), (10, False)
    ]  # fmt: skip
    training = [line for line in lines if "loss" in line]
    assert training[-1]["loss"] < 0.3 * training[0]["loss"]
    # A line is the mean since the last: here of the steps taken before each step.
    assert [line["before"] for line in training] == [1, 4, 7, 9]
    assert [line["held_out"] for line in lines if "held_out" in line] == [4, 8, 10]
    for line in training:
        assert set(line) >= {"loss", "grad_norm", "learning_rate", "bias", *SPEEDS}
        assert 0 <= line["data_wait_share"] <= 1
        assert line["tokens_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_microbatches_are_one_batch():
    task, batch = Linear(), next(batches())
    states, measured = {}, {}
    for n in (1, 2):
        settings = make_settings(accumulate=n)
        tx, schedule = optimizer(settings)
        first, _ = state_lib.create(task, tx, one_device(), rngs.key(0, "init"))
        update = jax.jit(functools.partial(step.train_step, task, tx, schedule, settings))
        states[n], _ = update(first, batch)  # without warm-up, the first step stands still
        states[n], measured[n] = update(states[n], batch)
    for name in ("loss", "grad_norm", "bias"):
        assert float(measured[1][name]) == pytest.approx(float(measured[2][name]), rel=1e-5)
    kernels = [np.asarray(states[n].params["kernel"]) for n in (1, 2)]
    np.testing.assert_allclose(*kernels, rtol=1e-5)
    assert np.abs(kernels[0] - first.params["kernel"]).max() > 0.1
    # The extra state passes from one microbatch to the next.
    assert float(states[1].extra["calls"]) == 2
    assert float(states[2].extra["calls"]) == 4
    # A young average follows closely: by 1 - 2 / 11 in the second step, not by 1 - 0.99.
    expected = kernels[0] + 2 / 11 * (first.params["kernel"] - kernels[0])
    np.testing.assert_allclose(states[1].ema["kernel"], expected, atol=1e-5)


class Killed(BaseException):
    """Ends a run where a kill would: past the handlers of errors."""


def killed_at(step):
    def evaluate(state):
        if int(state.step) == step:
            raise Killed
        return {}

    return [loop.Evaluation(1, evaluate)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = fit(whole)
    # Killed after step 7; the last checkpoint is of step 4.
    with pytest.raises(Killed):
        fit(cut, evaluations=killed_at(7))
    assert [line["step"] for line in metrics(cut)] == [1, 2, 3, 4, 5, 6, 7]
    with (cut / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # and in the middle of a line
    # Killed again, at the end, while it evaluates.
    steps = []
    watch = loop.Evaluation(1, lambda state: steps.append(int(state.step)) or {})
    with pytest.raises(Killed):
        fit(cut, evaluations=[watch, *killed_at(10)])
    assert steps == [5, 6, 7, 8, 9, 10]
    state = fit(cut, evaluations=[loop.Evaluation(4, lambda state: {"held_out": 1.0})])
    assert_identical(state, expected)
    for line in (cut / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    resumed = [line for line in metrics(cut) if "loss" in line]
    assert without_speeds(resumed) == without_speeds(metrics(whole))
    # The evaluation that was cut off at the end is made up for.
    assert [line["step"] for line in metrics(cut) if "held_out" in line] == [10]


def test_only_a_new_training_starts_from_given_parameters(tmp_path):
    seven = np.full((D, 2), 7, np.float32)
    asked = []

    def start_from():
        asked.append(True)
        return {"kernel": seven}

    state = fit(tmp_path, start_from=start_from, steps=2)
    assert float(state.extra["calls"]) == 2  # the rest is as it always starts
    for kernel in (state.params["kernel"], state.ema["kernel"]):
        # The second step is the first that moves, by the learning rate.
        assert 0.1 < np.abs(kernel - 7).max() < 0.4
    np.testing.assert_array_equal(seven, 7)  # given to no update to write into
    fit(tmp_path, start_from=start_from, steps=3)
    assert len(asked) == 1


@pytest.mark.parametrize("log_every", [1, 5])
def test_what_is_not_finite_stops_before_it_is_saved(tmp_path, log_every):
    # In order, rows 0 to 15 are step 1; row 21, of step 2, is bad.
    data = batches(bad=21, shuffled=False)
    with pytest.raises(FloatingPointError, match=r"loss=nan at step 2: .*of step 1;"):
        fit(tmp_path, data=data, log_every=log_every, checkpoint_every=1)
    # Where it is logged, its numbers can be looked at, but it is never a checkpoint.
    assert [line["step"] for line in metrics(tmp_path)] == ([1, 2] if log_every == 1 else [])
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.latest_step == 1
    checkpoints.close()


def test_kernels_decay_and_biases_do_not():
    tx = optim.make(
        "adamw", optax.constant_schedule(0.1), b1=0.9, b2=0.99, weight_decay=0.5, clip_norm=1.0
    )
    params = {"layer": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "scale": jnp.ones(3)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 0.5)
    np.testing.assert_array_equal(updates["layer"]["bias"], 0.0)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth():
    schedule = optim.schedule(2.0, 10, 100)
    values = [float(schedule(step)) for step in (0, 5, 10, 55, 100, 1000)]
    assert values == pytest.approx([0.0, 1.0, 2.0, 1.01, 0.02, 0.02])
    short = optim.schedule(2.0, 10, 1)  # fewer steps than warm-up
    assert np.isfinite([float(short(step)) for step in range(3)]).all()
