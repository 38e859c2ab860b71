"""What files that ask for much with few bytes take: seconds and memory of each class.

    python benchmarks/attacks.py --files 20

Each file is loaded in a process that measures itself; the most memory is that of Python's own
allocations (tracemalloc, in a run of its own, since it takes time).
"""

import argparse
import collections
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "convert")]

import attack_files  # noqa: E402

from opensora_jax.convert import torch_file  # noqa: E402


def outcome_of(path: Path) -> str:
    try:
        torch_file.load(path)
    except torch_file.TorchFileError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "loaded"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20, help="of each class")
    args = parser.parse_args()
    print("| class | files | most bytes | most seconds | most memory over file | outcome |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        for kind in tqdm.tqdm(attack_files.CLASSES, unit="class"):
            seconds, memory, largest, outcomes = 0.0, 0.0, 0, collections.Counter()
            for n in attack_files.sizes(args.files):
                data = kind(n)
                path.write_bytes(data)
                start = time.perf_counter()
                outcomes[outcome_of(path)] += 1
                seconds = max(seconds, time.perf_counter() - start)
                tracemalloc.start()
                outcome_of(path)
                memory = max(memory, tracemalloc.get_traced_memory()[1] - 10 * len(data))
                tracemalloc.stop()
                largest = max(largest, len(data))
            row = (kind.__name__.replace("_", " "), args.files, f"{largest:,}", f"{seconds:.2f}")
            said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
            print(f"| {' | '.join(map(str, row))} | 10x + {max(memory, 0) / 1e6:.0f} MB | {said} |")


if __name__ == "__main__":
    main()
