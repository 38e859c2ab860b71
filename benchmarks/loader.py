"""Rows a second that a training's input gives on one core, against the usual ways to read them.

    python benchmarks/loader.py --workdir=runs/loader

Makes a dataset of random codes of 16 x 32 x 32 and text features of 32 x 512, and reads batches of
32: by `data.pipeline.latents`, as a training does; row by row by `LatentDataset`; and by Hugging
Face `datasets`, with numpy and with Python lists. Everything in one process that may use one core;
the files are in the page cache.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import numpy as np
import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax.data import dataset_writer, joined, pipeline  # noqa: E402
from opensora_jax.data.dataset import open_dataset  # noqa: E402
from opensora_jax.data.parts import CODES, TEXT  # noqa: E402

LATENT, TEXT_SHAPE, N_CODES, BATCH = (16, 32, 32), (32, 512), 2048, 32
PART = 512  # rows


def make_dataset(folder: Path, n_rows: int) -> None:
    if (folder / "metadata.json").exists():
        return
    rng = np.random.default_rng(0)
    for k in tqdm.trange(-(-n_rows // PART), desc="parts"):
        rows = [
            {
                "video_file": f"video{i}.mp4",
                "caption": f"caption {i}",
                "fps": 8.0,
                CODES: rng.integers(0, N_CODES, LATENT, np.int32),
                TEXT: rng.standard_normal(TEXT_SHAPE, np.float32),
            }
            for i in range(PART * k, min(PART * (k + 1), n_rows))
        ]
        record = {"kept": len(rows), "filtered": [], "failed": []}
        dataset_writer.write_part(folder, k, rows, N_CODES, record)
    metadata = {
        **{"downsample": [4, 4, 4], "vqvae": "-", "vqvae_fingerprint": "-", "text_model": "-"},
        "resolution": [128, 128],
    }
    codebook = rng.standard_normal((N_CODES, 8)).astype(np.float32)
    dataset_writer.finish_dataset(folder, metadata, codebook)


def by_pipeline(folder: Path, n: int) -> int:
    dataset = open_dataset(folder)
    bucket = pipeline.Bucket(dataset, np.arange(len(dataset)), LATENT[0], BATCH)
    batches = pipeline.latents([bucket], text_length=TEXT_SHAPE[0], seed=0)
    return sum(len(batch["codes"]) for batch in itertools.islice(batches, n // BATCH))


def by_rows(folder: Path, n: int) -> int:
    dataset = open_dataset(folder)
    order = np.random.default_rng(0).permutation(len(dataset))[:n]
    return sum(len(dataset[int(i)]) == 2 for i in order)


def by_datasets(folder: Path, n: int, with_numpy: bool) -> int:
    rows = joined.load_joined(folder)
    if not with_numpy:
        import datasets

        parts = sorted(folder.glob("part-?????"))
        rows = datasets.concatenate_datasets(
            [datasets.load_from_disk(part / "videos") for part in parts]
        )
    order = np.random.default_rng(0).permutation(len(rows))[:n]
    return sum(len(rows[int(i)]) > 1 for i in order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    folder = args.workdir / "dataset"
    make_dataset(folder, args.rows)
    ways: dict[str, tuple[Callable[[int], int], int]] = {
        "pipeline.latents, batches of 32": (lambda n: by_pipeline(folder, n), args.rows),
        "LatentDataset, row by row": (lambda n: by_rows(folder, n), args.rows),
        "datasets, numpy (load_joined)": (lambda n: by_datasets(folder, n, True), 256),
        "datasets, Python lists, codes alone": (lambda n: by_datasets(folder, n, False), 64),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        for name, (read, n) in ways.items():
            start = time.perf_counter()
            found = read(n)
            if round_:  # in the first one the files are read, and checked
                seconds[name].append((time.perf_counter() - start) / found)
    first = statistics.median(seconds["pipeline.latents, batches of 32"])
    row_bytes = np.prod(LATENT) * 2 + np.prod(TEXT_SHAPE) * 2
    print("| way | rows a second | MB a second, as stored | time of a row, to the first |")
    print("| --- | ---: | ---: | ---: |")
    for name, values in seconds.items():
        median = statistics.median(values)
        rate = row_bytes / median / 1e6
        print(f"| {name} | {1 / median:,.0f} | {rate:,.0f} | {median / first:.2f} |")


if __name__ == "__main__":
    main()
