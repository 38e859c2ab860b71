"""Memory that a large captions file takes, as Python objects and as preprocessing reads it.

    python benchmarks/captions.py --workdir=runs/captions

Writes a captions file (JSONL) of so many entries with two captions each, and goes through it twice,
in a process each: all entries in a list and the numbers of all texts in a dict; and `read_captions`
with `on_disk.Numbers`. Memory is what the process has at most beyond what it had before.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax.data.captions import read_captions  # noqa: E402
from opensora_jax.data.on_disk import Numbers  # noqa: E402


def write(path: Path, n: int) -> None:
    with path.open("w") as file:
        for i in range(n):
            captions = [f"caption {i}: a person walks along a street in the rain", f"{i}: rain"]
            entry = {"file": f"shard{i // 1000:05d}/video{i:08d}.mp4", "captions": captions}
            file.write(json.dumps(entry) + "\n")


def read_into_lists(path: Path) -> Iterable[dict]:
    with path.open() as file:
        return [json.loads(line) for line in file]


WAYS = {"in memory": (read_into_lists, dict), "on disk": (read_captions, Numbers)}


def measure(way: str, path: Path) -> tuple[float, float]:
    """(MiB, CPU seconds)."""
    read, make_numbers = WAYS[way]
    before, start = _most(), time.process_time()
    entries, numbers = read(path), make_numbers()
    for entry in entries:
        for caption in entry["captions"]:
            if caption not in numbers:
                numbers[caption] = len(numbers)
    assert len(numbers)
    return _most() - before, time.process_time() - start


def _most() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--entries", type=int, nargs="+", default=[100_000, 1_000_000])
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    print("| entries | way | MiB | CPU seconds |")
    print("| ---: | --- | ---: | ---: |")
    for n in args.entries:
        path = args.workdir / f"captions{n}.jsonl"
        if not path.exists():
            write(path, n)
        for way in WAYS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory, seconds = pool.apply(measure, (way, path))
            print(f"| {n:,} | {way} | {memory:,.0f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
