"""Processes that hang, crash and make mistakes, for real."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trouble
from videos import gradient_video

from opensora_jax.data.clips import Clip, Failed, Window, decode_clips
from opensora_jax.data.video_io import write_video
from opensora_jax.data.workers import Ended, Workers
from opensora_jax.windows import Windows


def call(workers, item):
    (value,) = workers(item)
    return value


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where temporary files go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def test_a_process_that_hangs_or_dies_is_replaced_and_the_others_are_not_touched(folder):
    with Workers(trouble.work, 4.0) as workers, ThreadPoolExecutor(2) as pool:
        first, _ = call(workers, "a")
        assert call(workers, "b") == (first, "b")  # the same process
        hanging = pool.submit(call, workers, "hang")
        while call(workers, "c")[0] == first:  # until the other thread has it
            time.sleep(0.01)
        other, _ = call(workers, "d")
        with pytest.raises(Ended, match="not decoded after 4 seconds"):
            hanging.result()
        assert call(workers, "e") == (other, "e")
        for item, reason in {
            "crash": "its decoder crashed: SIGSEGV",
            "exit 3": "its decoder ended with status 3",
        }.items():
            with pytest.raises(Ended, match=reason):
                call(workers, item)
        pid, item = call(workers, "f")
        assert (item, pid in (first, other)) == ("f", False)
    assert not Path(f"/proc/{pid}").exists()


def test_errors_of_the_function_are_raised_here_and_its_process_goes_on(folder):
    with Workers(trouble.work, None) as workers:
        pid, _ = call(workers, "a")
        with pytest.raises(OSError, match="No space left on device: '/disk'"):
            call(workers, "disk /disk")
        with pytest.raises(RuntimeError, match=r"return \{\}\[value\](.|\n)*KeyError: 'key'"):
            call(workers, "mistake key")
        assert call(workers, "b") == (pid, "b")


def test_arrays_come_back_as_they_are(folder):
    n = 5_000_000  # 40 MB
    with Workers(trouble.work, None) as workers:
        found = call(workers, f"array {n}")
    np.testing.assert_array_equal(found["whole"], np.arange(n))
    np.testing.assert_array_equal(found["every other"], np.arange(0, n, 2))
    assert found["none"].shape == (0,)
    found["whole"][0] = 1  # it is ours


def test_a_function_that_no_process_can_load_is_told(folder, capfd):
    module = type(sys)("nowhere")
    exec("def work(item): pass", module.__dict__)
    sys.modules["nowhere"] = module
    try:
        message = "cannot be started: its decoder ended with status 1"
        with Workers(module.work, None) as workers, pytest.raises(OSError, match=message):
            call(workers, "a")
    finally:
        del sys.modules["nowhere"]
    assert "No module named 'nowhere'" in capfd.readouterr().err


def test_who_leaves_does_not_wait_for_calls_under_way(folder):
    begun, errors = threading.Event(), []

    def wait(workers):
        begun.set()
        try:
            call(workers, "hang")
        except Ended as error:
            errors.append(error)

    with Workers(trouble.work, None) as workers:
        thread = threading.Thread(target=wait, args=(workers,))
        thread.start()
        begun.wait()
    thread.join(30)
    assert not thread.is_alive()
    assert len(errors) == 1


def test_they_end_with_who_started_them(tmp_path):
    code = """if True:
        import trouble
        from opensora_jax.data.workers import Workers
        if __name__ == "__main__":
            with Workers(trouble.work, None) as workers:
                next(workers("hang pid"))
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)},
    )
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.01)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    child = Path(f"/proc/{pid.read_text()}/cmdline")
    deadline = time.monotonic() + 60
    while child.exists() and child.read_bytes():  # of a zombie it is empty
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_values_come_one_by_one_and_only_the_time_of_waiting_for_them_counts(folder):
    with Workers(trouble.work, 3.0) as workers:
        values = workers(f"a\nhang {folder / 'pid'}")
        pid, _ = next(values)
        time.sleep(0.2)
        assert not (folder / "pid").exists()  # nobody has asked for that
        values.close()
        assert not Path(f"/proc/{pid}").exists()
        values = workers("a\nsleep 1.6\nsleep 0\nsleep 2\nb")
        pid, _ = next(values)
        time.sleep(3.2)
        assert [next(values)[0], next(values)[0]] == [pid, pid]
        with pytest.raises(Ended, match="not decoded after 3 seconds"):
            next(values)
        assert call(workers, "b")[0] != pid


def test_an_error_ends_what_was_yielded_before_it(folder):
    with Workers(trouble.work, None) as workers:
        values = workers("a\ndisk /disk\nb")
        pid, _ = next(values)
        with pytest.raises(OSError, match="No space left on device: '/disk'"):
            next(values)
        assert list(values) == []
        assert call(workers, "b") == (pid, "b")


def test_a_video_that_its_decoder_does_not_survive_has_failed(tmp_path):
    """Also where windows of it have come before."""
    names = ["a.mp4", "hang.mp4", "crash.mp4", "exit_7.mp4", "b.mp4"]
    for name in names:
        write_video(tmp_path / name, gradient_video(8), fps=8)
    decoding = trouble.Troubled((2, 2), None, None, None, Windows(4, False, 4))
    pieces = list(decode_clips(decoding, tmp_path, [{"file": name} for name in names], 5.0))
    windows = [i for i, piece in pieces if isinstance(piece, Window)]
    assert sorted(windows) == [0, 0, 1, 2, 3, 4, 4]
    outcomes = {i: piece for i, piece in pieces if not isinstance(piece, Window)}
    assert outcomes == {
        0: [Clip(8.0, 8, 2)],
        1: [Failed("hang.mp4", "not decoded after 5 seconds")],
        2: [Failed("crash.mp4", "its decoder crashed: SIGSEGV")],
        3: [Failed("exit_7.mp4", "its decoder ended with status 7")],
        4: [Clip(8.0, 8, 2)],
    }
