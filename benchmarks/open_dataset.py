"""How long a large dataset takes to open, and how much memory.

    python benchmarks/open_dataset.py --rows 10000000

Writes the index of a dataset of 20 captions a video, of which only the first part is there, and
opens it in a process of its own, splitting it into training and validation.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import files  # noqa: E402
from opensora_jax.data import dataset, dataset_writer, parts  # noqa: E402
from opensora_jax.data.index import Index, smallest  # noqa: E402

CAPTIONS, VIDEOS_PER_PART = 20, 64
OPEN = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[2])
import numpy, pyarrow  # what else is loaded is not the dataset's
from opensora_jax.data.dataset import open_dataset
from opensora_jax.data.pipeline import split_by_video

def resident():  # bytes
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

before, start = resident(), time.perf_counter()
found = open_dataset(sys.argv[1])
seconds, memory = time.perf_counter() - start, resident() - before
start = time.perf_counter()
train, validation = split_by_video(found, 0.02)
split = time.perf_counter() - start
print(json.dumps([len(found), seconds, memory, split, resident() - before]))
"""


def write(folder: Path, n_rows: int) -> None:
    """A dataset whose first part stands for all."""
    rng = np.random.default_rng(0)
    rows = []
    for video in range(VIDEOS_PER_PART):
        codes = rng.integers(0, 2048, (10, 16, 16))
        for k in range(CAPTIONS):
            text = rng.standard_normal((4, 8)).astype(np.float16)
            row = {"video_file": f"video{video}.mp4", "caption": f"{video} {k}", "fps": 8.0}
            rows.append(row | {parts.CODES: codes, parts.TEXT: text})
    record = {"kept": VIDEOS_PER_PART, "filtered": [], "failed": []}
    dataset_writer.write_part(folder, 0, rows, 2048, record)
    metadata = {"downsample": [4, 4, 4], "vqvae": "v", "text_model": "t", "resolution": [64, 64]}
    dataset_writer.finish_dataset(folder, metadata, np.zeros((2048, 8), np.float32))
    n_videos = n_rows // CAPTIONS
    n_parts = -(-n_videos // VIDEOS_PER_PART)
    ends = np.minimum(VIDEOS_PER_PART * np.arange(1, n_parts + 1), n_videos)
    index = Index(
        row_video=smallest(np.repeat(np.arange(n_videos), CAPTIONS)),
        row_text=smallest(np.arange(n_rows)),
        video_frames=smallest(rng.integers(4, 80, n_videos)),
        text_lengths=smallest(rng.integers(4, 40, n_rows)),
        video_ends=ends,
        text_ends=CAPTIONS * ends,
        video_hashes=rng.integers(0, 2**64, n_videos, np.uint64),
    )
    found = files.read_json(folder / "metadata.json")
    sums = found[dataset.FILES] | index.save(folder)
    files.write_json(folder / parts.LIST, files.read_json(folder / parts.LIST, list) * n_parts)
    sums[parts.LIST] = parts.checksum(folder / parts.LIST)
    del found[dataset.CHECKSUM]
    dataset_writer.write_metadata(folder, found | {"n_rows": n_rows, dataset.FILES: sums})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.rows)
        command = [sys.executable, "-c", OPEN, folder, ROOT]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, seconds, memory, split, after = json.loads(done.stdout)
    print(f"{rows:,} rows open in {seconds:.2f} s and {memory / 1e6:.0f} MB")
    print(f"validation chosen in {split:.2f} s; then {after / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
