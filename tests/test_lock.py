"""One run at a time in a folder: on disks by the system's lock, on object stores by a lease."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from configs import quickstart
from opensora_jax import cli, lock, main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def running(tmp_path):
    """A job that makes videos for long, and its workdir."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"]
    fields = ["--config.stages=('shapes',)", "--config.shapes.n_videos=100000"]
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}", *fields],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 100
    while not (workdir / "shapes" / "train" / "videos" / "video3.mp4").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process, workdir
    process.kill()
    process.wait()


def test_a_second_run_is_told_who_is_there_and_a_dead_one_is_not(running):
    process, workdir = running
    c = quickstart.get_config()
    c.stages = ("report",)
    before = sorted(workdir.iterdir())
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main.run(c, epath.Path(workdir)))
    told = stop.value.code
    assert f"{workdir}: in use by process {process.pid} on {os.uname().nodename}, started 2" in told
    assert "\n" not in told
    assert sorted(workdir.iterdir()) == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.exclusive(workdir):
        assert json.loads((workdir / lock.OWNER).read_text())["process"] == os.getpid()
    assert not (workdir / lock.OWNER).exists()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.6)


def test_a_lease_that_is_renewed_is_respected(bucket, quick):
    folder = bucket / "run"
    folder.mkdir()
    told = f"gs://bucket/run: in use by process {os.getpid()}"
    with lock.exclusive(folder), pytest.raises(lock.FolderInUse, match=told):
        lock.exclusive(folder).__enter__()
    assert not (folder / lock.LEASE).exists()
    with lock.exclusive(folder):
        pass


def test_a_lease_of_the_dead_is_taken_over(bucket, quick):
    folder = bucket / "run"
    folder.mkdir()
    (folder / lock.LEASE).write_text(json.dumps({"id": "dead", "renewed": time.time() + 1e6}))
    with lock.exclusive(folder):
        assert json.loads((folder / lock.LEASE).read_text())["process"] == os.getpid()


def test_of_two_that_begin_at_once_one_goes_on(bucket, quick, monkeypatch):
    folder = bucket / "run"
    folder.mkdir()
    renew = lock._renew

    def overtaken(path, me):
        renew(path, me)
        path.write_text(json.dumps({**lock._owner(), "id": "other"}))

    monkeypatch.setattr(lock, "_renew", overtaken)
    with pytest.raises(lock.FolderInUse), lock.exclusive(folder):
        pass
