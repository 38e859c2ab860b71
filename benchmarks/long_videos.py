"""Peak memory of preprocessing a video of one minute and one of ten: it does not grow with length.

    python benchmarks/long_videos.py --workdir=runs/long_videos

Makes both videos, 64 x 48 at 24 frames a second (H.264), and preprocesses each in a process of its
own, at 256 x 256 and 8 frames a second in windows of 8, with a small encoder of random weights.
Also of the process that decodes it, whose peak is looked up five times a second (Linux).
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import av
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax import files  # noqa: E402
from opensora_jax.inference.small_text_model import make_small_text_model  # noqa: E402
from opensora_jax.inference.tokenizer import save_tokenizer  # noqa: E402
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig  # noqa: E402
from opensora_jax.preprocessing.options import Options  # noqa: E402
from opensora_jax.stages.preprocess import preprocess  # noqa: E402

SECONDS, RATE, HEIGHT, WIDTH = (60, 600), 24, 48, 64
FPS, RESOLUTION, WINDOW = 8.0, 256, 8


def make_video(path: Path, seconds: int) -> None:
    """A bright square that goes round."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for t in range(seconds * RATE):
            image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
            image[8:24, t % 48 : t % 48 + 16] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def watch_decoder(is_over: threading.Event, peak: list[int]) -> None:
    """Notes the most KiB that a process started by this one has held."""
    while not is_over.wait(0.2):
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                        if line.startswith("VmHWM"):
                            peak[0] = max(peak[0], int(line.split()[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--only", type=int, help="the seconds of the video: in this process")
    args = parser.parse_args()
    work = args.workdir.absolute()
    if args.only:
        name = f"{args.only}.mp4"
        files.write_text(
            work / f"{args.only}.json", json.dumps([{"file": name, "captions": ["a"]}])
        )
        models = {"vqvae": work / "vqvae", "text_model": work / "text"}
        sizes = {"resolution": RESOLUTION, "fps": FPS, "window": WINDOW}
        is_over, decoder = threading.Event(), [0]
        watch = threading.Thread(target=watch_decoder, args=(is_over, decoder))
        watch.start()
        try:
            paths = (work / f"{args.only}.json", work, work / f"dataset{args.only}")
            preprocess(*paths, Options(**models, **sizes))
        finally:
            is_over.set()
            watch.join()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, *decoder)
        return
    work.mkdir(parents=True, exist_ok=True)
    sizes = {"n_codes": 256, "embedding_dim": 8, "n_hiddens": 8, "n_res_layers": 0}
    config = VQVAEConfig(**sizes, downsample=(4, 8, 8), n_frames=WINDOW)
    save_tokenizer(work / "vqvae", VQVAE(config, rngs=nnx.Rngs(0)))
    make_small_text_model(work / "text", ["a"])
    peaks = []
    for seconds in SECONDS:
        make_video(work / f"{seconds}.mp4", seconds)
        words = [sys.executable, __file__, "--workdir", str(work), "--only", str(seconds)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        peaks.append([int(kib) / 1024 for kib in done.stdout.split()[-2:]])
    window = WINDOW * RESOLUTION**2 * 3 / 2**20
    print("| video | peak, MiB | of its decoder, MiB |\n| --- | ---: | ---: |")
    for seconds, (own, decoder) in zip(SECONDS, peaks, strict=True):
        print(f"| {seconds} s | {own:,.0f} | {decoder:,.0f} |")
    more = sum(peaks[1]) - sum(peaks[0])
    print(f"{more / window:,.1f} windows of {window:.1f} MiB more")


if __name__ == "__main__":
    main()
