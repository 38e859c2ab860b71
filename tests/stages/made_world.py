"""Videos, captions, a VQ-VAE and a text model, all small, for tests of preprocessing."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from opensora_jax.data import moving_shapes, video_io
from opensora_jax.inference.small_text_model import make_small_text_model
from opensora_jax.inference.tokenizer import save_tokenizer
from opensora_jax.models.vqvae import VQVAE, VQVAEConfig
from opensora_jax.preprocessing.options import Options
from opensora_jax.stages.preprocess import preprocess

ROOT = Path(__file__).parents[2]
RESOLUTION, WINDOW = (16, 8), 8  # (height, width), frames
OPTIONS = {
    "resolution": RESOLUTION,
    "window": WINDOW,
    "max_frames": 30,
    "batch_size": 3,
    "videos_per_part": 4,
}

# file -> (frames in it, captions)
USABLE = {
    "whole.mp4": (8, ["a red circle moves up", "a shared caption"]),
    "long.mp4": (30, ["a blue square moves left"]),  # 28 frames: three windows and a half
    "odd.gif": (11, ["a shared caption", "a green triangle", "the last one"]),  # 8 frames
}


def write_video(path, n_frames, seed=0, fps=8):
    rng = np.random.default_rng(seed)
    frames = moving_shapes.render(rng, "red", "circle", "up", max(n_frames, 2), 32)
    video_io.write_video(path, frames[:n_frames], fps=fps)


def write_captions(path, captions):
    entries = [{"file": file, "captions": texts} for file, texts in captions.items()]
    path.write_text(json.dumps(entries))
    return path


def identities(paths):
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def save_vqvae(folder):
    """A VQ-VAE that is quick to compile and whose random codes differ from place to place."""
    sizes = {"n_codes": 64, "embedding_dim": 4, "n_hiddens": 16, "n_res_layers": 0}
    config = VQVAEConfig(**sizes, downsample=(4, 4, 4), n_frames=16)
    graph, state = nnx.split(nnx.eval_shape(lambda: VQVAE(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.normal(0, 0.3, leaf.shape)
        return (np.abs(values) if leaf.ndim < 2 else values).astype(leaf.dtype)  # variances

    state = jax.tree.map(draw, state)
    save_tokenizer(folder, nnx.merge(graph, state))


def make_world(folder):
    """Videos, good and bad, their captions file, a VQ-VAE and a text model."""
    save_vqvae(folder / "vqvae")
    videos = folder / "videos"
    videos.mkdir()
    for seed, (file, (n_frames, _)) in enumerate(USABLE.items()):
        write_video(videos / file, n_frames, seed)
    write_video(videos / "too_long.mp4", 31)
    write_video(videos / "too_short.mp4", 3)
    whole = (videos / "whole.mp4").read_bytes()
    (videos / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "text.mp4").write_text("no video")
    bad = ("too_long.mp4", "truncated.mp4", "missing.mp4", "too_short.mp4", "text.mp4")
    captions = {file: ["a shared caption"] for file in bad[:3]}
    captions |= {file: texts for file, (_, texts) in USABLE.items()}
    captions |= {file: ["never used", "a shared caption"] for file in bad[3:]}
    write_captions(folder / "captions.json", captions)
    words = [text for texts in captions.values() for text in texts]
    make_small_text_model(folder / "text_model", words)


def run_on(world, output, **options):
    models = {"vqvae": world / "vqvae", "text_model": world / "text_model"}
    options = OPTIONS | models | options
    captions = options.pop("captions", world / "captions.json")
    preprocess(captions, options.pop("videos", world / "videos"), output, Options(**options))


def command(world, captions, videos, output):
    words = [ROOT / "data_prep" / "preprocess_data.py"]
    words += ["-c", captions, "-v", videos, "-o", output, "--vqvae", world / "vqvae"]
    words += ["--text_model", world / "text_model", "--resolution", *RESOLUTION]
    words += ["--window", WINDOW, "--videos_per_part", 1, "--batch_size", 3, "--fps", 0]
    return [str(word) for word in words]
