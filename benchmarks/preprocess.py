"""Videos a minute of preprocessing, against a plain loop and against its parts alone.

    python benchmarks/preprocess.py --workdir=runs/preprocess

Makes videos of 10 seconds, 320 x 240 at 24 frames a second (H.264), and encodes them at 64 x 64, 8
frames a second, in turns: by a plain loop (read the whole video at its own size and rate, choose
frames, resize, encode its windows, append); decoding alone and encoding alone, as preprocessing
does them; and by the engines. Once with a fast encoder and once with a slow one, both of random
weights. Figures are medians; compare them within a table.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import av
import jax
import numpy as np
from flax import nnx

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in the place of this folder, which has a tokenizers.py

from benchmarks.drifting_noise import make_videos  # noqa: E402
from opensora_jax import files  # noqa: E402
from opensora_jax.data.clips import Decoding, decode_clips  # noqa: E402
from opensora_jax.inference.small_text_model import make_small_text_model  # noqa: E402
from opensora_jax.inference.tokenizer import (  # noqa: E402
    WindowEncoder,
    load_tokenizer,
    save_tokenizer,
)
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig  # noqa: E402
from opensora_jax.preprocessing.options import Options  # noqa: E402
from opensora_jax.stages.preprocess import preprocess  # noqa: E402
from opensora_jax.windows import Windows  # noqa: E402

SECONDS, RATE, HEIGHT, WIDTH = 10, 24, 240, 320
FPS, RESOLUTION, WINDOW, BATCH = 8.0, 64, 16, 8
DOWNSAMPLE = (4, 4, 4)
WIDTHS = {"fast": 8, "slow": 48}  # of the encoder


def make_tokenizer(folder: Path, width: int) -> None:
    if (folder / "model.json").exists():
        return
    sizes = {"n_codes": 256, "embedding_dim": 8, "n_hiddens": width, "n_res_layers": 1}
    config = VQVAEConfig(**sizes, downsample=DOWNSAMPLE, n_frames=WINDOW)
    save_tokenizer(folder, VQVAE(config, rngs=nnx.Rngs(0)))


def plain_loop(paths: list[Path], model: VQVAE) -> int:
    graph, state = nnx.split(model)
    encode = jax.jit(lambda state, video: nnx.merge(graph, state).encode(video))
    rows = []
    for path in paths:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        video = np.stack(frames)[:: int(RATE / FPS)]
        side = min(HEIGHT, WIDTH)
        video = video[:, (HEIGHT - side) // 2 :][:, :side, (WIDTH - side) // 2 :][:, :, :side]
        at = np.arange(RESOLUTION) * side // RESOLUTION
        video = video[:, at][:, :, at].astype(np.float32) / 255 - 0.5
        video = video[: len(video) // WINDOW * WINDOW]
        codes = [
            np.asarray(encode(state, video[None, start : start + WINDOW]))[0]
            for start in range(0, len(video), WINDOW)
        ]
        rows.append(np.concatenate(codes))
    return len(rows)


def decode_alone(paths: list[Path]) -> int:
    decoding = Decoding((RESOLUTION, RESOLUTION), FPS, None, None, Windows(4, False, WINDOW))
    entries = [{"file": path.name} for path in paths]
    return sum(1 for _ in decode_clips(decoding, paths[0].parent, entries))


def encode_alone(n: int, model: VQVAE) -> int:
    encoder = WindowEncoder(model, WINDOW, BATCH)
    video = np.zeros((int(SECONDS * FPS), RESOLUTION, RESOLUTION, 3), np.uint8)
    for _ in range(n):
        encoder.add(video)
    return len(encoder.finish())


def engine(name: str, work: Path, captions: Path, videos: Path, tokenizer: Path) -> float:
    """Seconds of the work, without those of start and end."""
    output = work / f"dataset-{name}"
    shutil.rmtree(output, ignore_errors=True)
    options = {"vqvae": tokenizer, "text_model": work / "text", "resolution": RESOLUTION}
    options |= {"fps": FPS, "batch_size": BATCH, "videos_per_part": 16}
    start = time.perf_counter()
    if name == "local":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            preprocess(captions, videos, output, Options(**options))
        return time.perf_counter() - start
    words = ["data_prep/preprocess_data.py", "-c", captions, "-v", videos, "-o", output]
    words += ["--vqvae", tokenizer, "--text_model", work / "text", "--resolution", RESOLUTION]
    words += ["--batch_size", BATCH, "--videos_per_part", 16, "--engine", name]
    subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="time the engine ray as well")
    args = parser.parse_args()
    work = args.workdir.absolute()
    sizes = {"seconds": SECONDS, "rate": RATE, "height": HEIGHT, "width": WIDTH}
    paths = make_videos(work / "videos", args.videos, **sizes)
    entries = [{"file": path.name, "captions": ["noise drifts"]} for path in paths]
    files.write_text(work / "captions.json", json.dumps(entries))
    make_small_text_model(work / "text", ["noise drifts"])
    engines = ("local", "ray") if args.ray else ("local",)
    for kind, width in WIDTHS.items():
        make_tokenizer(work / kind, width)
        model = load_tokenizer(work / kind)
        ways = {
            "plain loop": lambda model=model: plain_loop(paths, model),
            "decoding alone": lambda: decode_alone(paths),
            "encoding alone": lambda model=model: encode_alone(len(paths), model),
        }
        seconds: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for name, run in ways.items():
                start = time.perf_counter()
                run()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
            for name in engines:
                took = engine(name, work, work / "captions.json", work / "videos", work / kind)
                seconds.setdefault(f"engine {name}", []).append(took)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        slower = max(median["decoding alone"], median["encoding alone"])
        print(f"\n{kind} encoder, {len(paths)} videos of {SECONDS} s\n")
        print("| way | videos a minute | times the plain loop | time, to the slower part |")
        print("| --- | ---: | ---: | ---: |")
        for name, value in median.items():
            rate, faster = 60 * len(paths) / value, median["plain loop"] / value
            print(f"| {name} | {rate:,.0f} | {faster:.2f} | {value / slower:.2f} |")


if __name__ == "__main__":
    main()
