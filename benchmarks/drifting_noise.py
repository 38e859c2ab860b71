"""Videos for benchmarks: colored noise that drifts, so that frames cost about what films do."""

from pathlib import Path

import numpy as np
import tqdm

from opensora_jax.data import video_io


def make_videos(
    folder: Path, n: int, *, seconds: int, rate: int, height: int, width: int
) -> list[Path]:
    """H.264 files, those that are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"video{i:03d}.mp4" for i in range(n)]
    for i, path in enumerate(tqdm.tqdm(paths, desc="videos", unit="video")):
        if path.exists():
            continue
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (height // 20 + 8, width // 20 + 8, 3), np.uint8)
        scene = coarse.repeat(20, 0).repeat(20, 1)
        scene = np.clip(scene + rng.normal(0, 8, scene.shape), 0, 255).astype(np.uint8)
        n_frames = seconds * rate
        shifts = [(k * 140 // n_frames, k * 150 // n_frames) for k in range(n_frames)]
        frames = np.stack([scene[y : y + height, x : x + width] for y, x in shifts])
        video_io.write_video(path, frames, rate, crf=23)
    return paths
