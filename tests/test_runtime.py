"""What a command sets up by its environment: huge pages, and how many processes there are."""

import os
import subprocess
import sys

import jax
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


@pytest.mark.parametrize(
    ("mode", "given", "expected"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "a.b=c", "a.b=c:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, None),
        (None, None, None),
    ],
)
def test_huge_pages_are_asked_for_where_linux_leaves_it_to_programs(
    tmp_path, mode, given, expected
):
    if mode is not None:
        (tmp_path / "enabled").write_text(f"{mode}\n")
    program = (
        "import os, sys; from pathlib import Path; from opensora_jax import process; "
        "process._HUGE_PAGES = Path(sys.argv[1]); process.use_huge_pages(); "
        "print(os.environ.get('GLIBC_TUNABLES'), sys.argv[2])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "enabled", "argument"],
        env=environment | ({} if given is None else {"GLIBC_TUNABLES": given}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{expected} argument\n"


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_compiled_programs_are_kept_among_caches_or_where_the_user_says(
    monkeypatch, tmp_path, named
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", named)
        runtime.keep_compiled_programs()
        expected = named or str(tmp_path / "opensora_jax" / "compiled")
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
