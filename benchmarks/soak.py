"""Kills a job again and again, and compares what it leaves with one that nobody disturbed.

    python benchmarks/soak.py --kills=100 --workdir=runs/soak

Two jobs in turns: the quickstart at toy size, all stages, and preprocessing of its videos on Ray. A
signal (SIGKILL, SIGTERM, SIGINT, or SIGSTOP and then SIGCONT or SIGKILL) comes at a random moment
of its life, and the same command is run again, until it is done, or was killed eight times and is
left to end; then the other begins, until there were so many kills. Numbers of the logs, bytes of
the dataset and of the videos, arrays of the checkpoints and the best loss must be the same, and
nothing left over; of Ray's dataset, which names its parts otherwise, every row.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import files  # noqa: E402

OVERRIDES = """
    shapes.n_videos=48 shapes.n_held_out=8
    vqvae.n_codes=16 vqvae.n_hiddens=8 vqvae.n_res_layers=0
    vqvae.steps=60 vqvae.log_every=5 vqvae.eval_every=20 vqvae.checkpoint_every=5
    preprocess.videos_per_part=4 preprocess.batch_size=4
    dit.depth=1 dit.width=16 dit.heads=1 dit.unroll=1 dit.batch_size=8 dit.validation_share=0.2
    dit.steps=60 dit.log_every=5 dit.eval_every=10 dit.checkpoint_every=5
    sample.steps=2 fidelity.n_samples=24
"""
SIGNALS = {
    "SIGKILL": (signal.SIGKILL,),
    "SIGTERM": (signal.SIGTERM,),
    "SIGINT": (signal.SIGINT,),
    "SIGSTOP, SIGCONT, SIGTERM": (signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM),
    "SIGSTOP, SIGKILL": (signal.SIGSTOP, signal.SIGKILL),
}
STATUSES = {"SIGKILL": -9, "SIGINT": 130, "SIGSTOP, SIGKILL": -9}
TIMES = ("tokens_per_second", "data_wait_share", "evaluation_seconds", "tflops_per_device", "mfu")
HANGS = 600  # seconds
KILLS_A_RUN = 8  # at most; it is then left alone, so that other runs have their turn


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    words: of its command.
    stage_of: what it is at, by what is in its folder.
    is_done: whether it was at its end, by its folder and what it said.
    result_of: what there is to compare, by name.
    """

    words: Callable[[Path], list[str]]
    stage_of: Callable[[Path], str]
    is_done: Callable[[Path, str], bool]
    result_of: Callable[[Path], dict[str, Any]]


def quickstart(workdir: Path) -> list[str]:
    overrides = (f"--config.{field}" for field in OVERRIDES.split())
    command = ("-m", "opensora_jax.main", "--config=configs/quickstart.py")
    return [*command, f"--workdir={workdir}", *overrides]


def on_ray(workdir: Path) -> list[str]:
    """Preprocessing as in the quickstart that nobody disturbed, which lies beside this folder."""
    whole = workdir.parent / "whole"
    words = ["data_prep/preprocess_data.py", "-c", whole / "shapes" / "train" / "captions.json"]
    words += ["-v", whole / "shapes" / "train" / "videos", "-o", workdir / "dataset"]
    words += ["--vqvae", whole / "vqvae", "--text_model", whole / "text_model", "--fps", 0]
    words += ["--resolution", 32, "--videos_per_part", 4, "--batch_size", 4, "--engine", "ray"]
    return [str(word) for word in words]


def start(job: Job, workdir: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *job.words(workdir)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> str:
    """Waits for it; what it said."""
    try:
        return process.communicate(timeout=HANGS)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        return f"hung for {HANGS} s\n{process.communicate()[1]}"


def stage_of(workdir: Path) -> str:
    """What it is at, by what is there."""
    for name, mark in (
        ("report", "fidelity.json"),
        ("fidelity", "dit/done.json"),
        ("dit", "dit/model.json"),
        ("preprocess", "dataset/metadata.json"),
        ("preprocess", "vqvae/done.json"),
        ("vqvae", "vqvae/model.json"),
    ):
        if (workdir / mark).exists():
            return name
    return "shapes"


def disturb(job: Job, workdir: Path, name: str, seconds: float) -> tuple[str, str | None]:
    """Runs the job and sends it signals after so long; (stage, what was wrong with its end).

    The stage is empty where the job was done before.
    """
    process = start(job, workdir)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    if process.poll() is not None:
        said = end(process)
        return "", None if process.returncode == 0 else f"ended by itself: {said[-500:]}"
    stage = job.stage_of(workdir)
    for number in SIGNALS[name]:
        process.send_signal(number)
        time.sleep(0.3 if len(SIGNALS[name]) > 1 else 0)
    said = end(process)
    if said.startswith("hung"):
        return stage, said[:1000]
    if "Traceback" in said:
        return stage, f"a traceback: {said[-1000:]}"
    if job.is_done(workdir, said):
        return stage, None  # the signal came too late, maybe while the interpreter was ending
    status = STATUSES.get(name, 0)
    if process.returncode != status:
        return stage, f"status {process.returncode}: {said[-500:]}"
    if status >= 0 and said.count("stopped by SIG") != 1:
        return stage, f"not one line that says why it stopped: {said[-500:]}"
    return stage, None


def result_of(workdir: Path) -> dict[str, Any]:
    """What there is to compare, by name."""
    found: dict[str, Any] = {}
    for training in ("vqvae", "dit"):
        lines = (workdir / training / "metrics.jsonl").read_text().splitlines()
        found[f"{training}: numbers"] = [
            {k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines
        ]
        # Where a signal saves a step of its own, that is kept in the place of an older one.
        steps = sorted(folders(workdir / training / "checkpoints"), key=int)
        found[f"{training}: last checkpoint"] = arrays(
            workdir / training / "checkpoints", steps[-1]
        )
        found[f"{training}: kept"] = (len(steps), steps[-1])
    # The best are numbered by how often there was a new one.
    (best,) = folders(workdir / "dit" / "best")
    found["dit: best"] = arrays(workdir / "dit" / "best", best)
    found["dataset"] = bytes_of(workdir / "dataset", "*", without=("metadata.json", ".lock"))
    metadata = files.read_json(workdir / "dataset" / "metadata.json")
    paths = ("command", "checksum", "vqvae", "text_model")
    found["metadata"] = {k: v for k, v in metadata.items() if k not in paths}
    for name in ("shapes", "dit/samples", "vqvae/samples"):
        found[f"{name}: videos"] = bytes_of(workdir / name, "*.mp4")
    fidelity = files.read_json(workdir / "fidelity.json")
    found["fidelity"] = {k: v for k, v in fidelity.items() if k != "seconds"}
    marks = (".tmp", ".orbax-checkpoint-tmp")
    left = [path for path in workdir.rglob("*") if any(mark in path.name for mark in marks)]
    found["left over"] = sorted(str(path.relative_to(workdir)) for path in left)
    return found


def rows_of(workdir: Path) -> dict[str, Any]:
    """Of a dataset that was made on Ray."""
    from opensora_jax.data import dataset

    found = dataset.open_dataset(workdir / "dataset")
    columns = ("video_file", "caption", "fps")
    parts = files.read_json(workdir / "dataset" / "parts.json", list)
    marks = (".tmp", "part-", "texts-")
    there = [path.name for path in (workdir / "dataset").iterdir() if path.is_dir()]
    return {
        "rows": [
            found[i] | {name: found.column(i, name) for name in columns} for i in range(len(found))
        ],
        "counts": found.code_counts,
        "left over": sorted(
            {name for name in there if any(mark in name for mark in marks)}
            - {part["name"] for part in parts}
        ),
    }


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def bytes_of(folder: Path, pattern: str, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    paths = [p for p in folder.rglob(pattern) if p.is_file() and p.name not in without]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def arrays(folder: Path, step: str) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint."""
    import orbax.checkpoint as ocp
    from etils import epath

    found = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for item in (path for path in (folder / step).iterdir() if path.is_dir()):
            if item.name != "about":
                tree = reader.restore(epath.Path(item))
                found |= {f"{item.name}: {key}": value for key, value in leaves_of(tree)}
    return found


def leaves_of(tree: Any) -> list[tuple[str, np.ndarray]]:
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return a == b


def is_whole(workdir: Path, said: str) -> bool:
    path = workdir / "dataset" / "metadata.json"
    return path.exists() and files.read_json(path).get("complete", False)


QUICKSTART = Job(quickstart, stage_of, lambda _, said: "all stages done" in said, result_of)
RAY = Job(on_ray, lambda workdir: "preprocess on Ray", is_whole, rows_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True)
    args = parser.parse_args()
    args.workdir = args.workdir.absolute()
    rng = random.Random(args.seed)
    os.environ |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    expected, lengths = {}, {}
    for job, name in ((QUICKSTART, "whole"), (RAY, "whole_ray")):
        whole = args.workdir / name
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        process = start(job, whole)
        said = end(process)
        assert process.returncode == 0, said
        lengths[job] = time.monotonic() - began
        expected[job] = job.result_of(whole)
    local = rows_of(args.workdir / "whole")
    wrong: list[str] = []
    if not same(local["rows"], expected[RAY]["rows"]):
        wrong.append("the rows of the two engines differ")
    kills: collections.Counter = collections.Counter()
    run = 0
    while kills.total() < args.kills:
        run += 1
        job = RAY if run % 2 == 0 else QUICKSTART
        workdir = args.workdir / f"run{run}"
        shutil.rmtree(workdir, ignore_errors=True)
        for _ in range(min(KILLS_A_RUN, args.kills - kills.total())):
            name = rng.choice(list(SIGNALS))
            stage, problem = disturb(job, workdir, name, rng.uniform(1, 0.6 * lengths[job]))
            if problem:
                wrong.append(f"run {run}, {stage}, {name}: {problem}")
            if not stage:
                break
            kills[stage, name] += 1
            print(f"{kills.total()}: run {run}, {stage}: {name}", file=sys.stderr, flush=True)
        process = start(job, workdir)
        said = end(process)
        if process.returncode:
            wrong.append(f"run {run}: not done: {said[-500:]}")
            continue
        try:
            found = job.result_of(workdir)
        except (OSError, ValueError) as error:
            wrong.append(f"run {run}: lost: {error}")
            continue
        differing = [key for key, value in expected[job].items() if not same(value, found[key])]
        wrong += [f"run {run}: other {key}" for key in differing]
        if not differing:
            shutil.rmtree(workdir)
    stages = ("shapes", "vqvae", "preprocess", "dit", "fidelity", "report", "preprocess on Ray")
    print(f"| signal | {' | '.join(stages)} |\n| --- |{' ---: |' * len(stages)}")
    for name in SIGNALS:
        print(f"| {name} | {' | '.join(str(kills[stage, name]) for stage in stages)} |")
    print(f"{kills.total()} kills in {run} runs; lost or different: {len(wrong)}")
    print("\n".join(wrong))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
