"""One of two processes dies, or stands still: the other ends, and says in one line who it was."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opensora_jax import peers

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

# Steps that wait for each other, as those of a training do.
PROGRAM = """
import sys, time
import jax, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from opensora_jax import cli, process, runtime

process.listen()

def main():
    runtime.start()
    mesh = Mesh(jax.devices(), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in range(int(sys.argv[1])):
        x = jax.make_array_from_callback((4,), sharding, lambda index: jnp.ones(2)[: 4 // 2])
        total(x).block_until_ready()
        if step == 2:
            print("ready", flush=True)
        time.sleep(0.2)
    if sys.argv[2:] == [str(jax.process_index())]:
        raise ValueError("a fault of its own")
    if sys.argv[2:]:
        time.sleep(100)

cli.run(main)
"""


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(*arguments, address=None):
    address = address or free_address()
    environment = os.environ | {
        "XLA_FLAGS": "",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_ends_and_names_it(victim, number):
    processes = start("1000")
    try:
        for process in processes:
            while "ready" not in process.stdout.readline():  # the collectives' library speaks, too
                assert process.poll() is None
        begin = time.monotonic()
        processes[victim].send_signal(number)
        other = processes[1 - victim]
        _, said = other.communicate(timeout=120)
        assert time.monotonic() - begin < 60
        assert other.returncode == peers.PEER_DIED, said
        (line,) = said.splitlines()
        host = socket.gethostname()
        assert line.startswith(f"error: process {victim} on {host} has not ")
        assert line.endswith("the same command, run on all, goes on from the last checkpoint")
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("one", [0, 1])
def test_an_error_of_one_ends_the_other_at_once(one):
    processes = start("4", str(one))
    try:
        ended = [process.communicate(timeout=60) for process in processes]
        assert processes[one].returncode == 1
        assert processes[1 - one].returncode == peers.PEER_DIED
        assert ended[one][1] == "error: a fault of its own\n"
        (line,) = ended[1 - one][1].splitlines()
        assert line.startswith(f"error: process {one} on {socket.gethostname()} failed: ValueError")
    finally:
        for process in processes:
            process.kill()


def test_the_next_run_takes_over_the_address_of_one_whose_first_process_was_killed():
    """As `docs/launch_tpu.sh keep` does: at once, while the others do not know yet."""
    address = free_address()
    processes = start("1000", address=address)
    again = []
    try:
        for process in processes:
            while "ready" not in process.stdout.readline():
                assert process.poll() is None
        processes[0].send_signal(signal.SIGKILL)
        again = start("4", address=address)
        for process in again:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
            assert said == ""
        processes[1].communicate(timeout=60)
        assert processes[1].returncode in (peers.PEER_DIED, -signal.SIGABRT)
    finally:
        for process in processes + again:
            process.kill()


def test_those_that_end_as_they_should_end_well():
    processes = start("4")
    try:
        for process in processes:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
            assert said == ""
    finally:
        for process in processes:
            process.kill()
