"""docs/launch_tpu.sh, with a gcloud whose TPU is two folders of this machine, one a worker."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

GCLOUD = r"""#!/usr/bin/env bash
set -euo pipefail
echo "$*" >> "$TPU/calls"
if [ "$(sed 1q "$TPU/fails" 2>/dev/null)" = "$4" ]; then
  sed -i 1d "$TPU/fails" && echo "cannot $4 just now" >&2 && exit 1
fi
case "$3 $4" in
  "tpu-vm ssh")
    for argument; do
      case $argument in --command=*) command=${argument#--command=} ;; esac
      case $argument in --worker=*) workers=${argument#--worker=} ;; esac
    done
    [ "$workers" != all ] || workers="0 1"
    for worker in $workers; do
      (cd "$TPU/$worker" && HOME=$PWD bash -c "$command")
    done ;;
  "tpu-vm scp") cp "$5" "$TPU/0/${6#*:}" && cp "$5" "$TPU/1/${6#*:}" ;;
  "queued-resources create") echo ACTIVE > "$TPU/state" ;;
  "queued-resources describe")
    cat "$TPU/state" 2>/dev/null || { echo "NOT_FOUND: $5" >&2 && exit 1; } ;;
  "queued-resources delete") rm "$TPU/state" ;;
esac
"""

# Stands for Python in the workers' environment: says what it was asked to run, and where.
PYTHON = r"""#!/usr/bin/env bash
echo "$PWD: $*"
trap 'echo stopped; exit 143' TERM
sleep "${RUN_SECONDS:-0}" & wait $!
runs=$(cat ../runs 2>/dev/null)x
echo "$runs" > ../runs
[ "$runs" != "${INTERRUPTED_RUN:-}" ] || exit "${INTERRUPTED_STATUS:-0}"
echo all stages done
exit "${RUN_STATUS:-0}"
"""


@pytest.fixture
def tpu(tmp_path):
    for worker in "01":
        (tmp_path / worker / "venv/bin").mkdir(parents=True)
        write(tmp_path / worker / "venv/bin/python", PYTHON)
        (tmp_path / worker / ".local/bin").mkdir(parents=True)
        write(tmp_path / worker / ".local/bin/uv", "#!/bin/sh\n")
    (tmp_path / "bin").mkdir()
    write(tmp_path / "bin/gcloud", GCLOUD)
    write(tmp_path / "bin/uv", "#!/bin/sh\n")
    return tmp_path


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def launch(tpu, *arguments, **variables):
    environment = os.environ | {
        "PATH": f"{tpu / 'bin'}:{os.environ['PATH']}",
        "TPU": str(tpu),
        "ZONE": "us-east5-a",
        "POLL_SECONDS": "0.2",
        **variables,
    }
    return subprocess.run(
        [ROOT / "docs/launch_tpu.sh", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)
    return path.read_text()


def test_every_worker_gets_the_code_and_the_same_command(tpu):
    assert launch(tpu, "install", "mine").returncode == 0
    done = launch(tpu, "run", "mine", "--config=configs/dit_7b.py", "--workdir=gs://b/a b")
    assert done.returncode == 0, done.stderr
    for worker in "01":
        assert (tpu / worker / "opensora_jax/setup.py").is_file()
        assert wait_for(tpu / worker / "run.status") == "0\n"
        assert (tpu / worker / "run.log").read_text() == (
            f"{tpu / worker / 'opensora_jax'}: "
            "-m opensora_jax.main --config=configs/dit_7b.py --workdir=gs://b/a b\n"
            "all stages done\n"
        )
    assert launch(tpu, "status", "mine").stdout.split("\n").count("done") == 2


def test_a_run_can_be_stopped(tpu):
    launch(tpu, "install", "mine")
    launch(tpu, "run", "mine", "--config=c", RUN_SECONDS="60")
    assert launch(tpu, "status", "mine").stdout.split("\n").count("running") == 2
    assert launch(tpu, "stop", "mine").returncode == 0
    assert launch(tpu, "status", "mine").stdout.count("not running") == 2
    for worker in "01":
        assert (tpu / worker / "run.log").read_text().endswith("stopped\n")


def test_keep_creates_and_runs_until_the_run_has_ended(tpu):
    done = launch(tpu, "keep", "mine", "v5p-128", "--config=c")
    assert done.returncode == 0, done.stderr
    calls = (tpu / "calls").read_text()
    assert "--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --spot" in calls
    assert "-m opensora_jax.main --config=c\n" in (tpu / "0/run.log").read_text()


def test_keep_begins_anew_after_a_preemption_and_ends_with_an_error(tpu):
    (tpu / "state").write_text("SUSPENDED\n")
    done = launch(tpu, "keep", "mine", "v6e-16", "--config=c", RUN_STATUS="1")
    assert done.returncode == 1
    assert "failed with 1" in done.stdout
    calls = re.findall(r"^compute tpus queued-resources (\w+)", (tpu / "calls").read_text(), re.M)
    assert [call for call in calls if call != "describe"] == ["delete", "create"]


@pytest.mark.parametrize("status", ["0", "75", "134", "137"])
def test_keep_goes_on_after_a_run_that_was_stopped_before_its_end(tpu, status):
    """By a signal, or since another process died."""
    interrupted = {"INTERRUPTED_RUN": "x", "INTERRUPTED_STATUS": status}
    done = launch(tpu, "keep", "mine", "v6e-16", "--config=c", **interrupted)
    assert done.returncode == 0, done.stderr
    assert (tpu / "0/runs").read_text() == (tpu / "1/runs").read_text() == "xx\n"


def test_keep_outlives_what_fails_for_a_while(tpu):
    fails = ["describe", "describe", "create", "scp", "ssh"]
    (tpu / "fails").write_text("".join(f"{fail}\n" for fail in fails))
    done = launch(tpu, "keep", "mine", "v6e-16", "--config=c")
    assert done.returncode == 0, done.stderr
    assert (tpu / "fails").read_text() == ""
    assert {f"cannot {fail} just now" for fail in fails} <= set(done.stderr.splitlines())
    calls = re.findall(r"^compute tpus queued-resources (\w+)", (tpu / "calls").read_text(), re.M)
    assert [call for call in calls if call != "describe"] == ["create", "create"]


def test_what_is_wrong_is_said(tpu):
    done = launch(tpu, "create", "mine", "h100-8")
    assert done.returncode == 2
    assert "h100-8" in done.stderr
    assert launch(tpu, "keep", "mine", "h100-8", "--config=c").returncode == 2
    assert "ZONE" in launch(tpu, "create", "mine", "v6e-16", ZONE="").stderr
    assert launch(tpu, "fly", "mine").returncode == 2
