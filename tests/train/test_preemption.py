"""SIGTERM saves and ends with status 0, wherever the training is just then."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from linear import assert_identical, batches, fit, numbers

from opensora_jax import process
from opensora_jax.checkpoint import manager as checkpoint
from opensora_jax.process import Stopped
from opensora_jax.train import loop, preemption


class Terminating:
    """Batches; while the one of number `at` is drawn, SIGTERM comes."""

    def __init__(self, at):
        self._batches, self._at, self._n = batches(), at, 0

    def __next__(self):
        self._n += 1
        if self._n == self._at:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


def checkpoints(folder):
    return {p.name for p in (folder / checkpoint.FOLDER).iterdir()}


def test_between_steps_the_state_is_saved_and_the_next_run_is_the_uninterrupted_one(
    tmp_path, caplog
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    given = {"log_every": 5, "checkpoint_every": 100}
    expected = fit(whole, **given)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught:
        fit(cut, data=Terminating(at=4), **given)  # drawn while step 3 runs
    assert caught.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints(cut) == {"3"}
    assert "cut: stopped by SIGTERM; the same command goes on from here" in caplog.text
    # Again, in an evaluation, which is broken off and made up for.
    done = []

    def evaluate(state):
        if int(state.step) == 7 and not done:
            done.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return {"held_out": float(state.params["kernel"][0, 0])}

    evaluations = [loop.Evaluation(7, evaluate)]
    start = time.monotonic()
    with pytest.raises(Stopped):
        fit(cut, evaluations=evaluations, **given)
    assert time.monotonic() - start < 50
    assert checkpoints(cut) == {"3", "7"}
    assert [line["step"] for line in numbers(cut)] == [5]
    state = fit(cut, evaluations=evaluations, **given)
    assert_identical(state, expected)
    assert [line for line in numbers(cut) if "loss" in line] == numbers(whole)
    assert [line["step"] for line in numbers(cut) if "held_out" in line] == [7, 10]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    def start_from():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with pytest.raises(Stopped):
        fit(tmp_path, start_from=start_from)
    assert checkpoints(tmp_path) == set()


def test_an_evaluation_that_cannot_be_broken_off_loses_no_steps(tmp_path):
    """The state is on disk before it begins."""
    seen = []

    def evaluate(state):
        seen.append((int(state.step), checkpoint.latest_step(tmp_path)))
        return {}

    fit(tmp_path, evaluations=[loop.Evaluation(3, evaluate)], checkpoint_every=100)
    assert seen == [(step, step) for step in (3, 6, 9, 10)]


def interrupted_for_long():
    with preemption.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)


def test_with_several_processes_none_breaks_off_alone(monkeypatch):
    """As an evaluation goes on, the others wait in its collectives."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with preemption.deferred("dit"), preemption.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with process.deferred("dit"), pytest.raises(Stopped):
        interrupted_for_long()


PROCESS = """
import os, signal, time
from opensora_jax import process, runtime
from opensora_jax.train import preemption

runtime.start()
with preemption.deferred("dit"):
    if os.environ["JAX_PROCESS_ID"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2)
    for step in range(2001, 2021):
        print(step, flush=True)
        try:
            preemption.check()
        except process.Stopped:
            print("stopped", flush=True)
            time.sleep(1)  # the first holds what connects them
            break
        time.sleep(0.2)
os._exit(0)
"""


def test_a_signal_before_the_first_step_that_goes_on_stops_all_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said[0] == said[1]
    assert said[0][-1] == "stopped"
