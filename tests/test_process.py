"""Signals to real processes: wherever they are, they end, with the status that is promised."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Says when it is ready, then does what is given.
PROGRAM = """
import ctypes, sys, time
from opensora_jax import cli, process

process.GRACE_SECONDS = float(sys.argv[2])
process.listen()

def compiles():  # the interpreter does not run meanwhile, and no handler either
    print("ready", flush=True)
    ctypes.CDLL(None).sleep(60)

def waits():
    print("ready", flush=True)
    time.sleep(60)

def collect():  # where an exception is told and forgotten
    import gc
    def callback(phase, info):
        if phase == "start":
            print("ready", flush=True)
            gc.callbacks.clear()
            time.sleep(1)
    gc.callbacks.append(callback)
    gc.collect()

def collects():
    collect()
    time.sleep(60)

def collects_and_trains():
    collect()
    trains(is_ready=True)

def trains(is_ready=False):
    with process.deferred("dit"):
        if not is_ready:
            print("ready", flush=True)
        for _ in range(int(sys.argv[3])):
            time.sleep(0.1)
        try:
            process.check()
        finally:
            print("saved", flush=True)

def compiles_in_training():
    with process.deferred("dit"), process.interruptible():
        compiles()

cli.run(lambda: globals()[sys.argv[1]]())
"""


def start(what, grace=1.0, n=20):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what, str(grace), str(n)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize(
    ("what", "name", "output", "most_seconds"),
    [
        ("waits", "", "", 5),
        ("compiles", "", "", 10),
        ("collects", "", "", 10),
        ("collects_and_trains", "", "saved\n", 10),
        ("trains", "dit: ", "saved\n", 10),
        ("compiles_in_training", "dit: ", "", 10),
    ],
)
def test_the_first_signal_ends_it_with_one_line(what, name, output, most_seconds, number, status):
    process = start(what)
    begin = time.monotonic()
    process.send_signal(number)
    out, said = process.communicate(timeout=30)
    assert time.monotonic() - begin < most_seconds
    assert (process.returncode, out) == (status, output)
    assert said.splitlines() == [
        f"{name}stopped by {signal.Signals(number).name}; the same command goes on from here"
    ]


@pytest.mark.parametrize("what", ["compiles", "trains"])
def test_the_second_interrupt_ends_it_at_once(what):
    process = start(what, grace=1000.0, n=1000)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_while_the_command_is_being_loaded(number, status, tmp_path):
    command = [sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(0.7)  # of the one to three seconds that its imports take
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status, said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run" / "shapes" / "train" / "params.json").exists()
