"""Samplers on a trained quickstart: what samples show, by the calls of the network and the seconds.

    python benchmarks/sampling.py --workdir=runs/quickstart

Draws the same captions from the same noise by every sampler that the model's objective has, in few
and in many steps, and reads color, shape and direction and the rigidity of outlines from the
pixels. Seconds are those of drawing, decoding included, without compilation. Prints a table; the
standard error of a share p of n samples is sqrt(p (1 - p) / n).
"""

import argparse
import sys
import time
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

STEPS = {
    "euler": (1, 2, 3, 4, 8, 12, 16, 30, 60),
    "heun": (2, 4, 6, 8, 15),
    "dpm++": (4, 6, 8, 12, 16, 30),
    "ddim": (4, 8, 16, 30, 60),
    "ancestral": (30, 60, 120, 250),
    "confidence": (2, 4, 8, 12, 16, 30),
    "jumps": (8, 12, 16, 30, 60),
}


def calls(sampler: str, steps: int) -> int:
    """Of the network, each with and without caption."""
    return 2 * steps - 1 if sampler == "heun" else steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=STEPS, help="some of the model's samplers")
    args = parser.parse_args()
    runtime.start()
    mesh = mesh_lib.make_mesh(dict.fromkeys(mesh_lib.AXES, 1) | {"data": -1})
    generator = Generator.load(args.workdir / "dit", mesh)
    params = generator.restore(args.workdir / "dit")
    labels = [moving_shapes.ALL[i % len(moving_shapes.ALL)] for i in range(args.samples)]
    prompts = [moving_shapes.captions(*label)[0] for label in labels]

    def draw(sampling: Sampling) -> np.ndarray:
        return generator.sample(
            prompts, params=params, sampling=sampling, seed=args.seed, batch_size=args.samples
        )

    print("| sampler | steps | calls | seconds | all of the caption | outline | worst tenth |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for sampler in args.only or generator.task.objective.samplers:
        for steps in STEPS[sampler]:
            sampling = Sampling(steps, args.guidance, sampler=sampler)
            draw(sampling)  # compiles
            start = time.perf_counter()
            videos = draw(sampling)
            seconds = time.perf_counter() - start
            right, outline = shapes.score(videos, labels), shapes.outline_score(videos, labels)
            print(
                f"| {sampler} | {steps} | {calls(sampler, steps)} | {seconds:.1f} "
                f"| {right['all']:.1%} | {outline['mean']:.3f} | {outline['worst_tenth']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
