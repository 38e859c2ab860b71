"""Clips a second that the input of a tokenizer's training gives, against whole videos decoded.

    python benchmarks/clips.py --workdir=runs/clips

Makes videos of 30 seconds, 640 x 360 at 24 frames a second (H.264), and draws clips of 16 frames at
8 frames a second, 128 x 128, in batches of 8: once by decoding every video to its end with two
threads and cutting the clip out, as it was done before (but for a cache of 1 GiB, which large sets
do not fit), and once as `data.pipeline.clips` does it. Both give the same clips.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from benchmarks.drifting_noise import make_videos  # noqa: E402
from opensora_jax.data import pipeline, video_io  # noqa: E402

N_FRAMES, FPS, RESOLUTION, BATCH = 16, 8.0, 128, 8
SECONDS, RATE, HEIGHT, WIDTH = 30, 24, 360, 640


class WholeSource(pipeline.ClipSource):
    """Clips cut out of videos that are decoded to their ends."""

    def clip(self, index, rng):
        video = video_io.read_video(self._paths[index], resolution=RESOLUTION, fps=FPS)
        start = int(rng.integers(len(video) - N_FRAMES + 1))
        return {"video": video[start : start + N_FRAMES]}


def measure(kind: str, paths: list[Path], seed: int, n_batches: int) -> tuple[float, int]:
    """Seconds for so many batches, of videos of which nothing is known yet, and a checksum."""
    source = {"whole": WholeSource, "windows": pipeline.ClipSource}[kind]
    source = source(paths, N_FRAMES, RESOLUTION, FPS)
    workers = 2 if kind == "whole" else 0
    start = time.perf_counter()
    batches = pipeline.clips(source, batch_size=BATCH, seed=seed, workers=workers)
    found = [batch["video"] for batch in itertools.islice(batches, n_batches)]
    return time.perf_counter() - start, zlib.crc32(np.stack(found).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--batches", type=int, default=12, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sizes = {"seconds": SECONDS, "rate": RATE, "height": HEIGHT, "width": WIDTH}
    paths = make_videos(args.workdir, args.videos, **sizes)

    ratios, rates = [], {"whole": [], "windows": []}
    for seed in range(args.rounds):
        found = {}
        for kind in rates:
            # In a process of its own, so that what it reads ahead disturbs nobody.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[kind] = pool.apply(measure, (kind, paths, seed, args.batches))
            rates[kind].append(args.batches * BATCH / found[kind][0])
        (before, one), (now, two) = found.values()
        assert one == two, "other clips"
        ratios.append(before / now)
    before, now = (statistics.median(values) for values in rates.values())
    print(f"whole videos: {before:.1f} clips/s; windows: {now:.1f} clips/s")
    print(f"ratio: {statistics.median(ratios):.1f}, of {len(ratios)} rounds from ", end="")
    print(f"{min(ratios):.1f} to {max(ratios):.1f}")


if __name__ == "__main__":
    main()
