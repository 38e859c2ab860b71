"""What a DiT is best trained on: its samples by objective and codes, as the training goes on.

    python benchmarks/objectives.py --workdir=runs/objectives

The quickstart's videos by two tokenizers, of a learned codebook and of FSQ with as many codes, and
its DiT with each objective that `VARIANTS` names. All see as many examples by default; with
`--equal_time` those whose steps take longer train for fewer. Samples at each quarter of the
training are read from their pixels, on seen and held-out combinations, and their outlines compared
with ideal ones. Prints a table, with standard errors over the seeds where there are several, and
with `--figure` draws what the samples show over the steps. Run again, it goes on.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import mesh as mesh_lib  # noqa: E402
from opensora_jax import runtime  # noqa: E402
from opensora_jax.data import moving_shapes  # noqa: E402
from opensora_jax.diffusion.samplers import Sampling  # noqa: E402
from opensora_jax.inference.generator import Generator  # noqa: E402
from opensora_jax.metrics import shapes  # noqa: E402

CODES = {"vq": [], "fsq": ["vqvae.quantizer=fsq", "vqvae.levels=(8,8,8,2)"]}
SHARED = ("shapes", "vqvae", "dataset", "text_model")
AUTO = ["dit.prediction=auto", "dit.time_shift=auto"]
# Objective, codes and their head: fields, steps of the sampler, guidance.
VARIANTS = {
    "flow, vq": ([], 30, 2.0),
    "flow, fsq": ([], 30, 2.0),
    "ddpm, vq": (["dit.objective=ddpm", *AUTO], 60, 2.0),
    "masked, vq, joint": (["dit.objective=masked", *AUTO], 30, 2.0),
    "masked, fsq, joint": (["dit.objective=masked", "dit.code_head=joint", *AUTO], 30, 2.0),
    "masked, fsq, factorized": (["dit.objective=masked", *AUTO], 30, 2.0),
    "metric, vq, joint": (["dit.objective=metric", *AUTO], 30, 2.0),
    "metric, fsq, joint": (["dit.objective=metric", "dit.code_head=joint", *AUTO], 30, 2.0),
    "metric, fsq, factorized": (["dit.objective=metric", *AUTO], 30, 2.0),
}


def run(workdir: Path, stages: tuple[str, ...], fields: list[str]) -> None:
    subprocess.run(
        [
            *(sys.executable, "-m", "opensora_jax.main", "--config=configs/quickstart.py"),
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


def seconds_a_step(folder: Path) -> float:
    """The median, by the log, of a training whose batches all have as many tokens."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return 2048 / float(np.median(rates))


def graded(workdir: Path, steps: list[int], n: int, sampling: Sampling) -> list[dict]:
    """What samples of the kept checkpoints show; kept in a file, for when it is asked again."""
    path = workdir / f"graded-{n}-{hash_of(sampling)}.json"
    if path.exists():
        return json.loads(path.read_text())
    generator = Generator.load(workdir / "dit", mesh_lib.make_mesh(MESH))
    labels = [moving_shapes.ALL[i % len(moving_shapes.ALL)] for i in range(n)]
    prompts = [moving_shapes.captions(*label)[0] for label in labels]
    held_out = [label in moving_shapes.HELD_OUT for label in labels]
    found = []
    for step in steps:
        params = generator.restore(workdir / "dit", step=step)
        videos = generator.sample(prompts, params=params, sampling=sampling, seed=1, batch_size=48)
        result = {"step": step, "outline": shapes.outline_score(videos, labels)}
        for name, group in (("seen", False), ("held_out", True)):
            index = [i for i, is_out in enumerate(held_out) if is_out == group]
            result[name] = shapes.score(videos[index], [labels[i] for i in index])
        found.append(result)
    path.write_text(json.dumps(found))
    return found


def hash_of(sampling: Sampling) -> str:
    return f"{sampling.steps}-{sampling.guidance:g}-{sampling.temperature:g}-{sampling.top_p:g}"


MESH = dict.fromkeys(mesh_lib.AXES, 1) | {"data": -1}


def mean_and_error(values: list[float], form: str) -> str:
    mean = format(np.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(np.std(values, ddof=1) / math.sqrt(len(values)), form)}"


def draw_figure(path: Path, curves: dict[str, list[list[dict]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, seeds in curves.items():
        steps = [point["step"] for point in seeds[0]]
        right = np.mean([[p["seen"]["all"] for p in seed] for seed in seeds], axis=0)
        outline = np.mean([[p["outline"]["worst_tenth"] for p in seed] for seed in seeds], axis=0)
        axes[0].plot(steps, right, marker="o", markersize=3, label=name)
        axes[1].plot(steps, outline, marker="o", markersize=3)
    axes[0].set(xlabel="steps", ylabel="samples that show all of their caption")
    axes[1].set(xlabel="steps", ylabel="outline, the worst tenth (IoU)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), help="some of the variants")
    parser.add_argument("--equal_time", action="store_true")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    work = args.workdir.resolve()
    run(work / "vq", ("shapes", "vqvae", "preprocess"), CODES["vq"])
    link(work / "fsq", work / "vq", ("shapes", "text_model"))
    run(work / "fsq", ("vqvae", "preprocess"), CODES["fsq"])
    runtime.start()

    curves, seconds, usual = {}, {}, None
    for name in args.only:
        fields, sampler_steps, guidance = VARIANTS[name]
        codes = name.split(", ")[1]
        n_steps = args.steps
        if args.equal_time:
            probe = link(work / f"{name}-probe", work / codes, SHARED)
            probing = ["dit.steps=60", "dit.log_every=10", "dit.eval_every=60"]
            run(probe, ("dit",), [*CODES[codes], *fields, *probing, "sample.prompts=('red',)"])
            usual = usual or seconds_a_step(probe / "dit")
            n_steps = round(args.steps * usual / seconds_a_step(probe / "dit") / 40) * 40
        curves[name] = []
        for seed in range(args.seeds):
            workdir = link(work / f"{name}-{n_steps}-{seed}", work / codes, SHARED)
            every = n_steps // 4
            length = [f"dit.steps={n_steps}", f"dit.eval_every={n_steps}", f"seed={seed}"]
            kept = [f"dit.checkpoint_every={every}", f"dit.keep_every={every}"]
            run(
                *(workdir, ("dit",)),
                [*CODES[codes], *fields, *length, *kept, f"sample.guidance={guidance}"],
            )
            steps = [every * (i + 1) for i in range(4)]
            sampling = Sampling(sampler_steps, guidance)
            curves[name].append(graded(workdir, steps, args.samples, sampling))
        seconds[name] = seconds_a_step(workdir / "dit")

    print(
        "| objective, codes, head | seconds a step | steps | seen | held out | outline | ", end=""
    )
    print("worst tenth |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, seeds in curves.items():
        last = [seed[-1] for seed in seeds]
        cells = [
            name,
            f"{seconds[name]:.3f}",
            str(last[0]["step"]),
            mean_and_error([x["seen"]["all"] for x in last], ".1%"),
            mean_and_error([x["held_out"]["all"] for x in last], ".1%"),
            mean_and_error([x["outline"]["mean"] for x in last], ".3f"),
            mean_and_error([x["outline"]["worst_tenth"] for x in last], ".3f"),
        ]
        print(f"| {' | '.join(cells)} |")
    if args.figure:
        draw_figure(args.figure, curves)


if __name__ == "__main__":
    main()
