"""Memory and seconds of long windows through a causal tokenizer, at once and in chunks.

    python benchmarks/chunks.py --frames 17 65 257

A tokenizer of Cosmos-DV4x8x8's layout, narrower and with random weights, encodes and decodes a
window of 1 and a multiple of 16 frames, 128 x 128, each way in a process of its own. Memory is what
the compiler says of the largest call (arguments, results, temporary arrays), and by how much the
process grew while it computed; seconds are those of all cores, the least of three runs, compiled
before. The codes of both ways are compared, and the pixels of the same codes.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

import jax  # noqa: E402
from flax import nnx  # noqa: E402

from opensora_jax.inference import chunks  # noqa: E402
from opensora_jax.models.cosmos import Cosmos, CosmosConfig  # noqa: E402
from opensora_jax.windows import Windows  # noqa: E402

TRAINED, SIDE = 17, 128
MIB = 2**20


def resident(name: str) -> float:
    """MiB of this process: VmRSS, or VmHWM, the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def forget_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
    Path("/proc/self/clear_refs").write_text("5")


def compiled(function: Callable, model: Cosmos, x: np.ndarray, n: int) -> float:
    """MiB of the largest of the calls for a window, which has n chunks."""
    graph, state = nnx.split(model)
    size, kept, found = x.shape[1] // n, None, []
    for i in range(min(n, 2)):
        piece = x[:, : size + (i == 0)]
        lowered = function.lower(graph, state, piece, kept, i, n)
        m = lowered.compile().memory_analysis()
        total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
        found.append((total - m.alias_size_in_bytes) / MIB)
        kept = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), lowered.out_info[1])
    return max(found)


def measure(frames: int, n_frames: int, channels: int, output: Path) -> None:
    """Of a tokenizer trained on videos of `n_frames`; writes what it measured and what came out."""
    config = CosmosConfig((4, 8, 8), channels=channels, n_res_blocks=1, n_frames=n_frames)
    model = Cosmos(config, rngs=nnx.Rngs(0))
    windows = Windows(4, True, frames)
    cut, n = chunks.Chunks(model, windows), (frames - 1) // (n_frames - 1)
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (1, frames, SIDE, SIDE, 3), np.uint8)
    shape = (1, windows.latents(frames), SIDE // 8, SIDE // 8)
    codes = rng.integers(0, config.n_codes, shape, np.int32)
    measured, made = {}, {}
    for name, run, function, x in (
        ("encode", cut.encode, chunks._encode, video),
        ("decode", cut.decode, chunks._decode, codes),
    ):
        made[name] = run(x)
        seconds, growth = [], []
        for _ in range(3):
            forget_peak()
            before = resident("VmRSS")
            start = time.process_time()
            run(x)
            seconds.append(time.process_time() - start)
            growth.append(resident("VmHWM") - before)
        measured[name] = [compiled(function, model, x, n), max(growth), min(seconds)]
    np.savez(output, measured=json.dumps(measured), **made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[17, 65, 257])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        measure(args.frames[0], int(args.case[0]), args.channels, Path(args.case[1]))
        return
    print("frames, way, work: MiB by the compiler, MiB the process grew, seconds")
    for frames in args.frames:
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            for way, n_frames in (("at once", frames), ("in chunks", TRAINED)):
                output = Path(folder) / "case.npz"
                command = [sys.executable, __file__, "--frames", frames, "--channels"]
                command += [args.channels, "--case", n_frames, output]
                subprocess.run(list(map(str, command)), check=True)
                found[way] = dict(np.load(output))
                for work, numbers in json.loads(str(found[way]["measured"])).items():
                    in_words = ", ".join(f"{x:.2f}" for x in numbers)
                    print(f"{frames}, {way}, {work}: {in_words}", flush=True)
        whole, pieces = found.values()
        same = (whole["encode"] == pieces["encode"]).mean()
        off = abs(whole["decode"].astype(int) - pieces["decode"]).max()
        print(f"{frames}: {100 * same:.3f}% of {whole['encode'].size} codes alike, ", end="")
        print(f"pixels by up to {off} of 255 apart")


if __name__ == "__main__":
    main()
