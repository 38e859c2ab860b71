"""The training loop: steps, microbatches, resuming, what is not finite."""

import functools
import json
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear import (
    D,
    Linear,
    assert_identical,
    batches,
    fit,
    metrics,
    numbers,
    one_device,
    optimizer,
    step_settings,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from opensora_jax import rngs
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.checkpoint.best import Best
from opensora_jax.train import loop, monitor, optim, step
from opensora_jax.train import state as state_lib
from opensora_jax.train.settings import Throughput

GOLDEN = Path(__file__).parents[1] / "golden"


def test_it_learns_and_writes_what_it_measures(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"held_out": float(state.extra["calls"])}

    data, speeds = batches(), Throughput(16, flops_per_step=8e9, peak_flops=1e12)
    evaluations = [loop.Evaluation(4, evaluate)]
    state = fit(tmp_path, data=data, evaluations=evaluations, log_every=3, throughput=speeds)
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
        assert set(line) >= {"loss", "grad_norm", "learning_rate", "bias"}
        assert line["grad_norm_max"] >= line["grad_norm"]
        assert line["skipped_steps"] == 0
        assert 0 <= line["data_wait_share"] <= 1
        seconds = 16 / line["tokens_per_second"]  # of a step
        # 8e9 FLOPs over eight devices.
        assert line["tflops_per_device"] == pytest.approx(1e-3 / seconds)
        assert line["mfu"] == pytest.approx(1e-3 / seconds)
    assert data.get_state()["next_index"] == 10  # no more batches are drawn than trained on
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in shown] == [
        (line["step"], pytest.approx(line["loss"])) for line in training
    ]


def test_microbatches_are_one_batch():
    task, batch = Linear(), next(batches())
    states, measured = {}, {}
    for n in (1, 2):
        settings = step_settings(accumulate=n)
        tx, schedule = optimizer()
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


class KillingBatches:
    """Batches; where that of number `at` would be drawn, the run ends."""

    def __init__(self, at):
        self._batches, self._at, self._n = batches(), at, 0

    def __next__(self):
        self._n += 1
        if self._n == self._at:
            raise Killed
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


def killed_at(step):
    def evaluate(state):
        if int(state.step) == step:
            raise Killed
        return {}

    return [loop.Evaluation(1, evaluate)]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    often = {"log_every": 3}
    expected = fit(whole, **often)
    # Killed after step 7; the last checkpoint is of step 4, between two log steps.
    with pytest.raises(Killed):
        fit(cut, KillingBatches(at=8), **often)
    assert [line["step"] for line in numbers(cut)] == [3, 6]
    with (cut / "metrics.jsonl").open("a") as f:
        f.write('{"step": 8, "lo')  # and in the middle of a line
    # Killed again, at the end, while it evaluates.
    steps = []
    seen = loop.Evaluation(1, lambda state: steps.append(int(state.step)) or {})
    with pytest.raises(Killed):
        fit(cut, evaluations=[seen, *killed_at(10)], **often)
    assert steps == [4, 5, 6, 7, 8, 9, 10]  # of step 4 there was no evaluation yet
    evaluation = [loop.Evaluation(4, lambda state: {"held_out": 1.0})]
    state = fit(cut, evaluations=evaluation, **often)
    assert_identical(state, expected)
    for line in (cut / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert [line for line in numbers(cut) if "loss" in line] == numbers(whole)
    # The evaluation that was cut off at the end is made up for, once.
    fit(cut, evaluations=evaluation, **often)
    assert [line["step"] for line in metrics(cut) if "held_out" in line] == [10]


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path):
    def evaluations():
        return [loop.Evaluation(4, lambda state: {"validation_loss": 1.0 / int(state.step)})]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fit(whole, evaluations=evaluations())
    with pytest.raises(Killed):  # in the evaluation that belongs to the checkpoint of step 4
        fit(cut, evaluations=[*evaluations(), *killed_at(4)])
    fit(cut, evaluations=evaluations())
    assert numbers(cut) == numbers(whole)
    assert [line["step"] for line in numbers(cut) if "validation_loss" in line] == [4, 8, 10]
    for folder in (whole, cut):
        (best,) = (folder / checkpoint.BEST).iterdir()
        about = json.loads((best / "about" / "metadata").read_text())
        assert about["notes"] == {"step": 10, "validation_loss": 0.1}


def test_a_training_that_an_earlier_version_began_goes_on(tmp_path):
    # Killed in the evaluation of step 6.
    with zipfile.ZipFile(GOLDEN / "training.zip") as kept:
        kept.extractall(tmp_path)
    (earlier, *_) = numbers(tmp_path)
    losses = [loop.Evaluation(2, lambda state: {"validation_loss": 1.0 / int(state.step)})]
    state = fit(tmp_path, evaluations=losses, log_every=3)
    assert float(state.extra["calls"]) == 10
    lines = numbers(tmp_path)
    assert lines[0] == earlier == {"step": 2, "validation_loss": 0.5}
    assert [line["before"] for line in lines if "loss" in line] == [1, 4, 7, 9]
    whole = fit(tmp_path / "whole", log_every=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.params, whole.params
    )
    (best,) = (tmp_path / checkpoint.BEST).iterdir()
    assert best.name == "5"  # of steps 2, 4, 6, 8 and 10


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


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, caplog):
    states = []
    watched = [loop.Evaluation(1, lambda state: states.append(jax.device_get(state)) or {})]
    # In order, rows 0 to 15 are step 1; row 21 is of steps 2, 6 and 10.
    given = {"data": batches(bad=[21], shuffled=False), "log_every": 2}
    fit(tmp_path, evaluations=watched, **given)
    for before, after in ((states[0], states[1]), (states[4], states[5])):
        for name in ("params", "ema", "opt_state", "extra"):
            assert_identical(getattr(before, name), getattr(after, name))
        assert int(after.step) == int(before.step) + 1
    assert not np.array_equal(states[1].params["kernel"], states[2].params["kernel"])
    assert float(states[-1].extra["calls"]) == 7
    assert {k: int(v) for k, v in states[-1].skipped.items()} == {"total": 3, "in_a_row": 1}
    lines = [line for line in metrics(tmp_path) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [1, 1, 2, 2, 3]
    # A mean is over the steps that were finite; the schedule stands still with the others.
    assert [line["before"] for line in lines] == [0, 2.5, 4, 6.5, 8]
    assert all(np.isfinite(line["loss"]) for line in lines)
    schedule = optimizer()[1]
    assert [line["learning_rate"] for line in lines] == pytest.approx(
        [float(schedule(i)) for i in (1, 2, 4, 5, 7)]
    )
    told = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert len(told) == 3
    assert "step 6 was not finite (loss=nan, gradient norm=nan)" in told[1]
    assert "1 of the last 2 steps, 2 in all" in told[1]


def test_too_many_steps_that_are_not_finite_end_the_training(tmp_path):
    bad = [21, 37, 53]  # steps 2, 3 and 4, and again from 6 on

    def run(most):
        data = batches(bad=bad, shuffled=False)
        return fit(tmp_path, data=data, log_every=5, steps=5, max_skipped_steps=most)

    with pytest.raises(FloatingPointError, match=r"^step 4: 3 steps in a row .*loss=nan") as caught:
        run(3)
    for part in ("last good checkpoint is of step 4", "lower learning_rate", "float32"):
        assert part in str(caught.value)
    state = run(4)
    assert {k: int(v) for k, v in state.skipped.items()} == {"total": 3, "in_a_row": 0}
    assert np.isfinite(state.params["kernel"]).all()


def test_without_a_checkpoint_none_is_named():
    bad = {"loss": np.nan, "grad_norm": np.nan, "skipped_in_a_row": 1.0, "skipped_steps": 1.0}
    with pytest.raises(FloatingPointError, match="There is no checkpoint yet"):
        monitor.Health(max_skipped_steps=1).check(1, [bad], None)


def test_checkpoints_of_steps_that_came_to_nothing_push_out_no_good_ones(tmp_path):
    bad = [*range(16, 64)]  # steps 2, 3 and 4, then 6, 7 and 8
    data = batches(bad=bad, shuffled=False)
    fit(tmp_path, data=data, steps=9, log_every=3, checkpoint_every=1, keep_checkpoints=3)
    there = sorted(int(path.name) for path in (tmp_path / checkpoint.FOLDER).iterdir())
    assert there == [1, 5, 9]


def test_a_checkpoint_beyond_the_steps_that_are_asked_for_is_told(tmp_path, caplog):
    fit(tmp_path, steps=4)
    state = fit(tmp_path, steps=2)
    assert int(state.step) == 4
    assert "the checkpoint is of step 4, beyond steps=2: nothing is left to train" in caplog.text


def test_the_lowest_loss_outlives_a_kill_before_it_is_written(tmp_path):
    """The evaluation of step 2 is made again: it is logged only once its weights are whole."""
    program = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from linear import fit
from opensora_jax.checkpoint.best import Best
from opensora_jax.train import loop

save = Best.save_if_better

def save_and_die(self, step, loss, items):
    if step == 2:  # what is written in the background has not begun
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, step, loss, items)

if len(sys.argv) > 3:
    Best.save_if_better = save_and_die
losses = {2: 0.25, 4: 0.5, 6: 0.75}
run = lambda state: {"validation_loss": losses[int(state.step)]}
fit(Path(sys.argv[1]), evaluations=[loop.Evaluation(2, run)], steps=6, checkpoint_every=2)
"""
    command = [sys.executable, "-c", program, tmp_path, Path(__file__).parent]
    killed = subprocess.run([*command, "die"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert all("validation_loss" not in line for line in metrics(tmp_path))
    subprocess.run(command, check=True)
    lines = [line for line in metrics(tmp_path) if "validation_loss" in line]
    logged = {line["step"]: line["validation_loss"] for line in lines}
    assert logged == {2: 0.25, 4: 0.5, 6: 0.75}
    assert Best(tmp_path)._loss == 0.25


def test_a_disk_that_fills_up_in_the_middle_is_one_line(tmp_path):
    program = """
import resource, sys
import numpy as np
from opensora_jax import cli
from opensora_jax.checkpoint.manager import Checkpoints

def main():  # 400 arrays, all of which are being written when the first fails
    checkpoints = Checkpoints(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    checkpoints.save(1, {"params": {str(i): np.ones((100, 100)) for i in range(400)}})
    checkpoints.close()

cli.run(main)
"""
    command = [sys.executable, "-c", program, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "the checkpoint of step 1 could not be written" in line


def test_a_spike_of_the_gradient_is_told_once(caplog):
    health = monitor.Health(max_skipped_steps=10)

    def check(last, *norms):
        steps = [{"grad_norm": np.float32(n), "skipped_in_a_row": np.float32(0)} for n in norms]
        health.check(last, steps, None)
        told = [r.getMessage() for r in caplog.records]
        caplog.clear()
        return told

    assert check(10, 100.0, *[1.0] * 9) == []  # too few to compare with
    assert check(20, *[1.0] * 10) == []
    (told,) = check(24, 1.0, 12.0, 30.0, 9.0)
    assert told == "step 23: a spike: gradient norm 30; the last 20 steps' median is 1"
    assert check(25, 9.9) == []


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
