"""Whether decoded videos longer than a window show where windows meet.

    python benchmarks/seams.py --vqvae=runs/set/vqvae --videos=runs/set/msrvtt/test/videos

Encodes and decodes whole videos in windows, and prints the PSNR of the frames by their place in a
window. Those beside a seam are the last of a window and the first of the next.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from opensora_jax.data import video_io  # noqa: E402
from opensora_jax.inference.tokenizer import WindowEncoder, decode, load_tokenizer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vqvae", required=True)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--fps", type=float, default=8.0)
    args = parser.parse_args()
    model = load_tokenizer(args.vqvae)
    window = model.n_frames
    encoder = WindowEncoder(model, window, 8)
    errors: list[list[float]] = [[] for _ in range(window)]  # by place in a window
    beside_seam, others = [], []
    for path in sorted(args.videos.glob("*.mp4")):
        video = video_io.read_video(path, resolution=args.resolution, fps=args.fps)
        video = video[: len(video) // window * window]
        if len(video) < 2 * window:
            continue
        encoder.add(video)
        decoded = decode(model, encoder.finish()[0][None], window)[0]
        error_T = ((video.astype(np.float64) - decoded) ** 2).mean(axis=(1, 2, 3))
        for i, error in enumerate(error_T):
            errors[i % window].append(error)
            is_beside_seam = i % window in (0, window - 1) and 0 < i < len(video) - 1
            (beside_seam if is_beside_seam else others).append(error)

    def psnr(squared_errors: list[float]) -> float:
        return 10 * np.log10(255**2 / np.mean(squared_errors))

    print("frame of the window:", " ".join(f"{psnr(e):.2f}" for e in errors), "dB")
    print(f"beside a seam: {psnr(beside_seam):.2f} dB of {len(beside_seam)} frames")
    print(f"others:        {psnr(others):.2f} dB of {len(others)} frames")


if __name__ == "__main__":
    main()
