"""One model of moving shapes in several aspect ratios, drawn at these and at others.

    python benchmarks/buckets.py --workdir=runs/buckets

Writes videos of five sizes, trains a VQ-VAE on them (or takes that of --vqvae), encodes them into
buckets, trains the quickstart's DiT on these, and reads color, shape and direction from samples of
each bucket and of sizes that were held back: their aspect ratios, and of some also a number of
tokens along a side. Run again, it goes on. Prints a table; the standard error of a share p of n
samples is sqrt(p (1 - p) / n).
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from configs import quickstart  # noqa: E402
from opensora_jax import config as config_lib  # noqa: E402
from opensora_jax import files, main, runtime  # noqa: E402
from opensora_jax.build import training as build  # noqa: E402
from opensora_jax.data import moving_shapes  # noqa: E402
from opensora_jax.data.buckets import Size, parse  # noqa: E402
from opensora_jax.inference.generator import Generator  # noqa: E402
from opensora_jax.metrics import shapes  # noqa: E402

# Tokens of 8 x 8 pixels: 6 x 6, 5 x 7, 7 x 5, 4 x 9 and 9 x 4.
TRAINED = "8x48x48,8x40x56,8x56x40,8x32x72,8x72x32"
# 6 x 5, 5 x 6, 7 x 4 and, with a side that none of the others has, 4 x 8 and 8 x 4.
HELD_BACK = "8x48x40,8x40x48,8x56x32,8x32x64,8x64x32"


def write_videos(folder: Path, sizes: tuple[Size, ...], n: int) -> None:
    """n videos of each size, and their captions file."""
    entries = []
    for seed, size in enumerate(sizes):
        moving_shapes.write_dataset(
            folder / str(size),
            n_videos=n,
            combinations=moving_shapes.ALL,
            seed=seed,
            n_frames=size.n_frames,
            resolution=(size.height, size.width),
            fps=8.0,
            n_captions=3,
        )
        for entry in files.read_json(folder / str(size) / "captions.json", list):
            entries.append({**entry, "file": f"{size}/videos/{entry['file']}"})
    files.write_json(folder / "captions.json", entries)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True)
    add("--vqvae", default="", help="a tokenizer of the quickstart's sizes; empty: one is trained")
    add("--trained", default=TRAINED, help="sizes of the videos and of the buckets")
    add("--held_back", default=HELD_BACK, help="sizes that are only drawn")
    add("--videos", type=int, default=480, help="of each size")
    add("--steps", type=int, default=4000)
    add("--batch_size", type=int, default=16)
    add("--samples", type=int, default=96, help="of each size")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def run() -> None:
    args = parse_args()
    trained, held_back = parse(args.trained), parse(args.held_back)
    videos = args.workdir / "videos"
    write_videos(videos, trained, args.videos)
    c = quickstart.get_config()
    c.seed = args.seed
    c.stages = ("preprocess", "dit") if args.vqvae else ("vqvae", "preprocess", "dit")
    c.data.captions, c.data.videos = str(videos / "captions.json"), str(videos)
    c.data.held_out_videos, c.data.vqvae = str(videos / str(trained[0]) / "videos"), args.vqvae
    c.vqvae.resolution = min(min(size.height, size.width) for size in trained)
    c.preprocess.buckets = args.trained
    c.preprocess.n_frames = 0
    c.dit.batch_size, c.dit.steps = args.batch_size, args.steps
    c.dit.eval_every = args.steps
    c.dit.unroll = 1  # there is a compilation for each bucket
    c.sample.guidance = 3.0
    runtime.start()
    config_lib.check(c)
    main.run(c, files.absolute(args.workdir))

    generator = Generator.load(args.workdir / "dit")
    params = generator.restore(args.workdir / "dit")
    labels = [moving_shapes.ALL[i % len(moving_shapes.ALL)] for i in range(args.samples)]
    prompts = [moving_shapes.captions(*label)[0] for label in labels]
    print("| size | tokens a frame | was trained on | color | shape | direction | all |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for size in (*trained, *held_back):
        grid = generator.latent_grid(size.n_frames, size.height, size.width)
        drawn = generator.sample(
            prompts,
            params=params,
            sampling=build.sampling(c.sample),
            seed=args.seed + 1,
            grid=grid,
            batch_size=48,
        )
        right = shapes.score(drawn, labels)
        shares = " | ".join(f"{right[name]:.1%}" for name in ("color", "shape", "direction", "all"))
        n_tokens = math.prod(grid[1:]) // c.dit.patch**2
        known = "yes" if size in trained else "no"
        print(f"| {size} | {n_tokens} | {known} | {shares} |", flush=True)


if __name__ == "__main__":
    run()
