"""How many processes a run has, by its environment."""

import pytest

from opensora_jax import runtime


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"JAX_NUM_PROCESSES": "2", "SLURM_STEP_NUM_TASKS": "3"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_NTASKS": "4"}, 1),  # allotted, but not started by srun
        ({"OMPI_COMM_WORLD_SIZE": "8"}, 8),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 1),  # JAX_PLATFORMS=cpu, as everywhere in the tests
    ],
)
def test_processes_are_counted_by_the_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runtime.n_processes() == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "MEGASCALE_NUM_SLICES": "2"}, 4),
    ],
)
def test_hosts_of_a_tpu_pod(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runtime.n_tpu_hosts() == expected
