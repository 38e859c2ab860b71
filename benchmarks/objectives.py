"""What a DiT is best trained on: its samples by objective and codes, as the training goes on.

    python benchmarks/objectives.py --workdir=runs/objectives
    python benchmarks/objectives.py --workdir=runs/world_objectives --config=configs/world.py

The videos of a configuration that makes its own, the quickstart's or the world of scenes, by two
tokenizers, of a learned codebook and of FSQ with as many codes, and its DiT with each objective
that `VARIANTS` names. All see as many examples by default; with `--equal_time` those whose steps
take longer train for fewer. Samples along the training are read from their pixels, on seen and
held-out combinations, and outlines of single shapes compared with ideal ones. Prints a table, with
standard errors over the seeds where there are several, and with `--figure` draws what the samples
show over the steps. Run again, it goes on.
"""

import argparse
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import cli, files, runtime  # noqa: E402
from opensora_jax import mesh as mesh_lib  # noqa: E402
from opensora_jax.build import training as build  # noqa: E402
from opensora_jax.inference.generator import Generator  # noqa: E402
from opensora_jax.stages import fidelity, worlds  # noqa: E402

CODES = {"vq": [], "fsq": ["vqvae.quantizer=fsq", "vqvae.levels=(8,8,8,2)"]}
SHARED = ("shapes", "vqvae", "dataset", "text_model")
AUTO = ["dit.prediction=auto", "dit.time_shift=auto"]
DDPM = ["dit.objective=ddpm", "dit.time_shift=auto"]
# Objective, codes and their head, or what the network gives: fields. The codes are the second word.
VARIANTS = {
    "flow, vq": [],
    "flow, fsq": [],
    "flow, vq, velocity": ["dit.prediction=velocity"],
    "ddpm, vq, noise": [*DDPM, "dit.prediction=noise"],
    "ddpm, vq, data": [*DDPM, "dit.prediction=data"],
    "ddpm, vq, data, shift 2": ["dit.objective=ddpm", "dit.time_shift=2.0", "dit.prediction=data"],
    "masked, vq, joint": ["dit.objective=masked", *AUTO],
    "masked, fsq, joint": ["dit.objective=masked", "dit.code_head=joint", *AUTO],
    "masked, fsq, factorized": ["dit.objective=masked", *AUTO],
    "masked, fsq, shift 6": ["dit.objective=masked", "dit.time_shift=6.0"],
    "metric, vq, joint": ["dit.objective=metric", *AUTO],
    "metric, fsq, joint": ["dit.objective=metric", "dit.code_head=joint", *AUTO],
    "metric, fsq, factorized": ["dit.objective=metric", *AUTO],
}
# Columns of the table, and what they are of a graded point of a training.
COLUMNS: dict[str, tuple[Callable[[dict], float | None], str]] = {
    "seen": (lambda point: point["seen"]["all"], ".1%"),
    "held out": (lambda point: point["held_out"]["all"], ".1%"),
    "properties": (lambda point: properties(point), ".1%"),
    "outline": (lambda point: point.get("outline", {}).get("samples", {}).get("mean"), ".3f"),
    "worst tenth": (
        lambda point: point.get("outline", {}).get("samples", {}).get("worst_tenth"),
        ".3f",
    ),
}


def properties(point: dict) -> float:
    """Of all properties but "all", the mean of the shares of samples that show it, both splits."""
    splits = [point["seen"], point["held_out"]]
    return float(np.mean([x for split in splits for name, x in split.items() if name != "all"]))


def run(config: str, workdir: Path, stages: tuple[str, ...], fields: list[str]) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "opensora_jax.main", f"--config={config}"),
            *(f"--workdir={workdir}", f"--config.stages={stages!r}"),
            *(f"--config.{field}" for field in fields),
        ],
        cwd=ROOT,
        check=True,
    )


def link(workdir: Path, shared: Path, parts: tuple[str, ...]) -> Path:
    workdir.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if not (workdir / part).exists():
            (workdir / part).symlink_to(shared / part)
    return workdir


def seconds_a_step(folder: Path, batch_size: int) -> float:
    """The median, by the log, of a training whose batches all have as many tokens."""
    grid = json.loads((folder / "model.json").read_text())
    t, h, w = grid["latent_grid"]
    tokens = batch_size * t * h * w // grid["dit"]["patch"] ** 2
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return tokens / float(np.median(rates))


def graded(config: ConfigDict, workdir: Path, steps: list[int]) -> list[dict]:
    """What `stages.fidelity` says of the checkpoints of these steps; kept for the next time."""
    c, sampler_steps = config.fidelity, config.sample.steps
    generator = Generator.load(workdir / "dit", mesh_lib.make_mesh(config.mesh))
    if generator.task.objective.name == "ddpm":
        sampler_steps *= 2
    sampling = build.sampling(config.sample, steps=sampler_steps)
    path = workdir / f"graded-{c.n_samples}.json"
    found = {x["step"]: x for x in json.loads(path.read_text())} if path.exists() else {}
    world = worlds.of(config)
    asked = world.questions(c.n_samples)
    for step in steps:
        if step in found:
            continue
        videos = generator.sample(
            [question.prompt for question in asked],
            params=generator.restore(workdir / "dit", step=step),
            sampling=sampling,
            seed=1,
            batch_size=c.batch_size,
        )
        found[step] = {"step": step, **fidelity.grade(world, asked, videos)}
        files.write_json(path, list(found.values()))
    return [found[step] for step in steps]


def mean_and_error(values: list[float], form: str) -> str:
    mean = format(np.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(np.std(values, ddof=1) / math.sqrt(len(values)), form)}"


def draw_figure(path: Path, curves: dict[str, list[list[dict]]]) -> None:
    from matplotlib.figure import Figure

    has_outline = all("outline" in point for seeds in curves.values() for point in seeds[0])
    right = ("seen", "samples that show all of their caption")
    worst = ("worst tenth", "outline, the worst tenth (IoU)")
    drawn = (right, worst if has_outline else ("properties", "properties that are right"))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, (column, label) in zip(figure.subplots(1, 2), drawn, strict=True):
        read = COLUMNS[column][0]
        for name, seeds in curves.items():
            steps = [point["step"] for point in seeds[0]]
            values = np.array([[read(point) for point in seed] for seed in seeds])
            error = values.std(axis=0, ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else None
            mean = values.mean(axis=0)
            axes.errorbar(steps, mean, error, marker="o", markersize=3, capsize=2, label=name)
        axes.set(xlabel="steps", ylabel=label, ylim=(0, 1.02))
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--config", default="configs/quickstart.py", help="one that makes its videos"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=cli.number(int, 10), default=192)
    parser.add_argument("--points", type=int, default=4, help="of a training that are graded")
    parser.add_argument(
        "--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME"
    )
    parser.add_argument("--equal_time", action="store_true")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    work = args.workdir.resolve()
    config = runpy.run_path(str(ROOT / args.config))["get_config"]()
    config.fidelity.n_samples = args.samples
    run(args.config, work / "vq", ("shapes", "vqvae", "preprocess"), CODES["vq"])
    if any(name.split(", ")[1] == "fsq" for name in args.only):
        link(work / "fsq", work / "vq", ("shapes", "text_model"))
        run(args.config, work / "fsq", ("vqvae", "preprocess"), CODES["fsq"])
    runtime.start()

    curves, seconds, usual = {}, {}, None
    for name in args.only:
        fields, codes = VARIANTS[name], name.split(", ")[1]
        n_steps = args.steps
        if args.equal_time:
            probe = link(work / f"{name}-probe", work / codes, SHARED)
            probing = ["dit.steps=60", "dit.log_every=10", "dit.eval_every=60"]
            probing += ["dit.checkpoint_every=60", "sample.prompts=('red',)"]
            run(args.config, probe, ("dit",), [*CODES[codes], *fields, *probing])
            spent = seconds_a_step(probe / "dit", config.dit.batch_size)
            usual = usual or spent
            n_steps = round(args.steps * usual / spent / 40) * 40
        curves[name] = []
        every = n_steps // args.points
        for seed in args.seeds:
            workdir = link(
                work / f"{name}, {n_steps} steps in {args.points}, seed {seed}",
                work / codes,
                SHARED,
            )
            length = [f"dit.steps={n_steps}", f"dit.eval_every={n_steps}", f"seed={seed}"]
            kept = [f"dit.checkpoint_every={every}", f"dit.keep_every={every}"]
            run(args.config, workdir, ("dit",), [*CODES[codes], *fields, *length, *kept])
            points = [every * (i + 1) for i in range(args.points)]
            curves[name].append(graded(config, workdir, points))
        seconds[name] = seconds_a_step(workdir / "dit", config.dit.batch_size)

    columns = {
        title: column
        for title, column in COLUMNS.items()
        if all(column[0](seeds[0][-1]) is not None for seeds in curves.values())
    }
    print(f"| objective, codes | seconds a step | steps | {' | '.join(columns)} |")
    print(f"| --- | ---: | ---: |{' ---: |' * len(columns)}")
    for name, seeds in curves.items():
        last = [seed[-1] for seed in seeds]
        cells = [name, f"{seconds[name]:.3f}", str(last[0]["step"])]
        cells += [mean_and_error([read(x) for x in last], form) for read, form in columns.values()]
        print(f"| {' | '.join(cells)} |")
    if args.figure:
        draw_figure(args.figure, curves)


if __name__ == "__main__":
    main()
