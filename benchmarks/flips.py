"""What becomes of single changed bits in a dataset: whether a training would see them.

    python benchmarks/flips.py --flips 600

Makes a dataset, changes one bit of one of its files at a time, and reads all rows of it as a
training does, in processes of their own: a flip is told (an error that names the file), silent (the
rows read are others), without effect, or ends the process.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax.data import dataset_writer, parts  # noqa: E402

# Reads what it is told to, until it dies.
READER = """
import sys, zlib
sys.path.insert(0, sys.argv[1])
from opensora_jax.data.dataset import DatasetError, open_dataset

for line in sys.stdin:
    try:
        found, crc = open_dataset(line.strip()), 0
        for i in range(len(found)):
            for array in found[i].values():
                crc = zlib.crc32(array.tobytes(), crc)
        for value in (found.codebook, found.code_counts):
            crc = zlib.crc32(value.tobytes(), crc)
        print(crc, flush=True)
    except DatasetError as error:
        print("told", flush=True)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def write(folder: Path, flat: bool) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        rows = []
        for video in range(16):
            codes = rng.integers(0, 512, (8, 8, 8))
            for k in range(4):
                name = f"video{16 * number + video}"
                row = {"video_file": f"{name}.mp4", "caption": f"{name} {k}", "fps": 8.0}
                text = rng.standard_normal((6, 16)).astype(np.float16)
                rows.append(row | {parts.CODES: codes, parts.TEXT: text})
        record = {"kept": 16, "filtered": [], "failed": []}
        dataset_writer.write_part(folder, number, rows, 512, record, flat=flat)
    metadata = {"downsample": [4, 4, 4], "vqvae": "v", "text_model": "t", "resolution": [32, 32]}
    codebook = rng.standard_normal((512, 16)).astype(np.float32)
    dataset_writer.finish_dataset(folder, metadata, codebook)


class Reader:
    """A process that reads datasets; started again when it dies."""

    def __init__(self):
        self._process = None

    def read(self, folder: Path) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", READER, ROOT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().strip()
        if not answer:
            answer = f"ended with {self._process.wait()}"
            self._process = None
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flat", action="store_true", help="a dataset with a row a caption")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    counts = collections.defaultdict(collections.Counter)
    reader = Reader()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, args.flat)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        sizes = np.array([path.stat().st_size for path in paths])
        right = reader.read(folder)
        for _ in tqdm.trange(args.flips, unit="flip"):
            path = paths[rng.choice(len(paths), p=sizes / sizes.sum())]
            data = path.read_bytes()
            place = int(rng.integers(8 * len(data)))
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            answer = reader.read(folder)
            path.write_bytes(data)
            outcome = "without effect" if answer == right else "silent"
            if not answer.isdigit():
                outcome = answer
            kind = (
                path.parent.name if path.suffix == ".arrow" and not args.flat else path.suffix[1:]
            )
            counts[kind][outcome] += 1
    outcomes = sorted({outcome for counter in counts.values() for outcome in counter})
    print(f"| in | {' | '.join(outcomes)} |\n| --- |{' ---: |' * len(outcomes)}")
    for kind, counter in sorted(counts.items()):
        print(f"| {kind} | {' | '.join(str(counter[outcome]) for outcome in outcomes)} |")
    total = sum(counts.values(), collections.Counter())
    print(json.dumps(total))


if __name__ == "__main__":
    main()
